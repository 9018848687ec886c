"""Attention as its formula, dense and float32 inside: the specification of every implementation.

output_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j        over the keys j that i sees
"""

import jax
import jax.numpy as jnp

from posjax.biases.base import Tile
from posjax.kernels.common import Attended, capped, exponentials, widened
from posjax.precision import wide
from posjax.problem import Problem
from posjax.types import Array, Float

__all__ = ["refuses", "run"]


def refuses(problem: Problem) -> str | None:
    """None: the specification does everything."""
    return None


def run(problem: Problem) -> Attended:
    """Dense attention, in several [B, N, T, S] arrays; a query that sees nothing gives 0.

    float64 inputs are computed in float64.
    """
    query, key, value = problem.query, problem.key, problem.value
    bias, mask, scale = problem.bias, problem.mask, problem.scale
    groups = query.shape[2] // key.shape[2]
    exact = jax.lax.Precision.HIGHEST
    q = wide(query)
    k, v = (jnp.repeat(wide(x), groups, axis=2) for x in (key, value))
    allowed = mask.dense()
    dots = jnp.einsum("btnh,bsnh->bnts", q, k, precision=exact)
    logits = capped(scale * dots, problem.soft_cap)
    positions = mask.query.positions, mask.key.positions
    if bias is not None:
        context = dict(zip(("query_positions", "key_positions"), positions, strict=True))
        logits += bias.dense(query, key, scale=scale, allowed=allowed, **context)
    logits = jnp.where(allowed, logits, -jnp.inf)
    if bias is None or bias.uses_softmax:
        weights, log_sum_exp = _softmax(logits)
    else:
        weights, log_sum_exp = jnp.exp(logits), jnp.zeros(logits.shape[:3], logits.dtype)
    kept = weights if problem.dropout is None else weights * problem.dropout.factors()
    output = jnp.einsum("bnts,bsnh->bnth", kept, v, precision=exact)
    if bias is not None and bias.has_values:
        q = jnp.swapaxes(q, 1, 2)
        tile = Tile(q, dots, allowed, *positions, scale)
        output += widened(bias.weigh(bias.rows(q), tile, kept), value.shape[3])
    output = jnp.swapaxes(output, 1, 2).astype(query.dtype)
    return Attended(output, jnp.swapaxes(log_sum_exp, 1, 2), weights.astype(query.dtype))


def _softmax(
    logits: Float[Array, "B N T S"],
) -> tuple[Float[Array, "B N T S"], Float[Array, "B N T"]]:
    """The weights and the log-sum-exp; 0 and -inf for a row whose logits are all -inf."""
    maximum = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    weights = exponentials(logits, maximum)
    total = jnp.sum(weights, axis=-1)
    empty = maximum == -jnp.inf
    total = jnp.where(empty, 1.0, total)
    log_sum_exp = jnp.where(empty, -jnp.inf, maximum + jnp.log(total))
    return weights / total[..., None], log_sum_exp
