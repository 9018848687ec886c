"""Each query's table in registers, and interpolation in it.

z_b is the product of the query with row b of the table. A place is a count less 1/2; its nearest
whole number b is the row below the count, f the rest, and the bias

    middle_b + f slope_b        middle_b = (z_b + z_{b+1}) / 2,  slope_b = z_{b+1} - z_b

| form   | gathers            | middle and slope | for                        |
|--------|--------------------|------------------|----------------------------|
| exact  | two for each key   | float32          | everything                 |
| packed | two for three keys | bfloat16         | bfloat16 and P + C <= 128  |

Packed: the counts of three neighbouring keys lie within one of the middle one's, so a look-up for
the middle one serves all; the others add what the slope changes by at the next row.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from posjax.kernels.bits import as_float, as_int, bfloat16_bits, packed_words
from posjax.kernels.tpu.plan import LANES, Plan
from posjax.kernels.tpu.registers import chunks, lane_gather, over_lanes, rolled
from posjax.types import Array, Float, Int, Num

__all__ = ["Found", "fill", "look_up", "scratch_shapes"]

# Adding it leaves the nearest whole number in the low bits of a float32.
_ROUNDER = 1.5 * 2.0**23
# Those low bits.
_NUMBER = 2**22 - 1


class Found(NamedTuple):
    """Bias and slope of a chunk of keys."""

    bias: Float[Array, "t 128"]
    slope: Float[Array, "t 128"]


def scratch_shapes(plan: Plan) -> dict:
    """Where `fill` keeps the tables of a block of queries."""
    shape = (plan.blocks.query, plan.pieces * LANES)
    names = ("word", "kinks") if plan.contextual.packed else ("middle", "slope")
    dtype = jnp.int32 if plan.contextual.packed else jnp.float32
    one = pltpu.VMEM((plan.blocks.query, LANES), jnp.float32)
    return dict.fromkeys(names, pltpu.VMEM(shape, dtype)) | {"highest": one, "spread": one}


def fill(plan: Plan, scratch: dict, z: Float[Array, "t width"]) -> None:
    """Keeps what `look_up` needs."""
    width = z.shape[1]
    high, low = (
        over_lanes(functools.reduce(how, chunks(z)), reduce)
        for how, reduce in ((jnp.maximum, jnp.max), (jnp.minimum, jnp.min))
    )
    scratch["highest"][...], scratch["spread"][...] = high, high - low
    lane = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    slope = jnp.where(lane == width - 1, 0.0, rolled(z, width - 1) - z)
    middle = z + 0.5 * slope
    if not plan.contextual.packed:
        scratch["middle"][...], scratch["slope"][...] = middle, slope
        return
    slope = as_float(bfloat16_bits(slope) << 16)
    scratch["word"][...] = packed_words(middle, slope)
    above, below = (rolled(slope, shift) - slope for shift in (width - 1, 1))
    scratch["kinks"][...] = packed_words(above, below)


def look_up(
    plan: Plan,
    scratch: dict,
    places: list[Array],
    rows: slice,
    base: Array | float,
    slopes: bool,
) -> list[Found]:
    """Bias, less `base`, and slope of every chunk of some rows of a tile.

    Args:
        slopes: whether slopes are wanted, for which another way is shorter.
    """
    if not plan.contextual.packed:
        middle, slope = scratch["middle"][rows, :], scratch["slope"][rows, :]
        return [_exact(middle, slope, place, base) for place in places]
    word, kinks = scratch["word"][rows, :], scratch["kinks"][rows, :]
    found, beyond = [], _with_slopes if slopes else _without_slopes
    for start in range(0, len(places), 3):
        group = slice(start, start + 3)
        if len(places[group]) == 3:
            found += _triple(word, kinks, places[group], base, beyond)
        else:
            found += [_single(word, place, base)[0] for place in places[group]]
    return found


def _split(place: Float[Array, "t 128"], mask: int) -> tuple[Int[Array, "t 128"], Array]:
    """The nearest whole number, and the rest between -1/2 and 1/2."""
    index = as_int(place + _ROUNDER) & mask
    # Not place - (rounded - _ROUNDER), which XLA, where it stands in for a TPU, would make 0.
    return index, place - index.astype(jnp.float32)


def _exact(middle: Array, slope: Array, place: Float[Array, "t 128"], base: Array | float) -> Found:
    index, rest = _split(place, _NUMBER)
    rise = _gather(slope, index)
    return Found(_gather(middle, index) - base + rest * rise, rise)


def _single(
    word: Array, place: Float[Array, "t 128"], base: Array | float
) -> tuple[Found, Array, Array]:
    """One key; also its row and the middle there, less `base`."""
    index, rest = _split(place, LANES - 1)
    both = lane_gather(word, index)
    middle, slope = as_float(both) - base, as_float(both << 16)
    return Found(middle + rest * slope, slope), index, middle


def _triple(
    word: Array, kinks: Array, places: list[Array], base: Array | float, beyond: Callable
) -> list[Found]:
    """A key and its neighbours, by their places, which are less than 1 apart."""
    left, place, right = places
    center, index, middle = _single(word, place, base)
    both, slope = lane_gather(kinks, index), center.slope
    above, below = as_float(both), as_float(both << 16)
    row = index.astype(jnp.float32)
    higher, lower = left - row, right - row
    return [
        beyond(middle + higher * slope, slope, higher - 0.5, above, 1),
        center,
        beyond(middle + lower * slope, slope, lower + 0.5, below, -1),
    ]


def _with_slopes(bias: Array, slope: Array, excess: Array, kink: Array, sign: int) -> Found:
    """What the slope changes by from the next row on, if the place lies there."""
    bend = jnp.where(excess > 0 if sign > 0 else excess < 0, kink, 0.0)
    return Found(bias + excess * bend, slope + bend)


def _without_slopes(bias: Array, slope: Array, excess: Array, kink: Array, sign: int) -> Found:
    """The same bias, with one operation less; the slope is the wrong one there."""
    inside = jnp.maximum(excess, 0.0) if sign > 0 else jnp.minimum(excess, 0.0)
    return Found(bias + inside * kink, slope)


def _gather(table: Num[Array, "t width"], index: Int[Array, "t 128"]) -> Num[Array, "t 128"]:
    """table[row, index[row, lane]] for tables of several registers."""
    parts = chunks(table)
    if len(parts) == 1:
        return lane_gather(table, index)
    lane, piece = index & (LANES - 1), index >> 7
    found = lane_gather(parts[0], lane)
    for number, part in enumerate(parts[1:], start=1):
        found = jnp.where(piece == number, lane_gather(part, lane), found)
    return found
