"""Descriptions that look the relative position of query and key up in trained tables.

No array of [T, S] vectors is built: queries (and keys) are multiplied with all rows of a table
once, and a block of the bias picks from these products.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.biases.base import Bias, Tile, check_positions
from posjax.precision import wide
from posjax.types import Array, Float, Num
from posjax.varying import varying_axes, varying_over

__all__ = ["ClippedTableBias", "MultiplierBias", "look_up"]

_EXACT = jax.lax.Precision.HIGHEST


@checks.arguments(clip=checks.at_least(0))
def look_up(
    rows: Float[Array, "#B #N #t P"], relative: Num[Array, "#B t s"], clip: tuple[int, int]
) -> Float[Array, "B N t s"]:
    """The entry of each pair: rows[b, n, i, clip(relative[b, i, j], -left, right) + left].

    Fractions are interpolated linearly between two entries. Blocks that lie beyond an end of the
    table altogether cost no lookup.

    Args:
        relative: position of the key minus position of the query.
        clip: left and right; P = left + right + 1.

    >>> rows = jnp.array([[[[0.0, 1.0, 2.0]]]])
    >>> look_up(rows, jnp.array([[[-9, -1, 0, 1, 9]]]), (1, 1)).tolist()
    [[[[0.0, 0.0, 1.0, 2.0, 2.0]]]]
    >>> look_up(rows, jnp.array([[[-0.75, 0.5]]]), (1, 1)).tolist()
    [[[[0.25, 1.5]]]]
    """
    left, right = clip
    checks.shape("rows", rows, (..., left + right + 1))
    shape = jnp.broadcast_shapes(rows.shape[:3], (relative.shape[0], 1, relative.shape[1]))
    shape += relative.shape[2:]
    far_left, far_right = jnp.max(relative) <= -left, jnp.min(relative) >= right

    def pick(rows: Array, relative: Array) -> Array:
        place = jnp.clip(relative, -left, right)[:, None] + left
        if jnp.issubdtype(place.dtype, jnp.integer):
            return jnp.broadcast_to(_take(rows, place), shape)
        place = wide(place)
        below = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, left + right)
        above = jnp.minimum(below + 1, left + right)
        fraction = jax.lax.stop_gradient(place - wide(below))
        return (1.0 - fraction) * _take(rows, below) + fraction * _take(rows, above)

    def end(rows: Array, relative: Array) -> Array:
        del relative
        column = jnp.where(far_left, 0, left + right)
        return jnp.broadcast_to(jax.lax.dynamic_index_in_dim(rows, column, axis=3), shape)

    return jax.lax.cond(far_left | far_right, end, pick, rows, relative)


def _take(rows: Array, index: Array) -> Array:
    return jnp.take_along_axis(rows, index, axis=3, mode="promise_in_bounds")


class _ByDistance(Bias):
    """The base of the descriptions of this file: their own positions, dense from one tile."""

    def dense(self, query, key, *, scale, allowed, query_positions, key_positions):
        """The whole array, as one block."""
        query = wide(jnp.swapaxes(query, 1, 2))
        dots = _grouped("bkgth,bskh->bkgts", query, key)
        tile = Tile(query, dots, allowed, query_positions, key_positions, scale)
        return self.tile(self.rows(query), tile, None)[0]

    def _relative(self, tile: Tile) -> Num[Array, "#B t s"]:
        """Position of the key minus position of the query."""
        own_query, own_key = self.query_positions, self.key_positions
        query = tile.query_positions if own_query is None else own_query
        key = tile.key_positions if own_key is None else own_key
        return key[:, None, :] - query[:, :, None]

    def _check_tables(self, query: Array, *names: str) -> None:
        heads, size = query.shape[2:]
        rows = sum(self.clip) + 1
        for name in names:
            if getattr(self, name) is not None:
                checks.shape(
                    f"{name} with clip={self.clip}",
                    getattr(self, name),
                    (rows, size),
                    (heads, rows, size),
                )

    def _check_key(self, key: Array, reason: str | None) -> None:
        """Keys are like those of attention, and not left out if there is a reason for them."""
        holds = reason is None if self.key is None else self.key.shape == key.shape
        if holds:
            return
        got = "None" if self.key is None else f"of shape {self.key.shape}"
        why = "" if reason is None else f"{reason}, so "
        raise ValueError(f"{why}`key` must be the keys, {key.shape}; it is {got}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClippedTableBias(_ByDistance):
    """Trained vectors of the clipped relative position, added to keys, queries and values.

        r        = clip(j - i, -left, right) + left
        bias_ij  = scale (q_i . query_table[r] + k_j . key_table[r])
        output_i = sum_j weight_ij (v_j + value_table[r])

    A table is [P, H], shared by the heads, or [N, P, H]; P = left + right + 1; a term whose table
    is None is left out. Relative positions may be fractions (`look_up`).

    Args:
        clip: left and right, the greatest distances that have a row of their own.
        scaled: whether the attention's scale multiplies the bias; else 1 stands in its place.
        causal_only: whether attention must be causal, because there are no rows for keys after the
            query.
        key: the keys [B, S, K, H]; needed with `key_table`.
        query_positions: positions to use instead of those of the attention call; no gradient.
        key_positions: likewise.
    """

    query_table: Float[Array, "*N P H"] | None = None
    key_table: Float[Array, "*N P H"] | None = None
    value_table: Float[Array, "*N P H"] | None = None
    key: Num[Array, "B S K H"] | None = None
    query_positions: Num[Array, "#B T"] | None = None
    key_positions: Num[Array, "#B S"] | None = None
    clip: tuple[int, int] = dataclasses.field(default=(16, 16), metadata={"static": True})
    scaled: bool = dataclasses.field(default=True, metadata={"static": True})
    causal_only: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def has_values(self) -> bool:
        """Whether there is a table for values."""
        return self.value_table is not None

    def rows(self, query):
        """Each query times all rows of its table, [B, N, t, P]."""
        if self.query_table is None:
            return None
        return _times_table("bnth", wide(query), self.query_table)

    def tile(self, rows, tile, carry):
        """The products at the block's relative positions."""
        relative, parts = self._relative(tile), []
        if self.query_table is not None:
            parts.append(look_up(rows, relative, self.clip))
        if self.key_table is not None:
            parts.append(self._of_keys(relative, tile.query.shape[1]))
        scale = tile.scale if self.scaled else 1.0
        return scale * sum(parts, jnp.zeros((1, 1, 1, 1), jnp.float32)), None

    def weigh(self, rows, tile, weights):
        """The weights of each relative position, summed, times its vector."""
        relative = self._relative(tile)
        shape = (*weights.shape[:3], sum(self.clip) + 1)
        pick = lambda rows: look_up(rows, relative, self.clip)  # noqa: E731
        # Of a constant, the gradient would be summed over the devices of a `shard_map`.
        nothing = varying_over(varying_axes(weights), jnp.zeros(shape, weights.dtype))
        (total,) = jax.vjp(pick, nothing)[1](weights)
        table = wide(self.value_table)
        letters = "bntp,ph->bnth" if table.ndim == 2 else "bntp,nph->bnth"
        return jnp.einsum(letters, total, table, precision=_EXACT)

    def check(self, query, key, is_causal):
        """Shapes of the tables, the keys where they are needed, and the direction."""
        if self.causal_only and not is_causal:
            raise ValueError(
                "the tables have rows for keys before the query, which needs is_causal=True."
            )
        checks.integers("clip", self.clip, count=2, low=0)
        check_positions(self, query, key)
        self._check_tables(query, "query_table", "key_table", "value_table")
        self._check_key(key, None if self.key_table is None else "key_table multiplies keys")

    def _of_keys(self, relative: Array, heads: int) -> Float[Array, "B N t s"]:
        """k_j . key_table[r]."""
        key = wide(jnp.swapaxes(self.key, 1, 2))
        if self.key_table.ndim == 3:
            key = jnp.repeat(key, heads // key.shape[1], axis=1)
        products = _times_table("bnth", key, self.key_table)
        found = look_up(products, jnp.swapaxes(relative, 1, 2), self.clip)
        found = jnp.swapaxes(found, 2, 3)
        return jnp.repeat(found, heads // found.shape[1], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MultiplierBias(_ByDistance):
    """Products of query and key, multiplied by a trained number (or vector) of the distance.

        r       = clip(j - i, -left, right) + left               |j - i| instead with `absolute`
        bias_ij = scale (w[r] - 1) (q_i . k_j)                   w [N, P], a number for each head
        bias_ij = scale sum_c (w[r, c] - 1) q_ic k_jc            w [P, H] or [N, P, H], by channel

    so that logit + bias is scale w[r] (q_i . k_j).

    Args:
        multipliers: w.
        key: the keys [B, S, K, H]; needed for multipliers by channel.
        clip: left and right, the greatest distances that have a row of their own; left is 0 with
            `absolute`.
        by_channel: whether w has a channel axis.
    """

    multipliers: Float[Array, "*N P H"]
    key: Num[Array, "B S K H"] | None = None
    query_positions: Num[Array, "#B T"] | None = None
    key_positions: Num[Array, "#B S"] | None = None
    clip: tuple[int, int] = dataclasses.field(default=(16, 16), metadata={"static": True})
    absolute: bool = dataclasses.field(default=False, metadata={"static": True})
    by_channel: bool = dataclasses.field(default=False, metadata={"static": True})

    def letters(self, name, ndim):
        """Numbers for each head have no axis of channels."""
        return (
            "NP" if name == "multipliers" and not self.by_channel else super().letters(name, ndim)
        )

    def tile(self, rows, tile, carry):
        """The block, channel by channel if each has its own multipliers."""
        relative = self._relative(tile)
        relative = jnp.abs(relative) if self.absolute else relative
        if self.by_channel:
            return tile.scale * self._over_channels(relative, tile.query), None
        table = wide(self.multipliers)[None, :, None, :]
        return tile.scale * tile.dots * (look_up(table, relative, self.clip) - 1.0), None

    def check(self, query, key, is_causal):
        """Shape of the multipliers, and the keys where they are needed."""
        checks.integers("clip", self.clip, count=2, low=0)
        check_positions(self, query, key)
        self._check_key(
            key, "by_channel=True multiplies channels of keys" if self.by_channel else None
        )
        if self.absolute and self.clip[0]:
            raise ValueError(f"clip is {self.clip}; its first number must be 0 with absolute=True.")
        if self.by_channel:
            self._check_tables(query, "multipliers")
        else:
            checks.shape(
                f"multipliers with clip={self.clip}",
                self.multipliers,
                (query.shape[2], sum(self.clip) + 1),
            )

    def _over_channels(self, relative: Array, query: Array) -> Float[Array, "B N t s"]:
        """sum_c (w[r, c] - 1) q_ic k_jc, with one channel in memory at a time."""
        key = jnp.moveaxis(wide(self.key), 3, 0)
        query = jnp.moveaxis(wide(query), 3, 0)
        table = jnp.moveaxis(wide(self.multipliers), -1, 0)
        table = table[:, None] if table.ndim == 2 else table

        @jax.checkpoint
        def term(query: Array, key: Array, table: Array) -> Array:
            products = _grouped("bkgth,bskh->bkgts", query[..., None], key[..., None])
            return products * (look_up(table[None, :, None, :], relative, self.clip) - 1.0)

        def step(total: Array, channel: Any) -> tuple[Array, None]:
            return total + term(*channel), None

        total = jnp.zeros((*query.shape[1:], key.shape[2]), query.dtype)
        total = varying_over(varying_axes((query, key, table, relative)), total)
        return jax.lax.scan(step, total, (query, key, table))[0]


def _times_table(letters: str, x: Array, table: Array) -> Float[Array, "B N t P"]:
    """Each vector of x times all rows of a table, shared or one for each head."""
    table = wide(table)
    letters += ",ph->bntp" if table.ndim == 2 else ",nph->bntp"
    return jnp.einsum(letters, x, table, precision=_EXACT)


def _grouped(letters: str, query: Array, key: Array) -> Float[Array, "B N t s"]:
    """Products of query [B, N, t, H] and key [B, s, K, H] for grouped heads, in float32."""
    batch, heads, length, size = query.shape
    query = query.reshape(batch, key.shape[2], -1, length, size)
    products = jnp.einsum(letters, query, wide(key), precision=_EXACT)
    return products.reshape(batch, heads, length, key.shape[1])
