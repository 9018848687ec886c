"""Which blocks of keys each block of queries walks over."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from posjax.masks import Mask
from posjax.types import Array, Int

__all__ = ["Ranges", "Span", "walk_ranges"]


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
