"""Attention as its formula, dense and float32 inside: the specification of every implementation.

output_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j        over the keys j that i sees
"""

import jax
import jax.numpy as jnp

from posjax.biases.base import Tile
from posjax.kernels.common import MASKED, widened
from posjax.problem import Problem
from posjax.types import Array, Num

__all__ = ["refuses", "run"]


def refuses(problem: Problem) -> str | None:
    """None: the specification does everything."""
    return None


def run(problem: Problem) -> Num[Array, "B T N E"]:
    """Dense attention, in several [B, N, T, S] arrays; a query that sees nothing gives 0."""
    query, key, value = problem.query, problem.key, problem.value
    bias, mask, scale = problem.bias, problem.mask, problem.scale
    groups = query.shape[2] // key.shape[2]
    exact = jax.lax.Precision.HIGHEST
    q = query.astype(jnp.float32)
    k, v = (jnp.repeat(x.astype(jnp.float32), groups, axis=2) for x in (key, value))
    allowed = mask.dense()
    dots = jnp.einsum("btnh,bsnh->bnts", q, k, precision=exact)
    logits, positions = scale * dots, (mask.query.positions, mask.key.positions)
    if bias is not None:
        context = dict(zip(("query_positions", "key_positions"), positions, strict=True))
        logits += bias.dense(query, key, scale=scale, allowed=allowed, **context)
    logits = jnp.where(allowed, logits, MASKED)
    uses_softmax = bias is None or bias.uses_softmax
    weights = jax.nn.softmax(logits, axis=-1) if uses_softmax else jnp.exp(logits)
    weights = jnp.where(allowed, weights, 0.0)
    output = jnp.einsum("bnts,bsnh->bnth", weights, v, precision=exact)
    if bias is not None and bias.has_values:
        q = jnp.swapaxes(q, 1, 2)
        tile = Tile(q, dots, allowed, *positions, scale)
        output += widened(bias.weigh(bias.rows(q), tile, weights), value.shape[3])
    return jnp.swapaxes(output, 1, 2).astype(query.dtype)
