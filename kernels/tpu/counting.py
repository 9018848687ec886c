"""Tile mathematics of Contextual Position Encoding on registers.

Keys are interleaved: chunk c of a tile holds, in lane l, key l * C + c. Counts p grow leftwards, so
within a lane they fall from the first chunk to the last, and lanes follow each other. Everything
here is about p - 1/2, called `place`: its nearest whole number is the row of the table below p.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from posjax.kernels.tpu.plan import LANES
from posjax.kernels.tpu.registers import added, chunks, join, matmul
from posjax.types import Array, Float, Int, Num

__all__ = [
    "HALF",
    "Found",
    "exclusive",
    "gate",
    "hinges",
    "look_up",
    "midpoints",
    "places",
    "prefixes",
    "second_differences",
    "triangle",
]

HALF = 0.5
# Adding it leaves the nearest whole number in the low bits of a float32.
_ROUNDER = 1.5 * 2.0**23
# Those low bits.
_NUMBER = 2**22 - 1


def gate(exponent: Float[Array, "t 128"]) -> Float[Array, "t 128"]:
    """sigmoid(x), from -x in units of ln 2."""
    return 1.0 / (1.0 + jnp.exp2(exponent))


def triangle() -> Num[Array, "128 128"]:
    """What lanes are multiplied by to give, in each lane, the sum of the lanes behind it."""
    return jnp.tril(jnp.ones((LANES, LANES), jnp.bfloat16), -1)


def exclusive(x: Float[Array, "t 128"], lower: Num[Array, "128 128"]) -> Float[Array, "t 128"]:
    """The sum of the lanes behind each lane, to float32: x in three parts of bfloat16."""
    high = x.astype(jnp.bfloat16)
    rest = x - high.astype(jnp.float32)
    middle = rest.astype(jnp.bfloat16)
    low = (rest - middle.astype(jnp.float32)).astype(jnp.bfloat16)
    return matmul(low, lower) + matmul(middle, lower) + matmul(high, lower)


def places(
    gates: list[Float[Array, "t 128"]],
    carry: Float[Array, "t 128"],
    lower: Num[Array, "128 128"],
    last: float,
) -> tuple[list[Float[Array, "t 128"]], Float[Array, "t 128"]]:
    """Count - 1/2 at each key, and the carry for the tile on the left.

    What has been counted behind a lane is cut at `last`, from where on the table is 0; the lane's
    own C gates are not, so a place is below last + C.
    """
    total = added(gates)
    behind = jnp.minimum(carry + exclusive(total, lower), last)
    found, running = [], behind
    for one in reversed(gates):
        running = running + one
        found.append(running)
    first_lane = jnp.broadcast_to(running[:, :1], running.shape)
    return found[::-1], first_lane


def prefixes(
    x: list[Float[Array, "t 128"]], carry: Float[Array, "t 128"], upper: Num[Array, "128 128"]
) -> tuple[list[Float[Array, "t 128"]], Float[Array, "t 128"]]:
    """Sums over the keys up to and with each key, and the carry for the tile on the right."""
    total = added(x)
    running = carry + exclusive(total, upper)
    found = []
    for one in x:
        running = running + one
        found.append(running)
    return found, jnp.broadcast_to(running[:, LANES - 1 :], running.shape)


class Found(NamedTuple):
    """Bias and slope of a chunk of keys."""

    bias: Float[Array, "t 128"]
    slope: Float[Array, "t 128"]


def midpoints(z: Float[Array, "t width"]) -> tuple[Array, Array]:
    """Midpoints and slopes between neighbouring entries of each query's table."""
    width = z.shape[1]
    following = _rolled(z, width - 1)
    lane = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    slope = jnp.where(lane == width - 1, 0.0, following - z)
    return z + HALF * slope, slope


def look_up(middle: Array, slope: Array, place: Float[Array, "t 128"]) -> Found:
    """Linear interpolation in each query's table."""
    bits = jax.lax.bitcast_convert_type(place + _ROUNDER, jnp.int32)
    index = bits & (middle.shape[1] - 1 if middle.shape[1] == LANES else _NUMBER)
    # Not place - (rounded - _ROUNDER), which XLA, where it stands in for a TPU, would make 0.
    fraction = place - index.astype(jnp.float32)
    at, rise = gather(middle, index), gather(slope, index)
    return Found(at + fraction * rise, rise)


