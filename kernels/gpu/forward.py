"""The forward kernel.

    output_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j        over the keys j that i sees

Two warpgroups compute, 64 queries each; a third one fetches blocks of keys and values, from right
to left, which both share. A warpgroup goes through these loops:

| loop    | blocks                                                        | tile                   |
|---------|---------------------------------------------------------------|------------------------|
| skip    | needed only by the other warpgroup                            | none                   |
| careful | partly masked                                                 | mask, count, table     |
| band    | fully visible, until the counts of all queries have saturated | count, table           |
| plain   | fully visible                                                 | ordinary attention     |

With `GpuBlocks.ping_pong` the two warpgroups take turns: they meet twice in every block of keys,
before the softmax and after it, one of them half a block behind. While one computes its softmax the
matrix units work for the other. Both visit every block, so they meet equally often.

Logits and their log-sum-exp are in units of ln 2.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.common import LOG2E, MASKED
from posjax.kernels.gpu.arrays import Inputs, Outputs
from posjax.kernels.gpu.layout import Buffer, launch, matrix, per_row, present, share_registers
from posjax.kernels.gpu.plan import GROUPS, ROWS, TILE_KEYS, Plan
from posjax.kernels.gpu.products import multiply_into
from posjax.kernels.gpu.queries import Queries, QueryScratch, loop_down, own_span, union
from posjax.kernels.gpu.ring import Ring, copy_once, key_sources
from posjax.kernels.gpu.stores import all_reach
from posjax.kernels.gpu.tiles import Origin, Tile, along_rows, first_place, gate_bias_of
from posjax.masks import Ranges, Span
from posjax.types import Array, Float

__all__ = ["forward"]

# Beyond every block of keys.
_NOWHERE = 2**30


class SoftmaxState(NamedTuple):
    """The softmax of a warpgroup's queries over the keys so far.

    `place` is that on the left of these keys, with a contextual bias.
    """

    output: Float[Array, "64 H"]
    maximum: Float[Array, "64"]
    total: Float[Array, "64"]
    place: Float[Array, "64"] | None


def forward(plan: Plan, ranges: Ranges, inputs: Inputs) -> Outputs:
    """Output, its residual and log-sum-exp, and with a contextual bias what counts left behind."""
    batch, length, heads, _ = inputs.query.shape
    keys, size = inputs.value.shape[1], inputs.value.shape[3]
    output = jax.ShapeDtypeStruct((batch, length, heads, size), inputs.query.dtype)
    lse = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    outputs = Outputs(output, output, lse)
    if plan.cope is not None:
        carries = (batch, heads, keys // TILE_KEYS, length)
        outputs = outputs._replace(
            carries=jax.ShapeDtypeStruct(carries, jnp.float32),
            last_plain=jax.ShapeDtypeStruct((batch, heads, length), jnp.int32),
        )
    return launch(
        functools.partial(_kernel, plan, ranges),
        (inputs,),
        outputs,
        grid={"head": heads, "tile": length // (ROWS * GROUPS), "batch": batch},
        scratch=_scratch(plan, inputs),
        name="posjax_attention_forward",
    )


def _scratch(plan: Plan, inputs: Inputs) -> QueryScratch:
    """Shared memory and barriers of a block of queries."""
    blocks, dtype, size = plan.blocks, inputs.query.dtype, inputs.query.shape[3]
    keys = Buffer.ring(matrix((blocks.stages, blocks.key, size), dtype), GROUPS)
    scratch = QueryScratch(
        key=keys,
        value=keys,
        gate_key=None if inputs.gate_key is None else keys,
        query=Buffer.own(matrix((GROUPS, ROWS, size), dtype)),
        turn=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=1) if blocks.ping_pong else None,
    )
    if plan.relative:
        words = plgpu.SMEM((blocks.stages, ROWS * GROUPS + blocks.key), jnp.float32)
        scratch = dataclasses.replace(scratch, distance_bias=Buffer.ring(words, GROUPS))
    if plan.cope is None:
        return scratch
    tables = plgpu.SMEM((GROUPS, ROWS, inputs.tables.shape[3]), jnp.float32)
    triangle = matrix((blocks.count, blocks.count), jnp.float16)
    return dataclasses.replace(
        scratch, tables=Buffer.own(tables), lower_triangle=Buffer.constant(triangle)
    )


def _kernel(
    plan: Plan, ranges: Ranges, inputs: Inputs, outputs: Outputs, scratch: QueryScratch
) -> None:
    batch, head, group = (jax.lax.axis_index(name) for name in ("batch", "head", "group"))
    # The tiles with most keys first.
    tile = inputs.query.shape[1] // (ROWS * GROUPS) - 1 - jax.lax.axis_index("tile")
    spans = [ranges.span(inputs.ranges, batch, tile * GROUPS + g) for g in range(GROUPS)]
    low, high = union(spans)
    ring = Ring(scratch.rings, plan.blocks.stages, high, -1, plan.emulated)

    @pl.when(group == GROUPS)
    def _():
        share_registers(GROUPS, computes=False)
        rows = pl.ds(tile * GROUPS * ROWS, GROUPS * ROWS)
        sources = key_sources(inputs, batch, head, rows, plan.blocks.key)
        ring.fetch(jnp.maximum(high - low + 1, 0), sources)

    @pl.when(group < GROUPS)
    def _():
        share_registers(GROUPS, computes=True)
        origin = Origin(batch, head, (tile * GROUPS + group) * ROWS, jnp.int32(0))
        bias = gate_bias_of(inputs, head)
        queries = Queries(plan, inputs, scratch, group, origin, ring, bias)
        _compute(queries, outputs, own_span(spans, group), high, low)


def _compute(queries: Queries, outputs: Outputs, span: Span, high: Array, low: Array) -> None:
    """All blocks of one warpgroup."""
    plan, size = queries.plan, outputs.output.shape[3]
    _fetch_own(queries)
    state = SoftmaxState(
        output=plgpu.layout_cast(jnp.zeros((ROWS, size), jnp.float32), plgpu.Layout.WGMMA),
        maximum=per_row(MASKED),
        total=per_row(0.0),
        place=None if plan.cope is None else first_place(plan, queries.origin.query),
    )
    careful, band, plain = (
        functools.partial(
            _block, queries, outputs, counts=counts and plan.cope is not None, masked=masked
        )
        for counts, masked in ((True, True), (True, False), (False, False))
    )

    def side(number, loop):
        """On the right of the full blocks and over them; on the left of them; the others."""
        choose = lambda a, b, c: jnp.where(number == 0, a, jnp.where(number == 1, b, c))  # noqa: E731
        skip = functools.partial(_skip, queries)
        loop = loop_down(choose(span.last + 1, _NOWHERE, low), skip, loop)
        loop = loop_down(choose(span.full_last + 1, span.first, _NOWHERE), careful, loop)
        bound = choose(span.full_first, _NOWHERE, _NOWHERE)
        if plan.cope is not None:
            loop = loop_down(bound, band, loop, unless=functools.partial(_saturated, plan))
            last = per_row(loop[0], jnp.int32)
            pl.when(number == 0)(lambda: queries.save(outputs.last_plain, last))
        return loop_down(bound, plain, loop)

    # The second warpgroup starts when the first one comes to its softmax.
    pl.when(queries.group == 1)(functools.partial(_take_turns, queries))
    _, state = jax.lax.fori_loop(0, 3, side, (high, state))
    pl.when(queries.group == 0)(functools.partial(_take_turns, queries))
    _finish(queries, outputs, state)


def _fetch_own(queries: Queries) -> None:
    """Copies the queries and what they need to count."""
    inputs, scratch, origin = queries.inputs, queries.scratch, queries.origin
    own, constants = [(origin.of_tokens(inputs.query), scratch.query)], []
    if queries.plan.cope is not None:
        own.append((origin.of_heads(inputs.tables), scratch.tables))
        constants.append((inputs.lower_triangle, scratch.lower_triangle))
    copy_once(queries.group, own, constants)


def _saturated(plan: Plan, state: SoftmaxState) -> Array:
    """Whether all queries have counted to the end of the table."""
    return all_reach(state.place, plan.cope.saturated_place, emulated=plan.emulated)


def _take_turns(queries: Queries) -> None:
    """Waits until the other warpgroup comes here too, if they take turns."""
    if queries.plan.blocks.ping_pong:
        turn = queries.scratch.turn.at[0]
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)


def _skip(queries: Queries, index: Array, state: SoftmaxState) -> SoftmaxState:
    """Passes a block that only the other warpgroup needs."""
    for _ in range(2):
        _take_turns(queries)
    return queries.ring.skip(index, state)


def _block(
    queries: Queries,
    outputs: Outputs,
    index: Array,
    state: SoftmaxState,
    *,
    counts: bool,
    masked: bool,
) -> SoftmaxState:
    """Adds one block of keys, some keys at a time, from right to left."""
    plan, ring, scratch = queries.plan, queries.ring, queries.scratch
    size = plan.blocks.count if counts else plan.blocks.key
    # Masks take registers.
    size = min(size, 64) if masked else size
    keys, bias = present(scratch.key, scratch.gate_key), present(scratch.distance_bias)
    ring.wait(keys, index)
    starts = list(reversed(range(0, plan.blocks.key, size)))
    for start in starts:
        tile = queries.tile(index, start, size)
        operands = tile.operands
        dots = gate_dots = tile.dots(operands.query, operands.key)
        if counts and operands.gate_key is not None:
            gate_dots = tile.dots(operands.query, operands.gate_key)
        if start == starts[0]:
            _take_turns(queries)
        if start == 0:
            ring.release(keys, index)
        allowed = tile.allowed() if masked else None
        if start == starts[0]:
            ring.wait(bias, index)
        scale, values = plan.scale * LOG2E, None
        if counts:
            places = tile.places(tile.gates(gate_dots, allowed), state.place)
            values = tile.table_values(places)
            state = state._replace(place=_save_places(tile, outputs, places, state.place))
        if scale > 0 and not (counts or plan.relative):
            logits = dots, scale
        else:
            logits = tile.logits(dots, values), 1.0
        if start == starts[0]:
            # They arrive during the softmax.
            ring.wait([scratch.value], index)
        turn = functools.partial(_take_turns, queries) if start == 0 else None
        state = _update_softmax(tile, state, *logits, allowed, turn)
    ring.release([scratch.value, *bias], index)
    return state


def _save_places(tile: Tile, outputs: Outputs, places: Array, right: Array) -> Array:
    """Saves the places on the right of every `TILE_KEYS` keys; returns that left of the tile."""
    lefts = [tile.left(places, start) for start in range(0, tile.size, TILE_KEYS)]
    for number, place in enumerate([*lefts[1:], right]):
        tile.save(outputs.carries, place, tile.origin.key // TILE_KEYS + number)
    return lefts[0]


def _update_softmax(
    tile: Tile,
    state: SoftmaxState,
    logits: Array,
    scale: float,
    allowed: Array | None,
    turn: Callable[[], None] | None,
) -> SoftmaxState:
    """Adds a tile's keys and values.

    Args:
        logits: in units of ln 2 / `scale`, which is positive.
        turn: waits for this warpgroup's turn at the matrix units.
    """
    if allowed is not None:
        logits = jnp.where(allowed, logits, MASKED)
    maximum = jnp.maximum(state.maximum, jnp.max(logits, axis=1) * scale)
    weights = jnp.exp2(logits * scale - along_rows(maximum, logits.shape))
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0.0)
    shrink = jnp.exp2(state.maximum - maximum)
    total = state.total * shrink + jnp.sum(weights, axis=1)
    output = state.output * along_rows(shrink, state.output.shape)
    value = tile.operands.value
    weights = weights.astype(value.dtype)
    if turn is not None:
        turn()
    output = multiply_into(output, weights, value, emulated=tile.plan.emulated)
    return state._replace(output=output, maximum=maximum, total=total)


def _finish(queries: Queries, outputs: Outputs, state: SoftmaxState) -> None:
    """Divides by the total; a row that has seen nothing is 0."""
    total = jnp.where(state.total == 0, 1.0, state.total)
    queries.save(outputs.lse, state.maximum + jnp.log2(total))
    output = state.output * along_rows(1.0 / total, state.output.shape)
    rounded = output.astype(outputs.output.dtype)
    queries.send_tokens(outputs.output, rounded)
    residual = output - rounded.astype(jnp.float32)
    queries.send_tokens(outputs.output_residual, residual.astype(rounded.dtype))
