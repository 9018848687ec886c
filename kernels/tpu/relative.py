"""Biases that depend on the distance alone, in tiles: ALiBi, T5, KERPLE, ...

If positions rise by one from token to token, a tile's bias is constant along its diagonals. With
keys interleaved (see `plan.interleave`) a tile needs few numbers: chunk c of it is a window of

    band[w, l] = bias at distance  w - C l + a constant of the tile          rows C - 1 - c, ...

so one array of t + C rows and one register's width holds the whole tile of t x 128 C, and a chunk
costs a load and an addition. Rows of the band that are C apart are the same numbers moved by one
lane, so the bands of all tiles are cut out of one small array of all distances,

    strips[p, x] = bias at distance  p + 1 - C x + a constant                C rows

which XLA makes from the bias's function; the gradient of the strips goes back to it.
"""

import jax
import jax.numpy as jnp
from jax import Ref
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.biases.relative import RelativeBias
from posjax.kernels.blocks import TpuBlocks
from posjax.kernels.common import LN2
from posjax.kernels.distances import by_distance
from posjax.kernels.tpu.plan import LANES, Plan
from posjax.kernels.tpu.registers import chunks, join, roll_lanes
from posjax.masks import Mask
from posjax.types import Array, Float, Int

__all__ = [
    "add_band",
    "add_strips_gradient",
    "band_scratch",
    "collect_band_gradient",
    "fill_band",
    "fits",
    "strips",
]

# Registers of the strips that a band is cut out of.
_CUT = 3 * LANES


def fits(blocks: TpuBlocks) -> bool:
    """Whether a band of these blocks can be cut out of three registers."""
    return blocks.query % (blocks.key // LANES) == 0 and blocks.query <= blocks.key


def strips(
    biases: list[RelativeBias], mask: Mask, plan: Plan, queries: int, keys: int
) -> Float[Array, "#B #N C x"]:
    """The sum of the biases at all distances, in units of ln 2.

    Args:
        mask: of the real tokens, for their positions.
        queries: number of queries with padding; `keys` likewise.
    """
    count = plan.chunks
    width = -(-(queries + keys) // count // LANES) * LANES + _CUT - LANES
    row, lane = jnp.arange(count)[:, None], jnp.arange(width)[None, :]
    places = queries - count * (1 + lane) + row + 1
    bias = by_distance(biases, mask, places.reshape(-1))
    return bias.reshape(*bias.shape[:2], count, width)


def band_scratch(plan: Plan) -> pl.MemoryRef:
    """The memory for the band of a tile, or for its gradient."""
    return pltpu.VMEM((plan.blocks.query + plan.chunks, LANES), jnp.float32)


def _cut(plan: Plan, blocks_after: Array, index: Array) -> tuple[pl.Slice, Array]:
    """The strips' lanes that a tile needs, and how many of them lie before the tile's first.

    Args:
        blocks_after: blocks of queries behind the tile's.
        index: number of the tile's block of keys.
    """
    first = plan.blocks.query // plan.chunks * blocks_after + LANES * index
    start = pl.multiple_of(first // LANES * LANES, LANES)
    return pl.ds(start, _CUT), first % LANES


def fill_band(
    plan: Plan,
    strips: Float[Ref, "C x"],
    band: Float[Ref, "band 128"],
    blocks_after: Array,
    index: Array,
) -> None:
    """Cuts out the band of a tile."""
    lanes, shift = _cut(plan, blocks_after, index)
    low, high, _ = chunks(roll_lanes(strips[:, lanes], (_CUT - shift) % _CUT))
    lane = jax.lax.broadcasted_iota(jnp.int32, low.shape, 1)

    def moved(offset: int) -> Array:
        if offset == 0 or offset == LANES:
            return high if offset else low
        parts = (roll_lanes(x, LANES - offset) for x in (low, high))
        return jnp.where(lane < LANES - offset, *parts)

    band[...] = jnp.concatenate([moved(offset) for _, offset in _groups(plan)])


def _groups(plan: Plan) -> list[tuple[slice, int]]:
    """Each C rows of a band, and the lane of the cut at which they begin."""
    count, groups = plan.chunks, plan.blocks.query // plan.chunks + 1
    return [(slice(m * count, (m + 1) * count), groups - 1 - m) for m in range(groups)]


def _windows(plan: Plan) -> list[slice]:
    """The rows of the band that belong to each chunk."""
    count, rows = plan.chunks, plan.blocks.query
    return [slice(count - 1 - c, count - 1 - c + rows) for c in range(count)]


def add_band(
    plan: Plan, band: Float[Ref, "band 128"], logits: list[Float[Array, "t 128"]]
) -> list[Float[Array, "t 128"]]:
    """Logits, in units of ln 2, with the bias of the band."""
    return [x + band[rows, :] for x, rows in zip(logits, _windows(plan), strict=True)]


def collect_band_gradient(
    plan: Plan, dband: Float[Ref, "band 128"], dlogits: list[Float[Array, "t 128"]]
) -> None:
    """Makes the gradient of the band from that of the tile's logits."""
    dband[...] = jnp.zeros(dband.shape, jnp.float32)
    for x, rows in zip(dlogits, _windows(plan), strict=True):
        dband[rows, :] += x


def add_strips_gradient(
    plan: Plan,
    dband: Float[Ref, "band 128"],
    dstrips,
    blocks_after: Array,
    index: Int[Array, ""],
) -> None:
    """Adds the gradient of the band to that of the strips, from which `fill_band` cut it.

    Args:
        dstrips: a reference to [C, x].
    """
    low = jnp.zeros((plan.chunks, LANES), jnp.float32)
    high, lane = low, jax.lax.broadcasted_iota(jnp.int32, low.shape, 1)
    gradient = dband[...]
    for rows, offset in _groups(plan):
        part = gradient[rows]
        if offset == 0 or offset == LANES:
            low, high = (low, high + part) if offset else (low + part, high)
            continue
        moved = roll_lanes(part, offset)
        low = low + jnp.where(lane >= offset, moved, 0.0)
        high = high + jnp.where(lane < offset, moved, 0.0)
    lanes, shift = _cut(plan, blocks_after, index)
    whole = join([low, high, jnp.zeros_like(low)])
    dstrips[:, lanes] += roll_lanes(whole, shift) * LN2
