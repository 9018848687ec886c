"""Biases of the distance: ALiBi, T5, KERPLE, ...

Where positions rise by one from token to token, a tile's bias is constant along its diagonals. XLA
makes one array for each head from the bias's function,

    bands[j - i + T - 1] = bias of query i and key j, in units of ln 2

and the kernels fetch the piece that a tile lies on with the tile's keys. The gradient adds up the
tile's dlogits along its diagonals, without atomics: each thread writes its own partial sums, and
then adds up those of one diagonal. 64 keys further on, the next tile's first 64 diagonals are the
last 64 of this one; their sums are carried on, and every query block has a row of sums in the end.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.biases.relative import RelativeBias
from posjax.kernels.common import LN2
from posjax.kernels.distances import by_distance
from posjax.kernels.gpu import diagonals
from posjax.kernels.gpu.gradients import PAIR
from posjax.kernels.gpu.instructions import load
from posjax.kernels.gpu.plan import ROWS, Plan
from posjax.kernels.gpu.stores import store
from posjax.kernels.gpu.walk import Queries
from posjax.kernels.ranges import Ranges
from posjax.masks import Mask
from posjax.types import Array, Float

__all__ = ["clear", "gradient", "gradient_shape", "of_biases", "scratch_shapes", "send"]

# Diagonals of 64 queries and 64 keys, and one more.
_DIAGONALS = ROWS + PAIR


def of_biases(
    biases: list[RelativeBias], mask: Mask, queries: int, keys: int
) -> Float[Array, "#B #N x"]:
    """The sum of the biases at all distances.

    Args:
        mask: of the real tokens, for their positions.
        queries: number of queries with padding; `keys` likewise.
    """
    return by_distance(biases, mask, queries - 1 - jnp.arange(queries + keys))


def gradient_shape(inputs: dict[str, Array]) -> tuple[int, ...]:
    """[B, N, T / 64, S + 64]: for each 64 queries sums along the diagonals."""
    batch, length, heads, _ = inputs["query"].shape
    return batch, heads, length // ROWS, inputs["key"].shape[1] + ROWS


def scratch_shapes(groups: int) -> dict:
    """Where a warpgroup adds up diagonals, and the last sums with 0 behind them."""
    return {
        "sums": plgpu.SMEM((groups, diagonals.SUMS, diagonals.WIDTH), jnp.float32),
        "carried": plgpu.SMEM((groups, ROWS + _DIAGONALS), jnp.float32),
    }


def clear(queries: Queries) -> None:
    """No sums yet."""
    sums, carried = (queries.scratch[name].at[queries.group] for name in ("sums", "carried"))
    zeros = plgpu.layout_cast(jnp.zeros((_DIAGONALS,), jnp.float32), _layout())
    for row in range(diagonals.SUMS):
        sums[row, :_DIAGONALS] = zeros
    carried[ROWS:] = zeros
    plgpu.commit_smem()


def send(queries: Queries, index: Array) -> None:
    """Writes the sums of 64 keys, with those that were carried on, and carries on the last ones.

    What is written for the last 64 diagonals the next 64 keys write over, with their own part.
    """
    sums, carried = (queries.scratch[name].at[queries.group] for name in ("sums", "carried"))
    plgpu.commit_smem()
    total = load(carried.at[ROWS:], _layout())
    for row in range(diagonals.SUMS):
        total = total + load(sums.at[row, :_DIAGONALS], _layout())
    plgpu.commit_smem()
    batch, head, row, _ = queries.place
    where = pl.ds(index * PAIR, _DIAGONALS)
    written = queries.refs["bands_gradient"].at[batch, head, row // ROWS, where]
    for target in (carried.at[:_DIAGONALS], written):
        store(target, total, _layout(), emulated=queries.plan.emulated)


def _layout():
    """A number for each thread."""
    return plgpu.Layout.WG_STRIDED((_DIAGONALS,), vec_size=1)


def gradient(found: Float[Array, "B N m y"], ranges: Ranges, plan: Plan) -> Float[Array, "B N x"]:
    """The gradient of `of_biases`' array, from all query blocks' sums.

    Args:
        ranges: blocks of keys that each 64 queries walked over; elsewhere nothing is written.
    """
    batch, heads, blocks, width = found.shape
    spans = jnp.moveaxis(ranges.flat.reshape(ranges.batch, 4, blocks), 1, 0)[..., None]
    first, last = spans[0], spans[3]
    place = jnp.arange(width)[None, None]
    begin, end = first * plan.blocks.key, (last + 1) * plan.blocks.key + ROWS
    written = (place >= begin) & (place < end) & (first <= last)
    rows = jnp.where(written[:, None], found, 0.0)
    # The last block of queries has its sums where they belong, each one before it 64 further on.
    rows = jnp.pad(rows[:, :, ::-1], ((0, 0), (0, 0), (0, 0), (0, blocks * ROWS)))
    flat = rows.reshape(batch, heads, -1)[..., : -blocks * ROWS]
    sheared = flat.reshape(batch, heads, blocks, width + (blocks - 1) * ROWS)
    return jnp.sum(sheared, axis=2) * LN2