def gather(table: Num[Array, "t width"], index: Int[Array, "t 128"]) -> Num[Array, "t 128"]:
    """table[row, index[row, lane]]."""
    parts = chunks(table)
    if len(parts) == 1:
        return _lane_gather(table, index)
    lane, piece = index & (LANES - 1), index >> 7
    found = _lane_gather(parts[0], lane)
    for number, part in enumerate(parts[1:], start=1):
        found = jnp.where(piece == number, _lane_gather(part, lane), found)
    return found


def _lane_gather(x: Num[Array, "t 128"], index: Int[Array, "t 128"]) -> Num[Array, "t 128"]:
    """As jnp.take_along_axis, which would spend operations on negative indices."""
    return jax.lax.gather(
        x,
        index[..., None],
        jax.lax.GatherDimensionNumbers(
            offset_dims=(),
            collapsed_slice_dims=(1,),
            start_index_map=(1,),
            operand_batching_dims=(0,),
            start_indices_batching_dims=(0,),
        ),
        slice_sizes=(1, 1),
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def hinges(
    place: list[Float[Array, "t 128"]],
    weight: list[Float[Array, "t 128"]],
    upper: Num[Array, "128 128"],
    pieces: int,
) -> Float[Array, "t width"]:
    """Sum over keys of weight * max(count - b, 0), for b = 0 ... width - 1.

    Counts fall along the lanes, so for each b the lanes before one lane lie above b as a whole and
    those behind it below: a binary search finds it, prefix sums give the former, and its own keys
    are looked at one by one. Nothing is scattered.
    """
    total = added(weight)
    moment = added([w * p for w, p in zip(weight, place, strict=True)])
    total_before, moment_before = exclusive(total, upper), exclusive(moment, upper)
    lane = jax.lax.broadcasted_iota(jnp.int32, total.shape, 1)
    found = []
    for piece in range(pieces):
        edge = lane.astype(jnp.float32) + (piece * LANES - HALF)
        crossing = _first_lane_below(place[-1], edge)
        inside = jnp.minimum(crossing, LANES - 1)
        before = _lane_gather(moment_before, inside) - edge * _lane_gather(total_before, inside)
        parts = [
            _lane_gather(w, inside) * jnp.maximum(_lane_gather(p, inside) - edge, 0.0)
            for w, p in zip(weight, place, strict=True)
        ]
        found.append(before + added(parts))
    return join(found)


def _first_lane_below(
    falling: Float[Array, "t 128"], edge: Float[Array, "t 128"]
) -> Int[Array, "t 128"]:
    """How many lanes of `falling` are at or above each edge."""
    count = jnp.zeros(edge.shape, jnp.int32)
    for step in (64, 32, 16, 8, 4, 2, 1):
        at = _lane_gather(falling, count + (step - 1))
        count = jnp.where(at >= edge, count + step, count)
    return count


def second_differences(
    hinge: Float[Array, "t width"], total: Float[Array, "t 128"], positions: int
) -> Float[Array, "t width"]:
    """The weight that falls on each entry of the table, but the last, which is 0 by definition.

    Args:
        hinge: the sums of `hinges`.
        total: the sum of all weights, equal in all lanes.
    """
    width = hinge.shape[1]
    lane = jax.lax.broadcasted_iota(jnp.int32, hinge.shape, 1)
    first = join([total] * (width // LANES)) + hinge
    before = jnp.where(lane == 0, first, _rolled(hinge, 1))
    after = _rolled(hinge, width - 1)
    return jnp.where(lane < positions - 1, before - 2 * hinge + after, 0.0)


def _rolled(x: Float[Array, "t width"], shift: int) -> Float[Array, "t width"]:
    """Entries moved to `shift` lanes further, in a circle."""
    return pltpu.roll(x, shift, 1)
