"""Tile mathematics that the implementations share."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from posjax.precision import wide_type
from posjax.types import Array, Float, Num

__all__ = [
    "LN2",
    "LOG2E",
    "MASKED",
    "Attended",
    "Softmax",
    "capped",
    "dots",
    "exponentials",
    "transposed_sum",
    "weighted_sum",
    "widened",
]

LN2 = 0.6931471805599453
LOG2E = 1 / LN2
# A finite stand-in for minus infinity in Pallas kernels: differences of two of them stay finite.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


class Attended(NamedTuple):
    """The result of an implementation.

    Args:
        output: in query's dtype.
        log_sum_exp: of each query's logits, with the bias; -inf if it sees nothing. None from an
            implementation that refuses problems that need it.
        weights: before dropout, if the problem asks for them.
    """

    output: Num[Array, "B T N E"]
    log_sum_exp: Float[Array, "B T N"] | None = None
    weights: Float[Array, "B N T S"] | None = None


def exponentials(
    logits: Float[Array, "*rows s"], maximum: Float[Array, "*rows"]
) -> Float[Array, "*rows s"]:
    """exp(logits - maximum), and 0 for logits of -inf also if there is no other."""
    return jnp.exp(logits - _finite(maximum)[..., None])


def capped(logits: Float[Array, "*any"], cap: float | None) -> Float[Array, "*any"]:
    """Cap * tanh(logits / cap); the logits themselves without a cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _finite(maximum: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """0 in the place of -inf: a difference of two would be NaN."""
    return jnp.where(maximum == -jnp.inf, 0.0, maximum)


def _precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Products of float32 are exact to float32 everywhere; narrower inputs use the fast path."""
    is_wide = dtype in (jnp.float32, jnp.float64)
    return jax.lax.Precision.HIGHEST if is_wide else jax.lax.Precision.DEFAULT


def _group_rows(x: Num[Array, "B N t H"], kv_heads: int) -> Num[Array, "B K Gt H"]:
    """Puts the query heads of one key/value head under each other, to share its products."""
    batch, heads, length, size = x.shape
    # One axis at a time, as JAX wants it over Explicit meshes.
    apart = x.reshape(batch, kv_heads, heads // kv_heads, length, size)
    return apart.reshape(batch, kv_heads, -1, size)


def _ungroup_rows(x: Num[Array, "B K Gt H"], heads: int) -> Num[Array, "B N t H"]:
    """The inverse of `_group_rows`."""
    batch, kv_heads, rows, size = x.shape
    groups = heads // kv_heads
    apart = x.reshape(batch, kv_heads, groups, rows // groups, size)
    return apart.reshape(batch, heads, rows // groups, size)


def dots(query: Num[Array, "B N t H"], key: Num[Array, "B K s H"]) -> Float[Array, "B N t s"]:
    """Query . key in float32 for grouped heads."""
    product = _row_products(_group_rows(query, key.shape[1]), key)
    return _ungroup_rows(product, query.shape[1])


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
    grouped = _group_rows(weights, value.shape[1]).astype(value.dtype)
    return _ungroup_rows(_contract("bkrs,bksh->bkrh", grouped, value), weights.shape[1])


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
        letters, a, b, precision=_precision(a.dtype), preferred_element_type=wide_type(a.dtype)
    )


class Softmax(NamedTuple):
    """Running state of a softmax-weighted sum over blocks of keys.

    The rule for a row without any weight (nothing visible, or every logit -inf) is in `result`: its
    output is 0, and its log-sum-exp -inf. Finite logits, however low, have their softmax, and NaN
    among visible logits makes the row NaN.
    """

    maximum: Float[Array, "B N t"]
    total: Float[Array, "B N t"]
    output: Float[Array, "B N t E"]

    @classmethod
    def start(cls, shape: tuple[int, int, int, int], dtype: jnp.dtype) -> "Softmax":
        """Nothing seen yet, for outputs of `shape` [B, N, t, E]."""
        row = jnp.full(shape[:3], -jnp.inf, dtype)
        return cls(row, jnp.zeros_like(row), jnp.zeros(shape, dtype))

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
            logits = jnp.where(allowed, logits, -jnp.inf)
        maximum = jnp.maximum(self.maximum, jnp.max(logits, axis=-1))
        weights = exponentials(logits, maximum)
        shrink = jnp.exp(self.maximum - _finite(maximum))
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
