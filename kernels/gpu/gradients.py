"""Gradients of one tile.

With weights w, their gradients dw = cotangent . v, and delta = cotangent . output:

    dlogit_j = w_j (dw_j - delta)
    dplace_j = dlogit_j slope_j                        0 from the end of the table on
    dgate_j  = sum of dplace_k over keys k <= j        `prefix`: over the tiles on the left
    dx_j     = dgate_j gate_j (1 - gate_j)             x: the gate's logit

Tables are in units of ln 2, so dplace, dgate and dx lack a factor ln 2; and gates are in units of
U, so dx lacks that as well (`gate_gradient_scale`).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from posjax.kernels.common import LN2
from posjax.kernels.gpu.plan import TILE_KEYS, Plan
from posjax.kernels.gpu.products import multiply_into
from posjax.kernels.gpu.registers import column
from posjax.kernels.gpu.tiles import TableValues, Tile, along_rows
from posjax.types import Array, Float

__all__ = [
    "Counts",
    "RowValues",
    "TileGradients",
    "gate_gradient_scale",
    "gate_weights",
    "gradient_scale",
    "key_weights",
    "running_sums",
    "tile_gradients",
]


class Counts(NamedTuple):
    """Gates, places, and the table there, as the forward kernel had them."""

    gates: Float[Array, "64 n"]
    places: Float[Array, "64 n"]
    values: TableValues


class RowValues(NamedTuple):
    """Numbers of each query; `prefix` is the sum of dplace on the left of the tile."""

    lse: Float[Array, "64"]
    delta: Float[Array, "64"]
    prefix: Float[Array, "64"] | None


class TileGradients(NamedTuple):
    """Gradients of a tile; `prefix` is the next tile's, `dgate_logits` are dx."""

    weights: Float[Array, "64 n"]
    dlogits: Float[Array, "64 n"]
    dgate_logits: Float[Array, "64 n"] | None
    prefix: Float[Array, "64"] | None


def tile_gradients(
    tile: Tile, rows: RowValues, carries: Any, *, masked: bool
) -> tuple[Counts | None, TileGradients]:
    """The gradients of a tile before any sum over tiles.

    Args:
        carries: reference to the places that the forward kernel saved; None: without counts.
    """
    allowed, counts, operands = tile.allowed() if masked else None, None, tile.operands
    dots = tile.dots(operands.query, operands.key)
    if carries is not None:
        gate_dots = dots
        if operands.gate_key is not None:
            gate_dots = tile.dots(operands.query, operands.gate_key)
        gates = tile.gates(gate_dots, allowed)
        places = tile.places(gates, tile.per_query(carries, tile.origin.key // TILE_KEYS))
        counts = Counts(gates, places, tile.table_values(places))
    return counts, _gradients(tile, dots, counts, rows, allowed)


def _gradients(
    tile: Tile, dots: Array, counts: Counts | None, rows: RowValues, allowed: Array | None
) -> TileGradients:
    logits = tile.logits(dots, None if counts is None else counts.values)
    weights = jnp.exp2(logits - along_rows(rows.lse, tile.shape))
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0.0)
    operands = tile.operands
    dlogits = weights * tile.dots(operands.cotangent, operands.value, start=-rows.delta)
    if counts is None:
        return TileGradients(weights, dlogits, None, rows.prefix)
    dplaces = dlogits * counts.values.slope
    dgates = running_sums(tile, dplaces, rows.prefix)
    gates, quantum = counts.gates, tile.plan.cope.gate_quantum
    dgate_logits = dgates * (gates * (1.0 - quantum * gates))
    prefix = column(dgates, tile.size - 1, emulated=tile.plan.emulated)
    return TileGradients(weights, dlogits, dgate_logits, prefix)


def gradient_scale(plan: Plan) -> float:
    """The factor of sums of the weights below; they lack it."""
    return plan.scale or 1.0


def gate_gradient_scale(plan: Plan) -> float:
    """The factor that gradients of the gates' logits lack."""
    return LN2 * plan.cope.gate_quantum


def gate_weights(plan: Plan, gradients: TileGradients) -> Float[Array, "64 n"]:
    """Weights of queries and gate keys in each other's gradients, over `gradient_scale`."""
    scale = plan.cope.gate_scale * gate_gradient_scale(plan) / gradient_scale(plan)
    return gradients.dgate_logits * scale


def key_weights(plan: Plan, gradients: TileGradients) -> Float[Array, "64 n"]:
    """Weights of queries and keys in each other's gradients, over `gradient_scale`."""
    dlogits = gradients.dlogits if plan.scale else jnp.zeros_like(gradients.dlogits)
    shared = gradients.dgate_logits is not None and not plan.cope.own_gate_key
    return dlogits + gate_weights(plan, gradients) if shared else dlogits


def running_sums(
    tile: Tile, x: Float[Array, "64 n"], before: Float[Array, "64"]
) -> Float[Array, "64 n"]:
    """Sums over the keys up to each one, added to `before`."""
    upper = tile.operands.upper_triangle
    start = along_rows(before, tile.shape)
    return multiply_into(start, x.astype(upper.dtype), upper, emulated=tile.plan.emulated)
