"""Attention without a bias as `jax.nn.dot_product_attention` computes it, dense."""

import jax
import jax.numpy as jnp

from posjax.kernels.blocks import platform
from posjax.kernels.common import Attended
from posjax.problem import Problem

__all__ = ["refuses", "run", "unlike_jax"]


def refuses(problem: Problem) -> str | None:
    """The reason why `jax.nn.dot_product_attention` is not the same; None if it is."""
    if problem.mask.window is not None:
        return "the dense attention of jax.nn is for no mask, or is_causal alone"
    return unlike_jax(problem) or _type_fails(problem.query.dtype)


def run(problem: Problem) -> Attended:
    """JAX's own attention."""
    return Attended(
        jax.nn.dot_product_attention(
            problem.query,
            problem.key,
            problem.value,
            scale=problem.scale,
            is_causal=problem.mask.is_causal,
        )
    )


def _type_fails(dtype: jnp.dtype) -> str | None:
    """The reason why `jax.nn` fails with inputs of a type; None if it does not."""
    if dtype != jnp.float32 and jax.config.jax_numpy_dtype_promotion == "strict":
        return f"jax.nn mixes {dtype} with float32, which strict dtype promotion forbids"
    if dtype == jnp.float16 and platform() != "gpu":
        return f"jax.nn has a product of float16 that is not compiled for {platform()}s"
    return None


def unlike_jax(problem: Problem) -> str | None:
    """The reason why no implementation of `jax.nn` computes the same; None if one may."""
    mask, square = problem.mask, problem.query.shape[1] == problem.key.shape[1]
    if problem.bias is not None:
        return f"{type(problem.bias).__name__} is not for jax.nn.dot_product_attention"
    if problem.key.shape != problem.value.shape:
        return f"values have their own head size, {problem.value.shape[3]}"
    if problem.query.dtype == jnp.float64:
        return "jax.nn.dot_product_attention has a softmax in float32, for float64, too"
    if problem.needs_log_sum_exp:
        return "jax.nn.dot_product_attention has no log-sum-exp with gradients"
    is_whole = mask.array is None and mask.query.segment_ids is None
    if mask.has_given_positions or not is_whole or not (square or not mask.is_causal):
        return "there is more than is_causal, on equal lengths, that restricts attention"
    return problem.unsupported_settings("the functions of jax.nn")
