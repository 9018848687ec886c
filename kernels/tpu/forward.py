"""The forward kernel.

    output_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j        over the keys j that i sees

| grid axis | walks                                 | holds                                      |
|-----------|---------------------------------------|--------------------------------------------|
| batch     |                                       |                                            |
| head      |                                       |                                            |
| queries   | blocks of queries                     | output, softmax and count of the block     |
| memory    | parts of the keys, from right to left | keys and values of `TpuBlocks.memory` keys |

Inside, loops over the masked blocks of keys on the right, the full ones up to where every count has
reached the end of the table, the other full ones (plain attention), and the masked ones on the
left. Logits and their log-sum-exp are in units of ln 2.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.kernels.common import MASKED
from posjax.kernels.tpu import counting, forward_pipeline, registers, relative, tiles
from posjax.kernels.tpu.arrays import Inputs, Outputs
from posjax.kernels.tpu.counting import PLACE_OFFSET
from posjax.kernels.tpu.forward_step import (
    ForwardScratch,
    ForwardStages,
    ForwardStep,
    add_values,
    save_carry,
    softmax_weights,
)
from posjax.kernels.tpu.plan import LANES, GridIndices, Layout, Plan, compiler_params
from posjax.kernels.tpu.tables import table_scratch
from posjax.masks import Ranges, Span
from posjax.types import Array
from posjax.varying import alike, varying_like

__all__ = ["forward"]


def forward(plan: Plan, ranges: Ranges, inputs: Inputs) -> Outputs:
    """Output and log-sum-exp; for the gradients of a contextual bias also the rest of `Outputs`."""
    if plan.cope is not None:
        inputs = inputs._replace(lower_triangle=counting.triangle())
    layout = Layout.of(plan, inputs)
    at = GridIndices(
        batch=lambda b, n, i, m, _: b,
        head=lambda b, n, i, m, _: n,
        query=lambda b, n, i, m, _: i,
        memory=lambda b, n, i, m, table: _part(layout, ranges.span(table, b, i), m),
    )
    outputs = layout.outputs()
    kernel = pl.pallas_call(
        functools.partial(_kernel, plan, layout, ranges),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(layout.batch, layout.heads, layout.query_blocks, layout.parts),
            in_specs=[layout.input_specs(inputs, at)],
            out_specs=[layout.output_specs(outputs, at)],
            scratch_shapes=[_scratch(plan, layout)],
        ),
        out_shape=[varying_like(inputs, outputs)],
        compiler_params=compiler_params("parallel", "parallel", "arbitrary", "arbitrary"),
        cost_estimate=layout.cost(products=2),
        name="posjax_attention_forward",
    )
    (outputs,) = kernel(*alike((ranges.flat, inputs)))
    return outputs


def _scratch(plan: Plan, layout: Layout) -> ForwardScratch:
    """Shapes of the memory."""
    rows, keys = plan.blocks.query, plan.blocks.key
    lanes, tile = (pltpu.VMEM((rows, size), jnp.float32) for size in (LANES, keys))
    output = pltpu.VMEM((rows, layout.value_size), jnp.float32)
    scratch = ForwardScratch(maximum=lanes, total=lanes, output=output)
    if plan.relative:
        scratch = scratch._replace(band=relative.band_scratch(plan))
    if plan.cope is None:
        return scratch
    packed = registers.packed_shape(rows, keys, layout.dtype)
    stages = ForwardStages(
        next_logits=tile,
        next_gate_logits=tile if plan.cope.own_gate_key else None,
        negative_logits=tile,
        lane_prefix=tile,
        lane_total=lanes,
        count_before_lane=lanes,
        lane_minimum=lanes,
        next_shrink=lanes,
        shrink=lanes,
        weights=pltpu.VMEM(packed.shape, packed.dtype),
    )
    return scratch._replace(
        carry=lanes,
        saved_carries=pltpu.VMEM((layout.carry_groups, rows, LANES), jnp.float32),
        tables=table_scratch(plan),
        stages=stages,
    )


def _part(layout: Layout, span: Span, walked: Array) -> Array:
    """The part of the keys after some others; the nearest that is seen if nothing of it is."""
    blocks = layout.part_blocks
    return jnp.clip(
        layout.parts - 1 - walked, span.first // blocks, jnp.maximum(span.last, 0) // blocks
    )


def _kernel(
    plan: Plan,
    layout: Layout,
    ranges: Ranges,
    range_table,
    inputs: Inputs,
    outputs: Outputs,
    scratch: ForwardScratch,
) -> None:
    b, i, m = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    first_block = (layout.parts - 1 - m) * layout.part_blocks
    step = ForwardStep(plan, inputs, scratch, first_block, layout.query_blocks - 1 - i)

    @pl.when(m == 0)
    def _():
        _begin(step, i)

    span, last_block = ranges.span(range_table, b, i), first_block + layout.part_blocks - 1
    inside = lambda low, high: (  # noqa: E731
        jnp.maximum(low, first_block),
        jnp.minimum(high, last_block),
    )

    def walk_side(number, _):
        """On the right the masked blocks and then the full ones; on the left the masked ones."""
        right = number == 0
        masked_low, masked_high = inside(
            jnp.where(right, span.full_last + 1, span.first),
            jnp.where(right, span.last, span.full_first - 1),
        )
        full_low, full_high = inside(
            span.full_first, jnp.where(right, span.full_last, span.full_first - 1)
        )
        further = jnp.where(right, full_low, masked_low)
        index = _careful_tiles(step, masked_high, masked_low, further)
        _full_tiles(step, jnp.minimum(full_high, index), full_low)

    jax.lax.fori_loop(0, 2, walk_side, None)

    @pl.when(m == layout.parts - 1)
    def _():
        _finish(step, outputs)


def _begin(step: ForwardStep, i: Array) -> None:
    """Softmax and counts of no keys; the table of each query."""
    plan, scratch = step.plan, step.scratch
    scratch.maximum[...] = jnp.full(scratch.maximum.shape, MASKED, jnp.float32)
    scratch.total[...] = jnp.zeros(scratch.total.shape, jnp.float32)
    scratch.output[...] = jnp.zeros(scratch.output.shape, jnp.float32)
    if plan.cope is None:
        return
    shape, never = scratch.carry.shape, float(plan.cope.positions)
    row = i * plan.blocks.query + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    # Rows of padding have nothing to count, so that the walk need not wait for them.
    scratch.carry[...] = jnp.where(row < plan.queries, -PLACE_OFFSET, never)
    scratch.saved_carries[...] = jnp.full(scratch.saved_carries.shape, never, jnp.float32)
    tiles.fill_tables(plan, step.inputs, scratch.tables)


def _careful_tiles(step: ForwardStep, high: Array, low: Array, further: Array) -> Array:
    """Adds the blocks high ... low with their masks; the block to go on with.

    Goes on down to `further` as long as there is something to count that the pipeline cannot.
    """
    going_on = lambda index: index >= low  # noqa: E731
    if step.plan.cope is not None:
        stop = jnp.where(forward_pipeline.bound_is_near(step), low, further)
        going_on = lambda index: (  # noqa: E731
            (index >= low) | (index >= stop) & ~forward_pipeline.is_saturated(step)
        )
    add = functools.partial(_add_tile, step, masked=True, counts=True)
    return jax.lax.while_loop(going_on, add, high)


def _full_tiles(step: ForwardStep, high: Array, low: Array) -> None:
    """Adds the blocks high ... low, of which every query sees every key."""
    if step.plan.cope is not None and not step.plan.relative:
        high = forward_pipeline.run_counting_pipeline(step, high, low)
    add = functools.partial(_add_tile, step, masked=False, counts=False)
    jax.lax.while_loop(lambda index: index >= low, add, high)


def _add_tile(step: ForwardStep, index: Array, *, masked: bool, counts: bool) -> Array:
    """Adds one block of keys; the number of the block on its left."""
    plan, scratch, tile = step.plan, step.scratch, step.tile(index, masked)
    if counts and plan.cope is not None:
        save_carry(scratch, index)
        counted, scratch.carry[...] = tiles.count(tile, scratch.carry[...])
        logits, _ = tiles.biased_logits(plan, scratch.tables, counted, slopes=False)
    else:
        logits = tiles.plain_logits(tile)
    if plan.relative:
        relative.fill_band(plan, step.inputs.strips, scratch.band, step.blocks_after, index)
        logits = relative.add_band(plan, scratch.band, logits)
    weights, shrink = softmax_weights(scratch, tile.hide, logits)
    add_values(step, tile, registers.join(weights), shrink)
    return index - 1


def _finish(step: ForwardStep, outputs: Outputs) -> None:
    """Divides by the sums of weights; a row that has seen nothing is 0."""
    scratch = step.scratch
    total = registers.reduce_lanes(scratch.total[...], jnp.sum)
    total = jnp.where(total == 0, 1.0, total)
    size = outputs.output.shape[1]
    output = scratch.output[...] / registers.broadcast_lanes(total, size)
    rounded = output.astype(outputs.output.dtype)
    outputs.output[...] = rounded
    if outputs.output_residual is not None:
        residual = output - rounded.astype(jnp.float32)
        outputs.output_residual[...] = residual.astype(rounded.dtype)
    outputs.lse[...] = registers.to_row(scratch.maximum[...] + jnp.log2(total))
    if step.plan.cope is None:
        return
    blocks = outputs.carries.shape[0]
    for group in range(scratch.saved_carries.shape[0]):
        rows = slice(group * LANES, min(blocks, (group + 1) * LANES))
        turned = jnp.transpose(scratch.saved_carries[group])
        outputs.carries[rows, :] = turned[: rows.stop - rows.start]
