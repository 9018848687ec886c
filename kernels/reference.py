"""Attention as its formula, dense and float32 inside: the specification of every implementation.

output_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j        over the keys j that i sees
"""

import jax
import jax.numpy as jnp

from posjax.bias import Bias
from posjax.kernels.common import MASKED
from posjax.masks import Mask
from posjax.types import Array, Num

__all__ = ["attention"]


def attention(
    query: Num[Array, "B T N H"],
    key: Num[Array, "B S K H"],
    value: Num[Array, "B S K H"],
    bias: Bias | None,
    mask: Mask,
    *,
    scale: float,
) -> Num[Array, "B T N H"]:
    """Dense attention, in several [B, N, T, S] arrays; a query that sees nothing gives 0."""
    groups = query.shape[2] // key.shape[2]
    exact = jax.lax.Precision.HIGHEST
    q = query.astype(jnp.float32)
    k, v = (jnp.repeat(x.astype(jnp.float32), groups, axis=2) for x in (key, value))
    allowed = mask.dense()
    logits = scale * jnp.einsum("btnh,bsnh->bnts", q, k, precision=exact)
    if bias is not None:
        positions = {"query_positions": mask.query.positions, "key_positions": mask.key.positions}
        logits += bias.dense(query, key, scale=scale, allowed=allowed, **positions)
    weights = jax.nn.softmax(jnp.where(allowed, logits, MASKED), axis=-1)
    weights = jnp.where(allowed, weights, 0.0)
    return jnp.einsum("bnts,bsnh->btnh", weights, v, precision=exact).astype(query.dtype)
