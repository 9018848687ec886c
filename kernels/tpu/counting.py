"""Counts of Contextual Position Encoding and the gradient of its table, on registers.

Keys are interleaved: chunk c of a tile holds, in lane l, key l * C + c. Counts p grow leftwards, so
within a lane they fall from the first chunk to the last, and lanes follow each other. Everything
here is about the place p - `PLACE_OFFSET`, whose nearest whole number is the row of the table below
p. "Behind" a lane are the lanes with higher numbers, which hold keys further to the right.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.kernels.tpu.plan import LANES
from posjax.kernels.tpu.registers import (
    first_lane,
    join,
    lane_gather,
    last_lane,
    matmul,
    roll_lanes,
    sum_chunks,
)
from posjax.types import Array, Float, Int, Num

__all__ = [
    "PLACE_OFFSET",
    "LaneMoments",
    "crossings",
    "exclusive_sum",
    "gate",
    "lane_ramp_sum",
    "places",
    "prefix_sums",
    "ramp_sums",
    "second_differences",
    "triangle",
]

# Count less place.
PLACE_OFFSET = 0.5
# jax 0.11 has moved it.
_reciprocal = pltpu.reciprocal if hasattr(pltpu, "reciprocal") else pl.reciprocal
# 2^-64 is a gate that counts nothing, and 2^64 has a reciprocal.
_SURELY_CLOSED = 64.0


def gate(exponent: Float[Array, "t 128"], newton: bool) -> Float[Array, "t 128"]:
    """sigmoid(x), from -x in units of ln 2.

    Args:
        newton: improve the chip's approximate reciprocal by one step instead of dividing.
    """
    if not newton:
        return 1.0 / (1.0 + jnp.exp2(exponent))
    denominator = 1.0 + jnp.exp2(jnp.minimum(exponent, _SURELY_CLOSED))
    guess = _reciprocal(denominator, approx=True)
    return guess * (2.0 - denominator * guess)


def triangle(ahead: bool = False) -> Num[Array, "128 128"]:
    """The matrix by which `exclusive_sum` adds up the lanes behind each lane.

    Args:
        ahead: the lanes before it instead.
    """
    ones = jnp.ones((LANES, LANES), jnp.bfloat16)
    return jnp.triu(ones, 1) if ahead else jnp.tril(ones, -1)


def exclusive_sum(
    x: Float[Array, "t 128"], triangle: Num[Array, "128 128"]
) -> Float[Array, "t 128"]:
    """The sum of the lanes behind (or before) each lane, exact to float32.

    x is a sum of three of bfloat16, each with a product of its own, because small parts would be
    lost in the running sum of large ones.
    """
    high = _upper_half(x)
    middle = _upper_half(x - high)
    low = (x - high) - middle
    sums = [matmul(part.astype(jnp.bfloat16), triangle) for part in (low, middle, high)]
    return (sums[0] + sums[1]) + sums[2]


def _upper_half(x: Float[Array, "t 128"]) -> Float[Array, "t 128"]:
    """A number without its lower 16 bits: one that bfloat16 holds."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & -(2**16)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def places(
    gates: list[Float[Array, "t 128"]],
    carry: Float[Array, "t 128"],
    lower: Num[Array, "128 128"],
    last: float,
) -> tuple[list[Float[Array, "t 128"]], Float[Array, "t 128"]]:
    """The place at each key, and the carry for the tile on the left.

    The count behind a lane is cut at `last`, from where on the table is 0; the lane's own C gates
    are not, so a place is below last + C.
    """
    total = sum_chunks(gates)
    behind = jnp.minimum(carry + exclusive_sum(total, lower), last)
    sums, running = [], behind
    for one in reversed(gates):
        running = running + one
        sums.append(running)
    return sums[::-1], first_lane(running)


def prefix_sums(
    x: list[Float[Array, "t 128"]], carry: Float[Array, "t 128"], upper: Num[Array, "128 128"]
) -> tuple[list[Float[Array, "t 128"]], Float[Array, "t 128"]]:
    """Sums over the keys up to and with each key, and the carry for the tile on the right."""
    total = sum_chunks(x)
    running = carry + exclusive_sum(total, upper)
    sums = []
    for one in x:
        running = running + one
        sums.append(running)
    return sums, last_lane(running)


class LaneMoments(NamedTuple):
    """Sums over each lane's keys, from which `ramp_sums` are made.

    Args:
        total: sum of the weights.
        moment: sum of weight * place.
        lowest: the lowest place, the last chunk's.
        ramp_sum: for the m-th whole number b above `lowest`, the sum of weight * max(count - b, 0).
    """

    total: Float[Array, "t 128"]
    moment: Float[Array, "t 128"]
    lowest: Float[Array, "t 128"]
    ramp_sum: Callable[[int | Array], Array]

    @classmethod
    def of(cls, place: list[Array], weight: list[Array]) -> "LaneMoments":
        """The sums of whole tiles."""
        moment = sum_chunks([w * p for w, p in zip(weight, place, strict=True)])
        ramp_sum = functools.partial(lane_ramp_sum, place, weight)
        return cls(sum_chunks(weight), moment, place[-1], ramp_sum)


