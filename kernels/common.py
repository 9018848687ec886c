"""Tile mathematics that the implementations share."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from posjax.types import Array, Float, Num

__all__ = ["LN2", "LOG2E", "MASKED", "Softmax", "dots", "transposed_sum", "weighted_sum", "widened"]

LN2 = 0.6931471805599453
LOG2E = 1 / LN2
# A finite stand-in for minus infinity: differences of two masked logits stay finite.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def _precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 products are exact to float32 on every backend; narrower inputs use the fast path."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _group_rows(x: Num[Array, "B N t H"], kv_heads: int) -> Num[Array, "B K Gt H"]:
    """Puts the query heads of one key/value head under each other, to share its products."""
    batch, _, _, size = x.shape
    return x.reshape(batch, kv_heads, -1, size)


def dots(query: Num[Array, "B N t H"], key: Num[Array, "B K s H"]) -> Float[Array, "B N t s"]:
    """Query . key in float32 for grouped heads."""
    batch, heads, length, _ = query.shape
    product = _row_products(_group_rows(query, key.shape[1]), key)
    return product.reshape(batch, heads, length, key.shape[2])


@jax.custom_vjp
def _row_products(a: Num[Array, "B K r H"], b: Num[Array, "B K s H"]) -> Float[Array, "B K r s"]:
    """A . b accumulated in float32; its gradients are products in the inputs' own dtype."""
    return _contract("bkrh,bksh->bkrs", a, b)


def _row_products_bwd(residuals, cotangent):
    a, b = residuals
    da = _contract("bkrs,bksh->bkrh", cotangent.astype(b.dtype), b).astype(a.dtype)
    db = _contract("bkrs,bkrh->bksh", cotangent.astype(a.dtype), a).astype(b.dtype)
    return da, db


_row_products.defvjp(lambda a, b: (_row_products(a, b), (a, b)), _row_products_bwd)


def weighted_sum(
    weights: Float[Array, "B N t s"], value: Num[Array, "B K s E"]
) -> Float[Array, "B N t E"]:
    """Sum of value rows in float32 for grouped heads."""
    batch, heads, length, _ = weights.shape
    grouped = _group_rows(weights, value.shape[1]).astype(value.dtype)
    return _contract("bkrs,bksh->bkrh", grouped, value).reshape(batch, heads, length, -1)


def widened(x: Float[Array, "B N t H"], size: int) -> Float[Array, "B N t E"]:
    """Zeros for the channels that an encoding has put behind those of the values."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[3])))


def transposed_sum(
    weights: Float[Array, "B N t s"], cotangent: Num[Array, "B N t E"], kv_heads: int
) -> Array:
    """Gradient of the values: sum over queries of weight times cotangent, [B, K, s, E]."""
    grouped = _group_rows(weights, kv_heads).astype(cotangent.dtype)
    return _contract("bkrs,bkrh->bksh", grouped, _group_rows(cotangent, kv_heads))


def _contract(letters: str, a: Array, b: Array) -> Array:
    return jnp.einsum(
        letters, a, b, precision=_precision(a.dtype), preferred_element_type=jnp.float32
    )


class Softmax(NamedTuple):
    """Running state of a softmax-weighted sum over blocks of keys.

    The rule for a row that may attend to nothing stands in `result`: its output is 0.
    """

    maximum: Float[Array, "B N t"]
    total: Float[Array, "B N t"]
    output: Float[Array, "B N t E"]

    @classmethod
    def start(cls, shape: tuple[int, int, int, int]) -> "Softmax":
        """Nothing seen yet, for outputs of `shape` [B, N, t, E]."""
        row = jnp.full(shape[:3], MASKED, jnp.float32)
        return cls(row, jnp.zeros_like(row), jnp.zeros(shape, jnp.float32))

    def update(
        self,
        logits: Float[Array, "B N t s"],
        allowed: Array | None,
        weigh: Callable[[Array], Array],
    ) -> "Softmax":
        """The state after one more block.

        `allowed` None means all; `weigh` gives the weighted sum of the block's values.
        """
        if allowed is not None:
            logits = jnp.where(allowed, logits, MASKED)
        maximum = jnp.maximum(self.maximum, jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - maximum[..., None])
        if allowed is not None:
            weights = jnp.where(allowed, weights, 0.0)
        shrink = jnp.exp(self.maximum - maximum)
        total = self.total * shrink + jnp.sum(weights, axis=-1)
        output = self.output * shrink[..., None] + weigh(weights)
        return Softmax(maximum, total, output)

    def result(self, uses_softmax: bool) -> tuple[Float[Array, "B N t E"], Float[Array, "B N t"]]:
        """The weighted mean and the log-sum-exp of each row.

        Without `uses_softmax` the sum weighted by exp(logits), and 0.
        """
        if not uses_softmax:
            return self.output * jnp.exp(self.maximum)[..., None], jnp.zeros_like(self.maximum)
        empty = self.total == 0
        total = jnp.where(empty, 1.0, self.total)
        return self.output / total[..., None], self.maximum + jnp.log(total)
