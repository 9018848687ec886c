"""Who may attend to whom, as data.

Any block of the [T, S] matrix can be read from the description. True always means: may attend.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax.axes import Lettered, block_of, padded
from posjax.types import Array, Bool, Int

__all__ = ["Mask", "Ranges", "Span", "Tokens", "walk_ranges"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens(Lettered):
    """The queries or the keys, as a mask sees them: T of them.

    `valid` tells real tokens from padding that a blockwise implementation added.
    """

    positions: Int[Array, "#B T"]
    segment_ids: Int[Array, "#B T"] | None = None
    valid: Bool[Array, "#B T"] | None = None

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.positions.shape[1]

    def pad(self, amount: int) -> "Tokens":
        """Appends `amount` invalid tokens and marks the others valid."""
        width = ((0, 0), (0, amount))
        valid = self.valid if self.valid is not None else jnp.ones((1, self.length), bool)
        segment_ids = (
            None if self.segment_ids is None else jnp.pad(self.segment_ids, width, mode="edge")
        )
        return Tokens(
            jnp.pad(self.positions, width, mode="edge"), segment_ids, jnp.pad(valid, width)
        )

    def block(self, start: Int[Array, ""] | int, size: int) -> "Tokens":
        """The `size` tokens from `start` on."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask(Lettered):
    """All restrictions of one attention call; they hold together (logical and).

    Args:
        query: positions and segments of the queries.
        key: positions and segments of the keys.
        array: an explicit mask, or None.
        is_causal: a key is seen only from its own position on (key position <= query position).
        window: (left, right), the farthest key positions seen before and after the query position;
            None: no limit.
        has_given_positions: whether the caller gave positions, which may then be any.
    """

    query: Tokens
    key: Tokens
    array: Bool[Array, "#B #N #T #S"] | None = None
    is_causal: bool = dataclasses.field(default=False, metadata={"static": True})
    window: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})
    has_given_positions: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def is_trivial(self) -> bool:
        """True when every query may attend to every key."""
        parts = (self.array, self.query.segment_ids, self.window, self.query.valid, self.key.valid)
        return not self.is_causal and all(part is None for part in parts)

    def dense(self) -> Bool[Array, "#B #N #T #S"]:
        """The mask as one array."""
        query, key = self.query, self.key
        distance = query.positions[:, :, None] - key.positions[:, None, :]
        allowed = jnp.ones((1, query.length, key.length), bool)
        if self.is_causal:
            allowed &= distance >= 0
        if self.window is not None:
            allowed &= (distance <= self.window[0]) & (distance >= -self.window[1])
        if query.segment_ids is not None and key.segment_ids is not None:
            allowed &= query.segment_ids[:, :, None] == key.segment_ids[:, None, :]
        if query.valid is not None:
            allowed &= query.valid[:, :, None]
        if key.valid is not None:
            allowed &= key.valid[:, None, :]
        allowed = allowed[:, None]
        return allowed if self.array is None else allowed & self.array

    def pad(self, queries: int, keys: int) -> "Mask":
        """The mask with invalid queries and keys appended."""
        array = self._array_by(padded, {"T": queries, "S": keys})
        return dataclasses.replace(
            self, query=self.query.pad(queries), key=self.key.pad(keys), array=array
        )

    def block(
        self, query_start: Int[Array, ""], query_size: int, key_start: Int[Array, ""], key_size: int
    ) -> "Mask":
        """The same restrictions between `query_size` queries and `key_size` keys."""
        where = {"T": (query_start, query_size), "S": (key_start, key_size)}
        array = self._array_by(block_of, where)
        query = self.query.block(query_start, query_size)
        key = self.key.block(key_start, key_size)
        return dataclasses.replace(self, query=query, key=key, array=array)

    def _array_by(self, function: Callable[..., Array], where: Any) -> Array | None:
        """The explicit mask, if there is one, changed along those of its axes that are not 1."""
        if self.array is None:
            return None
        return function(self.letters_of("array", self.array.shape), self.array, where)

    def block_range(
        self, block_q: int, block_k: int
    ) -> tuple[Int[Array, "blocks"], Int[Array, "blocks"]]:
        """First and last block of keys that each block of queries can see at all.

        A bound from the smallest and largest position and segment of each block: blocks outside
        hold no visible key; a block inside may still be masked in parts. Where nothing is visible,
        first > last.
        """
        seen = jnp.any(self.blocks_seen(block_q, block_k)[0], axis=0)
        count = seen.shape[1]
        first = jnp.where(jnp.any(seen, axis=1), jnp.argmax(seen, axis=1), 1)
        last = jnp.where(jnp.any(seen, axis=1), count - 1 - jnp.argmax(seen[:, ::-1], axis=1), 0)
        return first.astype(jnp.int32), last.astype(jnp.int32)

    def blocks_seen(
        self, block_q: int, block_k: int
    ) -> tuple[Bool[Array, "#B blocks_q blocks_k"], Bool[Array, "#B blocks_q blocks_k"]]:
        """Which blocks hold a visible pair (an upper bound), and which surely hold only such."""
        query_low, query_high = _block_bounds(self.query.positions, block_q)
        key_low, key_high = _block_bounds(self.key.positions, block_k)
        nearest = query_low[:, :, None] - key_high[:, None, :]
        farthest = query_high[:, :, None] - key_low[:, None, :]
        hidden = (self.array, self.query.valid, self.key.valid)
        seen = jnp.ones_like(nearest, dtype=bool)
        full = seen & all(part is None for part in hidden)
        if self.is_causal:
            seen, full = seen & (farthest >= 0), full & (nearest >= 0)
        if self.window is not None:
            left, right = self.window
            seen &= (nearest <= left) & (farthest >= -right)
            full &= (farthest <= left) & (nearest >= -right)
        if self.query.segment_ids is not None and self.key.segment_ids is not None:
            query_low, query_high = _block_bounds(self.query.segment_ids, block_q)
            key_low, key_high = _block_bounds(self.key.segment_ids, block_k)
            low = jnp.maximum(query_low[:, :, None], key_low[:, None, :])
            high = jnp.minimum(query_high[:, :, None], key_high[:, None, :])
            alike = (query_low == query_high)[:, :, None] & (key_low == key_high)[:, None, :]
            seen, full = seen & (low <= high), full & alike & (low == high)
        return seen, full


