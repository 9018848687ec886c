"""The backward kernel: all gradients in one walk over the tiles, each computed once.

| grid axis | walks                                 | holds                                        |
|-----------|---------------------------------------|----------------------------------------------|
| batch     |                                       |                                              |
| kv head   |                                       | gradients of its query heads' tables         |
| memory    | parts of the keys, from left to right | their gradients                              |
| group     | query heads of the key/value head     |                                              |
| queries   | blocks of queries                     | gradients of the queries, and of their table |

Keys are walked from left to right, because a gate counts for all keys on its left: its gradient is
a prefix sum. Nothing is atomic, and all sums are float32. With w the weights, d their gradients,

    ds    = w (d - delta)                       delta = sum over keys of w d = cotangent . output
    dgate = sum over keys k <= j of ds_k slope_k
    dz_b  = second difference of sum over keys of ds (count - b)_+
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.kernels.common import LN2
from posjax.kernels.tpu import backward_pipeline, counting, relative, tiles
from posjax.kernels.tpu.arrays import Gradients, Inputs, Residuals
from posjax.kernels.tpu.backward_step import (
    FEW_CROSSINGS,
    BackwardScratch,
    BackwardStages,
    BackwardStep,
    add_tile,
    gradient_scale,
)
from posjax.kernels.tpu.counting import PLACE_OFFSET
from posjax.kernels.tpu.plan import LANES, GridIndices, Layout, Plan, compiler_params
from posjax.kernels.tpu.registers import TN, from_row, matmul, packed_shape, reduce_lanes, to_row
from posjax.kernels.tpu.tables import table_scratch
from posjax.masks import Ranges, Span
from posjax.types import Array
from posjax.varying import alike, varying_like

__all__ = ["backward"]


def backward(plan: Plan, ranges: Ranges, inputs: Inputs, residuals: Residuals) -> Gradients:
    """Gradients of the inputs; those of query and (gate) keys lack `gradient_scale`."""
    if plan.cope is not None:
        inputs = inputs._replace(lower_triangle=counting.triangle())
        residuals = residuals._replace(upper_triangle=counting.triangle(ahead=True))
    layout = Layout.of(plan, inputs)
    at = GridIndices(
        batch=lambda b, k, m, g, i, _: b,
        head=lambda b, k, m, g, i, _: k * layout.groups + g,
        query=lambda b, k, m, g, i, _: i,
        memory=lambda b, k, m, g, i, _: m,
    )
    gradients = layout.gradients()
    kernel = pl.pallas_call(
        functools.partial(_kernel, plan, layout, ranges),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(layout.batch, layout.kv_heads, layout.parts, layout.groups, layout.query_blocks),
            in_specs=[layout.input_specs(inputs, at), layout.residual_specs(residuals, at)],
            out_specs=[layout.gradient_specs(gradients, at)],
            scratch_shapes=[_scratch(plan, layout)],
        ),
        out_shape=[varying_like((inputs, residuals), gradients)],
        compiler_params=compiler_params("parallel", "parallel", *["arbitrary"] * 3),
        cost_estimate=layout.cost(products=5),
        name="posjax_attention_backward",
    )
    (gradients,) = kernel(*alike((ranges.flat, inputs, residuals)))
    return gradients


def _scratch(plan: Plan, layout: Layout) -> BackwardScratch:
    """Shapes of the memory."""
    rows = plan.blocks.query
    float32 = lambda *shape: pltpu.VMEM(shape, jnp.float32)  # noqa: E731
    lanes = float32(rows, LANES)
    scratch = BackwardScratch(
        dquery=float32(rows, layout.size),
        lse=lanes,
        delta=lanes,
        query_transposed=pltpu.VMEM((layout.size, rows), layout.dtype),
        cotangent_transposed=pltpu.VMEM((layout.value_size, rows), layout.dtype),
        copy_done=pltpu.SemaphoreType.DMA(()),
    )
    if plan.relative:
        band = relative.band_scratch(plan)
        scratch = scratch._replace(band=band, dband=band)
    if plan.cope is None:
        return scratch
    return scratch._replace(
        ramp_sums=float32(rows, plan.pieces * LANES),
        dlogits_total=lanes,
        saved_carries=float32(layout.carry_groups, rows, LANES),
        dcount_prefix=lanes,
        saved_prefixes=float32(layout.groups * layout.query_blocks, rows),
        tables=table_scratch(plan),
        stages=_stages(plan, layout),
    )


def _stages(plan: Plan, layout: Layout) -> BackwardStages:
    rows, keys = plan.blocks.query, plan.blocks.key
    lanes, tile = (pltpu.VMEM((rows, size), jnp.float32) for size in (LANES, keys))
    packed = packed_shape(rows, keys, layout.dtype)
    packed = pltpu.VMEM(packed.shape, packed.dtype)
    return BackwardStages(
        next_logits=tile,
        negative_logits=tile,
        gates=tile,
        lane_prefix=tile,
        count_before_lane=lanes,
        dlogits=tile,
        lane_dcounts=lanes,
        lane_total=lanes,
        lane_moment=lanes,
        lane_ramp_sums=(lanes,) * FEW_CROSSINGS,
        weights=packed,
        dproducts=packed,
    )


def _kernel(
    plan: Plan,
    layout: Layout,
    ranges: Ranges,
    range_table,
    inputs: Inputs,
    residuals: Residuals,
    gradients: Gradients,
    scratch: BackwardScratch,
) -> None:
    b, k, m, g, i = (pl.program_id(axis) for axis in range(5))
    after = layout.query_blocks - 1 - i
    step = BackwardStep(
        plan, inputs, residuals, gradients, scratch, m * layout.part_blocks, g, after
    )
    span = ranges.span(range_table, b, i)
    slot = g * layout.query_blocks + i

    @pl.when((g == 0) & (i == 0))
    def _():
        _clear(gradients.key, gradients.value, gradients.gate_key)

    @pl.when((m == 0) & (g == 0) & (i == 0))
    def _():
        _clear(gradients.table, gradients.gate_bias, gradients.strips)

    rows = pl.ds(i * plan.blocks.query, plan.blocks.query)
    dquery = gradients.query.at[b, k * layout.groups + g, rows, :]
    _begin(step, dquery, m, slot)
    edge = _plain_until(step, span)
    add = functools.partial(add_tile, step)
    inside = lambda low, high: (  # noqa: E731
        jnp.maximum(low, step.first_block),
        jnp.minimum(high, step.first_block + layout.part_blocks - 1),
    )

    def walk_side(number, _):
        """On the left the masked blocks and then the full ones; on the right the masked ones."""
        left = number == 0
        low, high = inside(
            jnp.where(left, span.first, span.full_last + 1),
            jnp.where(left, span.full_first - 1, span.last),
        )
        _rightwards(low, high, functools.partial(add, masked=True, counts=True))
        full_last = jnp.where(left, span.full_last, span.full_first - 1)
        low, high = inside(span.full_first, jnp.minimum(full_last, edge))
        _rightwards(low, high, functools.partial(add, masked=False, counts=False))
        if plan.cope is not None:
            low, high = inside(jnp.maximum(span.full_first, edge + 1), full_last)
            if plan.cope.own_gate_key or plan.relative:
                _rightwards(low, high, functools.partial(add, masked=False, counts=True))
            else:
                backward_pipeline.run_counting_pipeline(step, low, high)

    jax.lax.fori_loop(0, 2, walk_side, None)
    _finish(step, dquery, slot)


def _rightwards(low: Array, high: Array, body: Callable) -> None:
    jax.lax.fori_loop(low, high + 1, lambda index, _: body(index), None)


def _clear(*references) -> None:
    for reference in references:
        if reference is not None:
            reference[...] = jnp.zeros(reference.shape, jnp.float32)


def _begin(step: BackwardStep, dquery, part: Array, slot: Array) -> None:
    """Reads what each query needs; sums begin with nothing, or with the part of the keys before."""
    inputs, residuals, scratch = step.inputs, step.residuals, step.scratch
    scratch.lse[...] = from_row(residuals.lse[...])
    scratch.delta[...] = from_row(residuals.delta[...])
    # Once for each block of queries, so that no tile transposes them.
    scratch.query_transposed[...] = jnp.transpose(inputs.query[...])
    scratch.cotangent_transposed[...] = jnp.transpose(residuals.cotangent[...])
    _clear(scratch.ramp_sums, scratch.dlogits_total)

    @pl.when(part == 0)
    def _():
        _clear(scratch.dquery, scratch.dcount_prefix)

    @pl.when(part > 0)
    def _():
        _copy(dquery, scratch.dquery, scratch.copy_done)

    if step.plan.cope is None:
        return
    tiles.fill_tables(step.plan, inputs, scratch.tables)
    carries = residuals.carries
    for group in range(scratch.saved_carries.shape[0]):
        some = carries[group * LANES : min(carries.shape[0], (group + 1) * LANES), :]
        missing = jnp.zeros((LANES - some.shape[0], some.shape[1]), jnp.float32)
        whole = jnp.concatenate([some, missing]) if missing.shape[0] else some
        scratch.saved_carries[group] = jnp.transpose(whole)

    @pl.when(part > 0)
    def _():
        scratch.dcount_prefix[...] = from_row(scratch.saved_prefixes[pl.ds(slot, 1), :])


def _plain_until(step: BackwardStep, span: Span) -> Array:
    """The last full block of keys that no query counts any more."""
    if step.plan.cope is None:
        return span.full_last
    lowest = jnp.min(step.residuals.carries[...], axis=1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, lowest.shape, 0)
    done = (lowest >= step.plan.cope.last - PLACE_OFFSET) & (index <= span.full_last)
    return jnp.max(jnp.where(done, index.astype(jnp.float32), -1.0)).astype(jnp.int32)


def _finish(step: BackwardStep, dquery, slot: Array) -> None:
    """Adds the gradients of the queries' products with the table; stores the queries' gradients."""
    plan, inputs, scratch = step.plan, step.inputs, step.scratch
    if plan.cope is not None:
        total = reduce_lanes(scratch.dlogits_total[...], jnp.sum)
        positions = plan.cope.positions
        dz = counting.second_differences(scratch.ramp_sums[...], total, positions) * LN2
        scratch.dquery[...] += matmul(dz / gradient_scale(plan), inputs.table[...])
        dtable = step.gradients.table
        dtable[step.head] += matmul(dz, inputs.query[...].astype(jnp.float32), TN)
        scratch.saved_prefixes[pl.ds(slot, 1), :] = to_row(scratch.dcount_prefix[...])
    _copy(scratch.dquery, dquery, scratch.copy_done)


def _copy(source, target, semaphore) -> None:
    copy = pltpu.make_async_copy(source, target, semaphore)
    copy.start()
    copy.wait()
