"""Biases of the distance: ALiBi, T5, KERPLE, ...

If positions rise by one from token to token, a tile's bias is constant along its diagonals. XLA
makes one array for each head from the bias's function,

    distance_bias[j - i + T - 1] = bias of query i and key j, in units of ln 2

and the kernels fetch the part of a tile's diagonals with the tile's keys. The gradient adds up the
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
from posjax.kernels.gpu.plan import ROWS, STEP_KEYS, Plan
from posjax.kernels.gpu.queries import Queries
from posjax.kernels.gpu.registers import load
from posjax.kernels.gpu.stores import store
from posjax.masks import Mask, Ranges
from posjax.types import Array, Float

__all__ = ["clear", "distance_bias", "gradient", "scratch_types", "send"]

# Diagonals of 64 queries and 64 keys, and one more.
_DIAGONALS = ROWS + STEP_KEYS


def distance_bias(
    biases: list[RelativeBias], mask: Mask, queries: int, keys: int
) -> Float[Array, "#B #N x"]:
    """The sum of the biases at all distances.

    Args:
        mask: of the real tokens, for their positions.
        queries: number of queries with padding; `keys` likewise.
    """
    return by_distance(biases, mask, queries - 1 - jnp.arange(queries + keys))


def scratch_types(groups: int) -> tuple:
    """Memory of a warpgroup's sums along diagonals, and of the last sums with 0 behind them."""
    return (
        plgpu.SMEM((groups, diagonals.SUMS, diagonals.WIDTH), jnp.float32),
        plgpu.SMEM((groups, ROWS + _DIAGONALS), jnp.float32),
    )


def clear(queries: Queries) -> None:
    """Makes all sums 0."""
    sums, carried = _own(queries)
    zeros = plgpu.layout_cast(jnp.zeros((_DIAGONALS,), jnp.float32), _layout())
    for row in range(diagonals.SUMS):
        sums[row, :_DIAGONALS] = zeros
    carried[ROWS:] = zeros
    plgpu.commit_smem()


def send(queries: Queries, ref, index: Array) -> None:
    """Writes the sums of 64 keys, with those that were carried on, and carries on the last ones.

    The next 64 keys write over the last 64 diagonals, with their own part.

    Args:
        ref: [B, N, T / 64, S + 64], the output.
    """
    sums, carried = _own(queries)
    plgpu.commit_smem()
    total = load(carried.at[ROWS:], _layout())
    for row in range(diagonals.SUMS):
        total = total + load(sums.at[row, :_DIAGONALS], _layout())
    plgpu.commit_smem()
    batch, head, row, _ = queries.origin
    where = pl.ds(index * STEP_KEYS, _DIAGONALS)
    written = ref.at[batch, head, row // ROWS, where]
    for target in (carried.at[:_DIAGONALS], written):
        store(target, total, _layout(), emulated=queries.plan.emulated)


def _own(queries: Queries) -> tuple:
    """This warpgroup's part of `scratch_types`."""
    scratch = queries.scratch
    return tuple(x.at[queries.group] for x in (scratch.diagonals, scratch.carried_diagonals))


def _layout():
    """A number for each thread."""
    return plgpu.Layout.WG_STRIDED((_DIAGONALS,), vec_size=1)


def gradient(sums: Float[Array, "B N m y"], ranges: Ranges, plan: Plan) -> Float[Array, "B N x"]:
    """The gradient of `distance_bias`, from all query blocks' sums.

    Args:
        sums: `QueryGradients.distance_bias`.
        ranges: blocks of keys that each 64 queries went over; no others are written.
    """
    batch, heads, blocks, width = sums.shape
    spans = jnp.moveaxis(ranges.flat.reshape(ranges.batch, 4, blocks), 1, 0)[..., None]
    first, last = spans[0], spans[3]
    place = jnp.arange(width)[None, None]
    begin, end = first * plan.blocks.key, (last + 1) * plan.blocks.key + ROWS
    written = (place >= begin) & (place < end) & (first <= last)
    rows = jnp.where(written[:, None], sums, 0.0)
    # The sums of the last block of queries are in place, those of each one before it 64 further on.
    rows = jnp.pad(rows[:, :, ::-1], ((0, 0), (0, 0), (0, 0), (0, blocks * ROWS)))
    flat = rows.reshape(batch, heads, -1)[..., : -blocks * ROWS]
    sheared = flat.reshape(batch, heads, blocks, width + (blocks - 1) * ROWS)
    return jnp.sum(sheared, axis=2) * LN2