def lane_ramp_sum(
    place: list[Float[Array, "t 128"]], weight: list[Float[Array, "t 128"]], rank: int | Array
) -> Float[Array, "t 128"]:
    """`LaneMoments.ramp_sum` for whole number `rank`."""
    edge = _edge_above(place[-1]) + jnp.float32(rank)
    return sum_chunks([w * jnp.maximum(p - edge, 0.0) for w, p in zip(weight, place, strict=True)])


def ramp_sums(
    lanes: LaneMoments, upper: Num[Array, "128 128"], pieces: int, times: int | Int[Array, ""]
) -> Float[Array, "t width"]:
    """Sum over keys of weight * max(count - b, 0), for b = 0 ... width - 1.

    Counts fall along the lanes, so for each b the lanes before one lane lie above b as a whole and
    those behind it below: a binary search finds it, prefix sums give the former. Its own C keys
    hold at most C whole numbers, mostly one: each lane's sum for its m-th whole number is found for
    m = 0 ... times - 1. Nothing is scattered.

    Args:
        times: at least `crossings`.
    """
    total, moment, last = lanes.total, lanes.moment, lanes.lowest
    total_before, moment_before = exclusive_sum(total, upper), exclusive_sum(moment, upper)
    lane = jax.lax.broadcasted_iota(jnp.int32, total.shape, 1)
    lowest = _edge_above(last)
    edges = [lane.astype(jnp.float32) + (piece * LANES - PLACE_OFFSET) for piece in range(pieces)]
    split = [_first_lane_below(last, edge) for edge in edges]
    sums = [
        lane_gather(moment_before, at) - edge * lane_gather(total_before, at)
        for at, edge in zip(split, edges, strict=True)
    ]
    # If all lanes lie above b, the last one, too, counts as a whole.
    whole = last_lane(moment), last_lane(total), last_lane(last)
    sums = [
        s + jnp.where(edge <= whole[2], whole[0] - edge * whole[1], 0.0)
        for s, edge in zip(sums, edges, strict=True)
    ]
    # The rank of each b among its lane's whole numbers; none if all lanes lie above it.
    ranks = [
        jnp.where(edge <= whole[2], -1.0, edge - lane_gather(lowest, at))
        for at, edge in zip(split, edges, strict=True)
    ]

    def add_split_lane(rank, sums):
        ramp_sum = lanes.ramp_sum(rank)
        return tuple(
            s + jnp.where(mine == jnp.float32(rank), lane_gather(ramp_sum, at), 0.0)
            for s, mine, at in zip(sums, ranks, split, strict=True)
        )

    if isinstance(times, int):
        for rank in range(times):
            sums = add_split_lane(rank, sums)
    else:
        sums = jax.lax.fori_loop(0, times, add_split_lane, tuple(sums))
    return join(list(sums))


def crossings(
    highest: Float[Array, "t 128"], lowest: Float[Array, "t 128"], last: float
) -> Int[Array, ""]:
    """The most whole numbers up to `last` that the counts of any lane pass."""
    return jnp.max(jnp.ceil(jnp.minimum(highest, last) - _edge_above(lowest))).astype(jnp.int32)


def _edge_above(place: Float[Array, "t 128"]) -> Float[Array, "t 128"]:
    """The first place at or above this one whose count is a whole number."""
    return jnp.ceil(place + PLACE_OFFSET) - PLACE_OFFSET


def _first_lane_below(
    falling: Float[Array, "t 128"], edge: Float[Array, "t 128"]
) -> Int[Array, "t 128"]:
    """The number of lanes of `falling`, without the last one, at or above each edge."""
    count = jnp.zeros(edge.shape, jnp.int32)
    for step in (64, 32, 16, 8, 4, 2, 1):
        at = lane_gather(falling, count + (step - 1))
        count = jnp.where(at >= edge, count + step, count)
    return count


def second_differences(
    ramps: Float[Array, "t width"], total: Float[Array, "t 128"], positions: int
) -> Float[Array, "t width"]:
    """The weight that falls on each entry of the table except the last, which is 0 by definition.

    Args:
        ramps: the sums of `ramp_sums`.
        total: the sum of all weights, equal in all lanes.
    """
    width = ramps.shape[1]
    lane = jax.lax.broadcasted_iota(jnp.int32, ramps.shape, 1)
    first = join([total] * (width // LANES)) + ramps
    before = jnp.where(lane == 0, first, roll_lanes(ramps, 1))
    after = roll_lanes(ramps, width - 1)
    return jnp.where(lane < positions - 1, before - 2 * ramps + after, 0.0)