class Span(NamedTuple):
    """The blocks of keys that one block of queries walks over, from `last` leftwards to `first`.

    Those from full_first to full_last are visible as a whole, others may be masked in parts. Where
    none is full, full_last is first - 1 and full_first is first; where none is visible, last is
    first - 1.
    """

    first: Int[Array, ""]
    full_first: Int[Array, ""]
    full_last: Int[Array, ""]
    last: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Ranges:
    """The spans of all blocks of queries, in one flat array."""

    flat: Int[Array, "numbers"]
    batch: int
    blocks: int

    def span(self, numbers, batch: Int[Array, ""], block: Int[Array, ""]) -> Span:
        """The span of a block of queries; `numbers` is where `flat` can be read."""
        row = batch if self.batch > 1 else 0
        return Span(*(numbers[(row * 4 + field) * self.blocks + block] for field in range(4)))


def walk_ranges(mask: Mask, query_size: int, key_size: int, *, of_keys: bool = False) -> Ranges:
    """The ranges of every block of queries; one row for all of a batch where all are alike.

    Lengths are multiples of the sizes of the blocks.

    Args:
        of_keys: instead the blocks of queries that see every block of keys.
    """
    seen, full = mask.blocks_seen(query_size, key_size)
    if of_keys:
        seen, full = (jnp.swapaxes(x, 1, 2) for x in (seen, full))
    any_seen, count = jnp.any(seen, axis=2), seen.shape[2]
    first = jnp.where(any_seen, jnp.argmax(seen, axis=2), 1)
    last = jnp.where(any_seen, count - 1 - jnp.argmax(seen[:, :, ::-1], axis=2), 0)
    index = jnp.arange(count)[None, None, :]
    full_last = jnp.max(jnp.where(full, index, -1), axis=2)
    # The run of full blocks that ends there begins behind the last block that is not full.
    broken = jnp.where(full | (index > full_last[:, :, None]), -1, index)
    full_first = jnp.max(broken, axis=2) + 1
    none = full_last < 0
    full_first, full_last = (
        jnp.where(none, first, full_first),
        jnp.where(none, first - 1, full_last),
    )
    stacked = jnp.stack([first, full_first, full_last, last], axis=1).astype(jnp.int32)
    return Ranges(stacked.reshape(-1), stacked.shape[0], stacked.shape[2])


def _block_bounds(
    values: Int[Array, "#B T"], size: int
) -> tuple[Int[Array, "#B blocks"], Int[Array, "#B blocks"]]:
    """Smallest and largest value of each block of `size` tokens."""
    blocks = values.reshape(values.shape[0], -1, size)
    return blocks.min(axis=-1), blocks.max(axis=-1)
