"""The problems that the GPU kernels can solve; importable without their compiler."""

import jax
import jax.numpy as jnp

from posjax.kernels.host import contextual, unsupported_by
from posjax.problem import Problem

__all__ = ["SIZES", "refuses", "unsupported"]

# Head sizes; others are padded.
SIZES = (64, 128)
_MOST_POSITIONS = 128


def refuses(problem: Problem) -> str | None:
    """The reason why these kernels cannot solve a problem; None if they can."""
    capability = _compute_capability()
    if capability is not None and capability[0] != 9:
        version = ".".join(map(str, capability))
        return f"the device has compute capability {version}; the GPU kernels are for 9.0 (Hopper)"
    return unsupported(problem)


def unsupported(problem: Problem) -> str | None:
    """The reason why it cannot be solved on any GPU; None if it can."""
    query, value = problem.query, problem.value
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query has dtype {query.dtype}; the GPU kernels take bfloat16 and float16"
    largest = max(query.shape[3], value.shape[3])
    if largest > SIZES[-1]:
        return f"head size {largest} is greater than {SIZES[-1]}, the largest of the GPU kernels"
    if problem.mask.array is not None:
        return "the GPU kernels do not support an explicit mask array"
    own = contextual(problem.bias)
    if own is not None and own.num_positions > _MOST_POSITIONS:
        return (
            f"the table has {own.num_positions} rows; the GPU kernels take up to {_MOST_POSITIONS}"
        )
    return unsupported_by(problem, "GPU")


def _compute_capability() -> tuple[int, ...] | None:
    """The compute capability of the GPU; None without one."""
    if jax.default_backend() != "gpu":
        return None
    words = str(getattr(jax.devices("gpu")[0], "compute_capability", "0"))
    return tuple(int(word) for word in words.split("."))
