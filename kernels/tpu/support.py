"""The problems that the TPU kernels can solve; importable without Pallas."""

import jax.numpy as jnp

from posjax.kernels.parts import unsupported_bias
from posjax.problem import Problem

__all__ = ["refuses"]


def refuses(problem: Problem) -> str | None:
    """The reason why these kernels cannot solve a problem; None if they can."""
    dtype = problem.query.dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"query has dtype {dtype}; the TPU kernels take float32 and bfloat16"
    if problem.mask.array is not None:
        return "the TPU kernels do not support an explicit mask array"
    return unsupported_bias(problem.bias, "TPU")
