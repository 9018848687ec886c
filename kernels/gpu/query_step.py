"""A step of the backward kernel of queries: sums over 64 keys, in two tiles.

The gradient of a table adds up dlogits over the keys of each bin. Places fall from key to key by
less than 1, so each bin's keys are neighbours, and its sums are differences of running sums: if the
next key lies in a lower bin, the sums so far go to the bin's slot. `tables.table_gradients` makes
the gradient of them.
"""

import functools
from typing import Any, NamedTuple

from posjax.kernels.gpu import relative
from posjax.kernels.gpu.arrays import QueryGradients
from posjax.kernels.gpu.diagonals import collect
from posjax.kernels.gpu.gradients import (
    Counts,
    RowValues,
    gate_weights,
    key_weights,
    running_sums,
    tile_gradients,
)
from posjax.kernels.gpu.look_ups import store_crossings
from posjax.kernels.gpu.plan import TILE_KEYS
from posjax.kernels.gpu.products import multiply_into
from posjax.kernels.gpu.queries import Queries
from posjax.kernels.gpu.registers import column
from posjax.kernels.gpu.tiles import Tile
from posjax.types import Array, Float

__all__ = ["GradientState", "add_step"]


class GradientState(NamedTuple):
    """Sums over the keys so far: the query's gradient, and with a contextual bias the others.

    `prefix` is the sum of dplace; `total` and `moment` as in `QueryGradients`; `gate_bias` is not
    added up over the last axis.
    """

    query: Float[Array, "64 H"]
    prefix: Float[Array, "64"] | None
    total: Float[Array, "64"] | None
    moment: Float[Array, "64"] | None
    gate_bias: Float[Array, "64 8"] | None


def add_step(
    queries: Queries,
    outputs: QueryGradients,
    rows: RowValues,
    carries: Any,
    index: Array,
    state: GradientState,
    *,
    masked: bool,
) -> GradientState:
    """Adds 64 keys, the left tile first."""
    ring = queries.ring
    left, right = (queries.tile(2 * index + n, 0, TILE_KEYS) for n in range(2))
    ring.wait(ring.buffers, 2 * index)
    ring.wait(ring.buffers, 2 * index + 1)
    if carries is not None:
        state = _copied(state)
        left.save(outputs.prefixes, state.prefix, index)
    for number, tile in enumerate((left, right)):
        state = _add_tile(queries, tile, rows, carries, state, number * TILE_KEYS, masked=masked)
        ring.release(ring.buffers, 2 * index + number)
    if queries.plan.trains_relative:
        relative.send(queries, outputs.distance_bias, index)
    return state


def _copied(state: GradientState) -> GradientState:
    """The same sums in other registers.

    ptxas makes all matrix instructions wait for each other (its message C7511) if accumulators
    begin in a register that a loop carries on. Adding 0 is a copy that no compiler leaves out.
    """
    return state._replace(
        prefix=state.prefix + 0.0, total=state.total + 0.0, moment=state.moment + 0.0
    )


def _add_tile(
    queries: Queries,
    tile: Tile,
    rows: RowValues,
    carries: Any,
    state: GradientState,
    start: int,
    *,
    masked: bool,
) -> GradientState:
    """Adds 32 keys, `start` of the same 64 before them."""
    plan, operands = tile.plan, tile.operands
    dtype, emulated = operands.key.dtype, plan.emulated
    multiply = functools.partial(multiply_into, emulated=emulated)
    rows = rows._replace(prefix=state.prefix)
    counts, gradients = tile_gradients(tile, rows, carries, masked=masked)
    if plan.trains_relative:
        diagonals = queries.scratch.diagonals.at[queries.group]
        collect(diagonals, gradients.dlogits, start=start, emulated=emulated)
    query = multiply(state.query, key_weights(plan, gradients).astype(dtype), operands.key)
    if counts is None:
        return state._replace(query=query)
    if plan.cope.own_gate_key:
        weights = gate_weights(plan, gradients).astype(dtype)
        query = multiply(query, weights, operands.gate_key)
    if plan.cope.has_gate_bias:
        gate_bias = _added_by_eights(state.gate_bias, gradients.dgate_logits)
        state = state._replace(gate_bias=gate_bias)
    total, moment = _table_sums(queries, tile, counts, gradients.dlogits, state)
    return state._replace(query=query, prefix=gradients.prefix, total=total, moment=moment)


def _added_by_eights(total: Float[Array, "64 8"], x: Float[Array, "64 n"]) -> Float[Array, "64 8"]:
    """Adds every eighth column; the last sum, over eight, takes other threads' numbers."""
    for start in range(0, x.shape[1], total.shape[1]):
        total = total + x[:, start : start + total.shape[1]]
    return total


def _table_sums(
    queries: Queries, tile: Tile, counts: Counts, dlogits: Array, state: GradientState
) -> tuple[Array, Array]:
    """The running sums of dlogits and of dlogits times fractions, which also go to the slots."""
    cope, emulated = tile.plan.cope, tile.plan.emulated
    totals = running_sums(tile, dlogits, state.total)
    moments = running_sums(tile, dlogits * counts.values.fraction, state.moment)
    store_crossings(
        queries.scratch.slots.array.at[queries.group],
        tile.operands.tables,
        counts.places,
        counts.gates,
        totals,
        moments,
        last_place=cope.last_place,
        gate_quantum=cope.gate_quantum,
        emulated=emulated,
    )
    last = functools.partial(column, index=tile.size - 1, emulated=emulated)
    return last(totals), last(moments)
