"""Each query's table in registers, and interpolation in it.

z_b is the product of the query with row b of the table. A place is a count less 1/2; its nearest
whole number b is the row below the count, f the rest, and the bias

    middle_b + f slope_b        middle_b = (z_b + z_{b+1}) / 2,  slope_b = z_{b+1} - z_b

| form   | gathers            | middle and slope | for                        |
|--------|--------------------|------------------|----------------------------|
| exact  | two for each key   | float32          | everything                 |
| packed | two for three keys | bfloat16         | bfloat16 and P + C <= 128  |

Packed: the counts of three neighbouring keys lie within one of the middle one's, so a look-up for
the middle one serves all; the others add the kink, by which the slope changes at the next row.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Ref
from jax.experimental.pallas import tpu as pltpu

from posjax.kernels.bits import as_float, as_int, bfloat16_bits, packed_words
from posjax.kernels.tpu.plan import LANES, Plan
from posjax.kernels.tpu.registers import chunks, lane_gather, reduce_lanes, roll_lanes
from posjax.types import Array, Float, Int, Num

__all__ = ["Interpolated", "TableScratch", "fill", "look_up", "table_scratch"]

# Adding it leaves the nearest whole number in the low bits of a float32.
_ROUNDER = 1.5 * 2.0**23
# Those low bits.
_NUMBER = 2**22 - 1


class TableScratch(NamedTuple):
    """The tables of a block of queries: exact with `middle` and `slope`, packed with the others.

    Args:
        highest: the largest entry of each table.
        spread: the largest less the smallest.
        lines: middle and slope in a word.
        kinks: the slopes of the rows above and below, less that of the row, in a word.
    """

    highest: Float[Ref, "t 128"]
    spread: Float[Ref, "t 128"]
    middle: Float[Ref, "t width"] | None = None
    slope: Float[Ref, "t width"] | None = None
    lines: Int[Ref, "t width"] | None = None
    kinks: Int[Ref, "t width"] | None = None


class Interpolated(NamedTuple):
    """Bias and slope of a chunk of keys."""

    bias: Float[Array, "t 128"]
    slope: Float[Array, "t 128"]


def table_scratch(plan: Plan) -> TableScratch:
    """The memory for the tables."""
    shape = (plan.blocks.query, plan.pieces * LANES)
    row = pltpu.VMEM((plan.blocks.query, LANES), jnp.float32)
    if plan.cope.packed:
        words = pltpu.VMEM(shape, jnp.int32)
        return TableScratch(row, row, lines=words, kinks=words)
    exact = pltpu.VMEM(shape, jnp.float32)
    return TableScratch(row, row, middle=exact, slope=exact)


def fill(plan: Plan, tables: TableScratch, z: Float[Array, "t width"]) -> None:
    """Keeps what `look_up` needs."""
    width = z.shape[1]
    high = reduce_lanes(functools.reduce(jnp.maximum, chunks(z)), jnp.max)
    low = reduce_lanes(functools.reduce(jnp.minimum, chunks(z)), jnp.min)
    tables.highest[...], tables.spread[...] = high, high - low
    lane = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    slope = jnp.where(lane == width - 1, 0.0, roll_lanes(z, width - 1) - z)
    middle = z + 0.5 * slope
    if not plan.cope.packed:
        tables.middle[...], tables.slope[...] = middle, slope
        return
    slope = as_float(bfloat16_bits(slope) << 16)
    tables.lines[...] = packed_words(middle, slope)
    above, below = (roll_lanes(slope, shift) - slope for shift in (width - 1, 1))
    tables.kinks[...] = packed_words(above, below)


def look_up(
    plan: Plan,
    tables: TableScratch,
    places: list[Array],
    rows: slice,
    base: Array | float,
    slopes: bool,
) -> list[Interpolated]:
    """Bias, less `base`, and slope of every chunk of some rows of a tile.

    Args:
        slopes: whether slopes are needed; they cost an operation more.
    """
    if not plan.cope.packed:
        middle, slope = tables.middle[rows, :], tables.slope[rows, :]
        return [_exact(middle, slope, place, base) for place in places]
    lines, kinks = tables.lines[rows, :], tables.kinks[rows, :]
    results, bend = [], _bend_with_slope if slopes else _bend
    for start in range(0, len(places), 3):
        group = places[start : start + 3]
        if len(group) == 3:
            results += _triple(lines, kinks, group, base, bend)
        else:
            results += [_single(lines, place, base)[0] for place in group]
    return results


def _split(place: Float[Array, "t 128"], mask: int) -> tuple[Int[Array, "t 128"], Array]:
    """The nearest whole number, and the rest between -1/2 and 1/2."""
    index = as_int(place + _ROUNDER) & mask
    # Not place - (rounded - _ROUNDER), which XLA, if it interprets the kernel, would make 0.
    return index, place - index.astype(jnp.float32)


def _exact(
    middle: Array, slope: Array, place: Float[Array, "t 128"], base: Array | float
) -> Interpolated:
    index, rest = _split(place, _NUMBER)
    rise = _gather(slope, index)
    return Interpolated(_gather(middle, index) - base + rest * rise, rise)


def _single(
    lines: Array, place: Float[Array, "t 128"], base: Array | float
) -> tuple[Interpolated, Array, Array]:
    """One key; also its row and the middle there, less `base`."""
    index, rest = _split(place, LANES - 1)
    word = lane_gather(lines, index)
    middle, slope = as_float(word) - base, as_float(word << 16)
    return Interpolated(middle + rest * slope, slope), index, middle


def _triple(
    lines: Array, kinks: Array, places: list[Array], base: Array | float, bend: Callable
) -> list[Interpolated]:
    """A key and its neighbours, by their places, which are less than 1 apart."""
    left, place, right = places
    center, index, middle = _single(lines, place, base)
    word, slope = lane_gather(kinks, index), center.slope
    above, below = as_float(word), as_float(word << 16)
    row = index.astype(jnp.float32)
    higher, lower = left - row, right - row
    return [
        bend(middle + higher * slope, slope, higher - 0.5, above, 1),
        center,
        bend(middle + lower * slope, slope, lower + 0.5, below, -1),
    ]


def _bend_with_slope(
    bias: Array, slope: Array, excess: Array, kink: Array, sign: int
) -> Interpolated:
    """Adds the kink if the place lies beyond it, in the next row."""
    change = jnp.where(excess > 0 if sign > 0 else excess < 0, kink, 0.0)
    return Interpolated(bias + excess * change, slope + change)


def _bend(bias: Array, slope: Array, excess: Array, kink: Array, sign: int) -> Interpolated:
    """The same bias, with one operation less; the slope stays the other row's."""
    beyond = jnp.maximum(excess, 0.0) if sign > 0 else jnp.minimum(excess, 0.0)
    return Interpolated(bias + beyond * kink, slope)


def _gather(table: Num[Array, "t width"], index: Int[Array, "t 128"]) -> Num[Array, "t 128"]:
    """table[row, index[row, lane]] for tables of several registers."""
    parts = chunks(table)
    if len(parts) == 1:
        return lane_gather(table, index)
    lane, piece = index & (LANES - 1), index >> 7
    entries = lane_gather(parts[0], lane)
    for number, part in enumerate(parts[1:], start=1):
        entries = jnp.where(piece == number, lane_gather(part, lane), entries)
    return entries
