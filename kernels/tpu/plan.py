"""What the kernels know when they are compiled, and which blocks they walk over."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from posjax.kernels.blocks import TpuBlocks
from posjax.masks import Mask
from posjax.types import Array, Int

__all__ = [
    "LANES",
    "LN2",
    "LOG2E",
    "Contextual",
    "Plan",
    "Ranges",
    "Span",
    "interleave",
    "walk_ranges",
]

# Lanes of a vector register.
LANES = 128
LN2 = 0.6931471805599453
LOG2E = 1 / LN2


@dataclasses.dataclass(frozen=True)
class Contextual:
    """The static part of a contextual bias.

    `positions` is P; `gate_scale` multiplies products of query and (gate) key; `packed` is the form
    of the tables, see `tables`; `newton` that of the gates, see `counting.gate`.
    """

    positions: int
    gate_scale: float
    packed: bool
    newton: bool
    own_gate_key: bool
    gate_bias: bool

    @property
    def last(self) -> float:
        """The count from which on the bias is 0."""
        return float(self.positions - 1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call; arrays are padded to whole blocks.

    `queries` is the number of real queries; those behind it are padding. `relative` tells whether
    there is a bias of the distance, see `relative`.
    """

    scale: float
    blocks: TpuBlocks
    queries: int
    is_causal: bool
    window: tuple[int, int] | None
    segments: bool
    contextual: Contextual | None
    relative: bool = False

    @property
    def restricted(self) -> bool:
        """Whether some query may not attend to some key."""
        return self.is_causal or self.window is not None or self.segments

    @property
    def row_groups(self) -> list[slice]:
        """Some queries at a time, so that what is computed for them stays in registers."""
        size, rows = self.blocks.rows or self.blocks.query, self.blocks.query
        return [slice(start, start + size) for start in range(0, rows, size)]

    @property
    def chunks(self) -> int:
        """C: vector registers side by side in a block of keys."""
        return self.blocks.key // LANES

    @property
    def pieces(self) -> int:
        """Vector registers side by side that hold a query's table: at least P + C entries."""
        return -(-(self.contextual.positions + self.chunks) // LANES)


def interleave(x: Array, axis: int, plan: Plan) -> Array:
    """Keys in the kernels' order: in a block, lane l of chunk c holds key l * C + c.

    Neighbours in the sequence then lie in the same lane of different registers, and a running sum
    over them is an addition of registers. Attention does not mind the order of keys.

    >>> from posjax.kernels.blocks import TpuBlocks
    >>> plan = Plan(1.0, TpuBlocks(128, 256), 1, True, None, False, None)
    >>> interleave(jnp.arange(256), 0, plan)[jnp.array([0, 1, 128, 129])].tolist()
    [0, 2, 1, 3]
    """
    axis %= x.ndim
    shape = x.shape
    split = (*shape[:axis], -1, LANES, plan.chunks, *shape[axis + 1 :])
    return jnp.swapaxes(x.reshape(split), axis + 1, axis + 2).reshape(shape)


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


def walk_ranges(mask: Mask, plan: Plan) -> Ranges:
    """The ranges of every block of queries; one row for all of a batch where all are alike."""
    seen, full = mask.blocks_seen(plan.blocks.query, plan.blocks.key)
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
