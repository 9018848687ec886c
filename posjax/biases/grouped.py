"""The description of SelfExtend: beyond a window, keys are seen from grouped positions."""

import dataclasses

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.biases.base import Bias, check_positions
from posjax.precision import wide
from posjax.types import Array, Float, Num

__all__ = ["GroupedBias"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupedBias(Bias):
    """Replaces the products of far queries and keys by those of other features of both.

        bias_ij = scale * (q'_i . k'_j - q_i . k_j)   where query position - key position >= window
                  0                                   else

    So attention computes two products for each pair, in blocks, and no whole array of logits.

    Args:
        query_features: q', [B, T, N, H].
        key_features: k', [B, S, K, H], with the heads of the key.
        query_positions: [B or 1, T].
        key_positions: [B or 1, S].
        window: distances from here on are far.

    References:
        Jin et al., LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning,
        arXiv:2401.01325, section 3.

    >>> x, p = jnp.ones((1, 3, 1, 2)), jnp.arange(3)[None]
    >>> bias = GroupedBias(2 * x, x, p, p, window=2)
    >>> context = {"scale": 1.0, "allowed": None, "query_positions": p, "key_positions": p}
    >>> bias.dense(x, x, **context)[0, 0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]
    """

    query_features: Num[Array, "B T N H"] | None
    key_features: Num[Array, "B S K H"] | None
    query_positions: Num[Array, "#B T"] | None
    key_positions: Num[Array, "#B S"] | None
    window: int = dataclasses.field(metadata={"static": True})

    def dense(self, query, key, *, scale, allowed, query_positions, key_positions):
        """The formula, literally."""
        return self._difference(_products(query, key), scale)

    def tile(self, rows, tile, carry):
        """The block's difference of products."""
        return self._difference(tile.dots, tile.scale), None

    def check(self, query, key, is_causal):
        """Features like query and key, positions for each of them, causal attention."""
        checks.shape("GroupedBias.query_features", self.query_features, query.shape)
        checks.shape("GroupedBias.key_features", self.key_features, key.shape)
        check_positions(self, query, key)
        checks.integer("GroupedBias.window", self.window, low=1)
        if not is_causal:
            raise ValueError(
                "GroupedBias groups keys before the query, which needs is_causal=True."
            )

    def _difference(self, dots: Float[Array, "B N t s"], scale: float) -> Float[Array, "B N t s"]:
        distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
        other = _products(self.query_features, self.key_features)
        return jnp.where((distance >= self.window)[:, None], scale * (other - dots), 0.0)


def _products(query: Num[Array, "B t N H"], key: Num[Array, "B s K H"]) -> Float[Array, "B N t s"]:
    """Query . key in float32 for grouped heads."""
    batch, length, heads, size = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, size)
    dots = jnp.einsum(
        "btkgh,bskh->bkgts",
        wide(grouped),
        wide(key),
        precision=jax.lax.Precision.HIGHEST,
    )
    return dots.reshape(batch, heads, length, -1)
