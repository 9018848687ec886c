"""Gradients of one tile.

With weights w, their gradients dw = cotangent . v, and delta = cotangent . output:

    dlogit_j = w_j (dw_j - delta)
    dplace_j = dlogit_j slope_j                        0 from the end of the table on
    dgate_j  = sum of dplace_k over keys k <= j        `left`: of the tiles on the left
    dx_j     = dgate_j gate_j (1 - gate_j)             x: what the gate is the sigmoid of

Tables are in units of ln 2, so dplace, dgate and dx lack a factor ln 2; and gates are in units of
U, so dx lacks that as well (`dx_unit`).
"""

from typing import NamedTuple

import jax.numpy as jnp

from posjax.kernels.common import LN2
from posjax.kernels.gpu.instructions import column, multiply_into
from posjax.kernels.gpu.plan import Plan
from posjax.kernels.gpu.tiles import SAVED, Tile, Values, along_rows
from posjax.types import Array, Float

__all__ = [
    "HALF",
    "PAIR",
    "Counted",
    "Gradients",
    "Rows",
    "dx_unit",
    "gradients_of",
    "of_gates",
    "of_keys",
    "scan",
    "unit",
]

# Keys of a tile in the backward kernels, and of two: what a step of their loops has.
HALF = SAVED
PAIR = 2 * HALF


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


def gradients_of(
    tile: Tile, rows: Rows, *, counts: bool, masked: bool
) -> tuple[Counted | None, Gradients]:
    """Everything but sums over tiles."""
    allowed, counted = tile.allowed() if masked else None, None
    dots = tile.dots("query", "key")
    if counts:
        own = tile.plan.contextual.own_gate_key
        gates = tile.gates(tile.dots("query", "gate_key") if own else dots, allowed)
        places = tile.places(gates, tile.per_query("carries", tile.place.key // SAVED))
        counted = Counted(gates, places, tile.table_values(places))
    return counted, _gradients(tile, dots, counted, rows, allowed)


def _gradients(
    tile: Tile, dots: Array, counted: Counted | None, rows: Rows, allowed: Array | None
) -> Gradients:
    logits = tile.logits(dots, None if counted is None else counted.values)
    weights = jnp.exp2(logits - along_rows(rows.lse, tile.shape))
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0.0)
    dlogits = weights * tile.dots("cotangent", "value", start=-rows.delta)
    if counted is None:
        return Gradients(weights, dlogits, None, rows.left)
    dplaces = dlogits * counted.values.slope
    dgates = scan(tile, dplaces, rows.left)
    gates, gate_unit = counted.gates, tile.plan.contextual.gate_unit
    dx = dgates * (gates * (1.0 - gate_unit * gates))
    return Gradients(
        weights, dlogits, dx, column(dgates, tile.size - 1, emulated=tile.plan.emulated)
    )


def unit(plan: Plan) -> float:
    """What sums of the following are multiplied with in the end."""
    return plan.scale or 1.0


def dx_unit(plan: Plan) -> float:
    """What dx is multiplied with in the end."""
    return LN2 * plan.contextual.gate_unit


def of_gates(plan: Plan, found: Gradients) -> Float[Array, "64 n"]:
    """What queries and gate keys are multiplied with, in units of `unit`."""
    return found.dx * (plan.contextual.gate_scale * dx_unit(plan) / unit(plan))


def of_keys(plan: Plan, found: Gradients) -> Float[Array, "64 n"]:
    """What queries and keys are multiplied with, in units of `unit`."""
    dlogits = found.dlogits if plan.scale else jnp.zeros_like(found.dlogits)
    shared = found.dx is not None and not plan.contextual.own_gate_key
    return dlogits + of_gates(plan, found) if shared else dlogits


def scan(tile: Tile, x: Float[Array, "64 n"], left: Float[Array, "64"]) -> Float[Array, "64 n"]:
    """Sums over the keys up to each one."""
    upper = tile.operands["upper"]
    start = along_rows(left, tile.shape)
    return multiply_into(start, x.astype(upper.dtype), upper, emulated=tile.plan.emulated)
