"""Attention without a bias as `jax.nn.dot_product_attention` computes it."""

import jax

from posjax.problem import Problem
from posjax.types import Array, Num

__all__ = ["refuses", "run"]


def refuses(problem: Problem) -> str | None:
    """The reason why `jax.nn.dot_product_attention` is not the same; None if it is."""
    mask, square = problem.mask, problem.query.shape[1] == problem.key.shape[1]
    if problem.bias is not None:
        return f"{type(problem.bias).__name__} is not for jax.nn.dot_product_attention"
    if problem.key.shape != problem.value.shape:
        return f"values have a size of their own, {problem.value.shape[3]}"
    restrictions = (mask.array, mask.query.segment_ids, mask.window)
    only_causal = all(part is None for part in restrictions) and (square or not mask.is_causal)
    if mask.has_given_positions or not only_causal:
        return "there is more than is_causal, on equal lengths, that restricts attention"
    return None


def run(problem: Problem) -> Num[Array, "B T N E"]:
    """JAX's own attention."""
    return jax.nn.dot_product_attention(
        problem.query,
        problem.key,
        problem.value,
        scale=problem.scale,
        is_causal=problem.mask.is_causal,
    )
