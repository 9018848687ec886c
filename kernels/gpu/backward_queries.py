"""The backward kernel of queries: their gradients, and those of their tables.

It goes from left to right, 64 keys at a time in two tiles, because the gradient of a gate is a sum
over the keys on its left. Places come from the right; the forward kernel saved one every 32 keys.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.gpu import relative
from posjax.kernels.gpu.arrays import Inputs, QueryGradients, Residuals
from posjax.kernels.gpu.gradients import RowValues, gradient_scale
from posjax.kernels.gpu.layout import Buffer, fits, launch, matrix, per_row, share_registers
from posjax.kernels.gpu.plan import GROUPS, ROWS, STEP_KEYS, TILE_KEYS, Plan
from posjax.kernels.gpu.queries import Queries, QueryScratch, loop_up, own_span, union
from posjax.kernels.gpu.query_step import GradientState, add_step
from posjax.kernels.gpu.ring import Ring, copy_once, key_sources
from posjax.kernels.gpu.tiles import Origin, gate_bias_of
from posjax.masks import Ranges, Span
from posjax.types import Array

__all__ = ["query_gradients"]

# Bytes of a row of the keys of a tile.
_SWIZZLE = 2 * TILE_KEYS
# Before every block of keys.
_NOWHERE = -1
_STAGES = (4, 3, 2, 1)


def query_gradients(
    plan: Plan, ranges: Ranges, inputs: Inputs, residuals: Residuals
) -> QueryGradients:
    """The query's gradient, and sums that the other gradients are made of."""
    batch, length, heads, _ = inputs.query.shape
    keys, float32 = inputs.key.shape[1], functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    outputs = QueryGradients(jax.ShapeDtypeStruct(inputs.query.shape, inputs.query.dtype))
    if plan.cope is not None:
        rows = float32((batch, heads, length))
        outputs = outputs._replace(
            prefixes=float32((batch, heads, keys // STEP_KEYS, length)),
            slots=float32((batch, heads, length, residuals.empty_slots.shape[1])),
            total=rows,
            moment=rows,
            gate_bias=rows,
        )
    if plan.trains_relative:
        sums = (batch, heads, length // ROWS, keys + ROWS)
        outputs = outputs._replace(distance_bias=float32(sums))
    groups = _groups(plan)
    # As many tiles of keys in shared memory as there is room for.
    scratches = [_scratch(plan, groups, stages, inputs, residuals) for stages in _STAGES]
    return launch(
        functools.partial(_kernel, plan, ranges, groups),
        (inputs, residuals),
        outputs,
        grid={"head": heads, "tile": length // (ROWS * groups), "batch": batch},
        scratch=next(filter(fits, scratches), scratches[-1]),
        name="posjax_attention_backward_queries",
        groups=groups,
    )


def _groups(plan: Plan) -> int:
    """Warpgroups that compute: large tables, slots and sums leave no room for a second one's."""
    if plan.cope is None:
        return GROUPS
    return 1 if plan.cope.positions > 64 or plan.trains_relative else GROUPS


def _scratch(
    plan: Plan, groups: int, stages: int, inputs: Inputs, residuals: Residuals
) -> QueryScratch:
    """Shared memory and barriers of a block of queries."""
    dtype, size = inputs.query.dtype, inputs.query.shape[3]
    operand = functools.partial(matrix, swizzle=_SWIZZLE)
    float32 = functools.partial(plgpu.SMEM, dtype=jnp.float32)
    rows = Buffer.own(operand((groups, ROWS, size), dtype))
    keys = Buffer.ring(operand((stages, TILE_KEYS, size), dtype), groups)
    scratch = QueryScratch(
        key=keys,
        value=keys,
        gate_key=None if inputs.gate_key is None else keys,
        query=rows,
        cotangent=rows,
    )
    if plan.relative:
        words = Buffer.ring(float32((stages, groups * ROWS + TILE_KEYS)), groups)
        scratch = dataclasses.replace(scratch, distance_bias=words)
    if plan.trains_relative:
        sums, carried = relative.scratch_types(groups)
        scratch = dataclasses.replace(scratch, diagonals=sums, carried_diagonals=carried)
    if plan.cope is None:
        return scratch
    triangle = (TILE_KEYS, TILE_KEYS)
    return dataclasses.replace(
        scratch,
        tables=Buffer.own(float32((groups, ROWS, inputs.tables.shape[3]))),
        slots=Buffer.own(float32((groups, ROWS, residuals.empty_slots.shape[1]))),
        lower_triangle=Buffer.constant(operand(triangle, jnp.float16)),
        upper_triangle=Buffer.constant(operand(triangle, jnp.bfloat16)),
    )


def _kernel(
    plan: Plan,
    ranges: Ranges,
    groups: int,
    inputs: Inputs,
    residuals: Residuals,
    outputs: QueryGradients,
    scratch: QueryScratch,
) -> None:
    batch, head, group = (jax.lax.axis_index(name) for name in ("batch", "head", "group"))
    tile = inputs.query.shape[1] // (ROWS * groups) - 1 - jax.lax.axis_index("tile")
    steps = plan.blocks.key // STEP_KEYS
    spans = [
        _in_steps(ranges.span(inputs.ranges, batch, tile * groups + g), steps)
        for g in range(groups)
    ]
    low, high = union(spans)
    ring = Ring(scratch.rings, scratch.key.array.shape[0], 2 * low, 1, plan.emulated)

    @pl.when(group == groups)
    def _():
        share_registers(groups, computes=False)
        rows = pl.ds(tile * groups * ROWS, groups * ROWS)
        sources = key_sources(inputs, batch, head, rows, TILE_KEYS)
        ring.fetch(2 * jnp.maximum(high - low + 1, 0), sources)

    @pl.when(group < groups)
    def _():
        share_registers(groups, computes=True)
        origin = Origin(batch, head, (tile * groups + group) * ROWS, jnp.int32(0))
        bias = gate_bias_of(inputs, head)
        queries = Queries(plan, inputs, scratch, group, origin, ring, bias)
        _compute(queries, residuals, outputs, own_span(spans, group), high, low)


def _in_steps(span: Span, steps: int) -> Span:
    """The span in steps, of which a block of keys has `steps`."""
    first, full_first, full_last, last = span
    end = steps - 1
    return Span(first * steps, full_first * steps, full_last * steps + end, last * steps + end)


def _compute(
    queries: Queries,
    residuals: Residuals,
    outputs: QueryGradients,
    span: Span,
    high: Array,
    low: Array,
) -> None:
    """All blocks of one warpgroup."""
    plan, size = queries.plan, outputs.query.shape[3]
    _fetch_own(queries, residuals)
    if plan.trains_relative:
        relative.clear(queries)
    zeros = lambda n: plgpu.layout_cast(jnp.zeros((ROWS, n), jnp.float32), plgpu.Layout.WGMMA)  # noqa: E731
    sums = [None] * 4 if plan.cope is None else [*[per_row(0.0)] * 3, zeros(8)]
    state = GradientState(zeros(size), *sums)
    first = queries.tile(jnp.int32(0), 0, TILE_KEYS)
    rows = RowValues(first.per_query(residuals.lse), first.per_query(residuals.delta), None)
    careful, band, plain = (
        functools.partial(
            add_step, queries, outputs, rows, residuals.carries if counts else None, masked=masked
        )
        for counts, masked in ((True, True), (True, False), (False, False))
    )
    last_plain = span.full_last
    if plan.cope is not None:
        steps, origin = plan.blocks.key // STEP_KEYS, queries.origin
        block = residuals.last_plain[origin.batch, origin.head, origin.query]
        last_plain = block * steps + steps - 1

    def skip(index, state):
        return queries.ring.skip(2 * index + 1, queries.ring.skip(2 * index, state))

    def side(number, loop):
        """On the left of the full blocks and over them; on the right of them; the others."""
        choose = lambda a, b, c: jnp.where(number == 0, a, jnp.where(number == 1, b, c))  # noqa: E731
        loop = loop_up(choose(span.first - 1, _NOWHERE, high), skip, loop)
        loop = loop_up(choose(span.full_first - 1, span.last, _NOWHERE), careful, loop)
        full = choose(span.full_last, _NOWHERE, _NOWHERE)
        loop = loop_up(jnp.minimum(full, last_plain), plain, loop)
        return loop if plan.cope is None else loop_up(full, band, loop)

    _, state = jax.lax.fori_loop(0, 3, side, (low, state))
    gradient = (state.query * gradient_scale(plan)).astype(outputs.query.dtype)
    queries.send_tokens(outputs.query, gradient)
    if plan.cope is not None:
        queries.save(outputs.total, state.total)
        queries.save(outputs.moment, state.moment)
        queries.save(outputs.gate_bias, jnp.sum(state.gate_bias, axis=1))
        queries.send(queries.scratch.slots, queries.origin.of_heads(outputs.slots))


def _fetch_own(queries: Queries, residuals: Residuals) -> None:
    """Copies the queries, their cotangents and what they need to count."""
    inputs, scratch, origin = queries.inputs, queries.scratch, queries.origin
    own = [
        (origin.of_tokens(inputs.query), scratch.query),
        (origin.of_tokens(residuals.cotangent), scratch.cotangent),
    ]
    if queries.plan.cope is None:
        copy_once(queries.group, own, [])
        return
    own.append((origin.of_heads(inputs.tables), scratch.tables))
    triangles = [
        (inputs.lower_triangle, scratch.lower_triangle),
        (residuals.upper_triangle, scratch.upper_triangle),
    ]
    copy_once(queries.group, own, triangles)
    copy_once(queries.group, [(residuals.empty_slots, scratch.slots)], [])
