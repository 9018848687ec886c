"""Gradients of one tile.

With weights w, their gradients dw = cotangent . v, and delta = cotangent . output, natural units:

    dlogit_j = w_j (dw_j - delta)
    dplace_j = dlogit_j slope_j                        0 from the end of the table on
    dgate_j  = sum of dplace_k over keys k <= j        `left`: of the tiles on the left
    dx_j     = dgate_j gate_j (1 - gate_j)             x: what the gate is the sigmoid of
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.common import LN2, LOG2E
from posjax.kernels.gpu.instructions import multiply_into
from posjax.kernels.gpu.tiles import Tile, Values, along_rows
from posjax.types import Array, Float

__all__ = ["Counted", "Gradients", "Rows", "count", "gradients", "last_column", "scan"]

_LAST = 8


class Counted(NamedTuple):
    """What the forward kernel had of a tile: gates, places, and the table there."""

    gates: Float[Array, "64 n"]
    places: Float[Array, "64 n"]
    values: Values


class Rows(NamedTuple):
    """Of each query: log-sum-exp in units of ln 2, delta, sum of dplace on the left."""

    lse: Float[Array, "64"]
    delta: Float[Array, "64"]
    left: Float[Array, "64"] | None


class Gradients(NamedTuple):
    """Of a tile; `left` is the next tile's."""

    weights: Float[Array, "64 n"]
    dlogits: Float[Array, "64 n"]
    dx: Float[Array, "64 n"] | None
    left: Float[Array, "64"] | None


def count(tile: Tile, dots: Array, right: Float[Array, "64"], allowed: Array | None) -> Counted:
    """Counts again, from the place on the right that the forward kernel kept."""
    gates = tile.gates(dots, allowed)
    places = tile.places(gates, right)
    return Counted(gates, places, tile.table_values(places))


def gradients(
    tile: Tile, dots: Array, counted: Counted | None, rows: Rows, allowed: Array | None
) -> Gradients:
    """Everything but sums over tiles."""
    logits = dots * (tile.plan.scale * LOG2E)
    if counted is not None:
        logits = logits + counted.values.bias
    weights = jnp.exp2(logits - along_rows(rows.lse, tile.shape))
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0.0)
    dlogits = weights * (tile.dots("cotangent", "value") - along_rows(rows.delta, tile.shape))
    if counted is None:
        return Gradients(weights, dlogits, None, rows.left)
    dplaces = dlogits * counted.values.slope * LN2
    dgates = scan(tile, dplaces, rows.left)
    dx = dgates * (counted.gates * (1.0 - counted.gates))
    return Gradients(weights, dlogits, dx, last_column(dgates))


def scan(tile: Tile, x: Float[Array, "64 n"], left: Float[Array, "64"]) -> Float[Array, "64 n"]:
    """Sums over the keys up to each one."""
    upper = tile.operands["upper"]
    start = along_rows(left, tile.shape)
    return multiply_into(start, x.astype(upper.dtype), upper, emulated=tile.plan.emulated)


def last_column(x: Float[Array, "64 n"]) -> Float[Array, "64"]:
    """The number of each row that stands farthest to the right."""
    tail = x[:, x.shape[1] - _LAST :]
    column = plgpu.broadcasted_iota(jnp.int32, tail.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.sum(jnp.where(column == _LAST - 1, tail, 0.0), axis=1)
