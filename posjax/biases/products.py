"""Descriptions that are products of a vector of each query and a vector of each key."""

import dataclasses

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.biases.base import Bias, Tile, check_positions
from posjax.precision import wide
from posjax.types import Array, Float, Num

__all__ = ["ProductBias", "SinusoidBias", "sinusoid_frequencies"]

_EXACT = jax.lax.Precision.HIGHEST


@checks.arguments(width=checks.size(2, multiple_of=2), base=checks.above(1))
def sinusoid_frequencies(width: int, base: float) -> Float[Array, "m"]:
    """base^(-2m / width) for m = 0 ... width / 2 - 1.

    >>> sinusoid_frequencies(4, 16.0).tolist()
    [1.0, 0.25]
    """
    return base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProductBias(Bias):
    """Products of features: a bias of low rank.

        bias_ij = factor f_i . g_j

    Args:
        query_features: f, [B, T, F, E]; F is 1 or the number of query heads.
        key_features: g, [B, S, M, E]; M divides F.
        factor: one number, or one for each query head, [N].
        scaled: whether the attention's scale multiplies the bias; else 1 stands in its place.

    >>> bias = ProductBias(jnp.ones((1, 3, 1, 2)), jnp.ones((1, 3, 1, 2)), jnp.float32(0.5))
    """

    query_features: Num[Array, "#B T F E"]
    key_features: Num[Array, "#B S M E"]
    factor: Float[Array, "*N"] | None = None
    scaled: bool = dataclasses.field(default=False, metadata={"static": True})

    def dense(self, query, key, *, scale, allowed, query_positions, key_positions):
        """The whole product."""
        f, g = (wide(x) for x in (self.query_features, self.key_features))
        batch, length, heads, size = f.shape
        f = f.reshape(batch, length, g.shape[2], -1, size)
        products = jnp.einsum("btmge,bsme->bmgts", f, g, precision=_EXACT)
        products = products.reshape(batch, heads, length, g.shape[1])
        if self.factor is not None:
            products *= jnp.atleast_1d(wide(self.factor))[None, :, None, None]
        return products * scale if self.scaled else products

    def tile(self, rows, tile, carry):
        """The block's product."""
        settings = {"scale": tile.scale, "allowed": None}
        settings |= {"query_positions": None, "key_positions": None}
        return self.dense(None, None, **settings), None

    def check(self, query, key, is_causal):
        """Shapes of the features and the factor."""
        (batch, queries, heads, _), keys = query.shape, key.shape[1]
        f, g = self.query_features.shape, self.key_features.shape
        if len(f) != 4 or f[0] not in (1, batch) or f[1] != queries or f[2] not in (1, heads):
            wanted = f"[{batch} or 1, {queries}, {heads} or 1, E]"
            raise ValueError(f"query_features has shape {f}; it must be {wanted}.")
        if len(g) != 4 or g[0] != f[0] or g[1] != keys or f[2] % g[2] or g[3] != f[3]:
            wanted = f"[{f[0]}, {keys}, M, {f[3]}] with M dividing {f[2]}"
            raise ValueError(f"key_features has shape {g}; it must be {wanted}.")
        if self.factor is not None:
            checks.shape("factor", jnp.asarray(self.factor), (), (heads,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SinusoidBias(Bias):
    """Products of queries with projected sinusoids of the relative position (Transformer-XL).

        bias_ij = scale ((q_i + query_bias) . kernel^T R_{i-j} + key_logits_j)
        R_d     = (sin(d w_0), ..., sin(d w_{D/2-1}), cos(d w_0), ...)       w: the frequencies

    R_{i-j} is a turn of R_i by the angles of j, so this is a product of one vector of D numbers of
    each query and one of each key: no [T, S, D] array, and no distances one by one. Positions are
    taken relative to a query of the block, so angles are as exact as distances.

    Args:
        kernel: [D, N, H]; D is even.
        query_bias: [N, H].
        key_logits: [B, S, N], what is added for each key and query head; None for nothing.
        query_positions: positions to use instead of those of the attention call; no gradient.
        key_positions: likewise.
        base: of the frequencies.
        scaled: whether the attention's scale multiplies the bias; else 1 stands in its place.
    """

    kernel: Float[Array, "D N H"]
    query_bias: Float[Array, "N H"]
    key_logits: Float[Array, "B S N"] | None = None
    query_positions: Num[Array, "#B T"] | None = None
    key_positions: Num[Array, "#B S"] | None = None
    base: float = dataclasses.field(default=10_000.0, metadata={"static": True})
    scaled: bool = dataclasses.field(default=True, metadata={"static": True})

    def dense(self, query, key, *, scale, allowed, query_positions, key_positions):
        """The whole array, as one block."""
        query = jnp.swapaxes(query, 1, 2)
        tile = Tile(query, None, allowed, query_positions, key_positions, scale)
        return self.tile(self.rows(query), tile, None)[0]

    def rows(self, query):
        """How much of each sine and cosine each query wants, [B, N, t, D]."""
        query = wide(query) + wide(self.query_bias)[None, :, None, :]
        kernel = wide(self.kernel)
        return jnp.einsum("bnth,dnh->bntd", query, kernel, precision=_EXACT)

    def tile(self, rows, tile, carry):
        """Rows turned by the queries' angles, times sines and cosines of the keys'."""
        own_query, own_key = self.query_positions, self.key_positions
        i = tile.query_positions if own_query is None else own_query
        j = tile.key_positions if own_key is None else own_key
        start = i[:, :1]
        (sin_i, cos_i), (sin_j, cos_j) = (self._waves(x - start) for x in (i, j))
        of_sin, of_cos = jnp.split(rows, 2, axis=-1)
        sin_i, cos_i = sin_i[:, None], cos_i[:, None]
        turned = (of_cos * sin_i - of_sin * cos_i, of_sin * sin_i + of_cos * cos_i)
        turned = jnp.concatenate(turned, axis=-1)
        waves = jnp.broadcast_to(
            jnp.concatenate((sin_j, cos_j), axis=-1), (rows.shape[0], j.shape[1], rows.shape[3])
        )
        total = jnp.einsum("bntd,bsd->bnts", turned, waves, precision=_EXACT)
        if self.key_logits is not None:
            logits = jnp.moveaxis(wide(self.key_logits), 2, 1)
            total += logits[:, :, None, :]
        return total * (tile.scale if self.scaled else 1.0), None

    def check(self, query, key, is_causal):
        """Shapes of the trained arrays."""
        checks.number("SinusoidBias.base", self.base, above=1)
        batch, _, heads, size = query.shape
        checks.shape("kernel", self.kernel, ("D", heads, size))
        width = self.kernel.shape[0]
        checks.require("kernel.shape[0]", width, width % 2 == 0, "even")
        checks.shape("query_bias", self.query_bias, (heads, size))
        if self.key_logits is not None:
            checks.shape("key_logits", self.key_logits, (batch, key.shape[1], heads))
        check_positions(self, query, key)

    def _waves(self, distance: Num[Array, "#B t"]) -> tuple[Array, Array]:
        """Sines and cosines of a distance, [B, t, D / 2] each."""
        frequencies = sinusoid_frequencies(self.kernel.shape[0], self.base)
        distance = jax.lax.stop_gradient(wide(distance))
        angles = distance[:, :, None] * frequencies[None, None, :]
        return jnp.sin(angles), jnp.cos(angles)
