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
from posjax.kernels.ranges import Ranges, Span
from posjax.kernels.tpu import pipeline, registers, relative, tables, tiles
from posjax.kernels.tpu.counting import HALF
from posjax.kernels.tpu.layout import Indices, Layout, compiler_params
from posjax.kernels.tpu.plan import LANES, Plan
from posjax.kernels.tpu.softmax import Block, add_values, save_carry, weigh
from posjax.types import Array

__all__ = ["forward"]


def forward(plan: Plan, ranges: Ranges, inputs: dict[str, Array]) -> dict[str, Array]:
    """Output [B, N, T, E], log-sum-exp [B, N, 1, T] and, with a contextual bias, carries.

    In bfloat16 with a contextual bias also `rest`, what rounding took from the output: it would
    tilt the gradients of a whole row, which those of the gates add up. Carries [B, N, blocks of
    keys, T] are the counts on the right of each block of keys, less 1/2;
    or more than there are positions, where the block was plain attention.
    """
    layout = Layout.of(plan, inputs)
    at = Indices(
        batch=lambda b, n, i, m, _: b,
        head=lambda b, n, i, m, _: n,
        query=lambda b, n, i, m, _: i,
        memory=lambda b, n, i, m, numbers: _part(layout, ranges.span(numbers, b, i), m),
    )
    outputs = layout.outputs(at)
    kernel = pl.pallas_call(
        functools.partial(_kernel, plan, layout, ranges),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(layout.batch, layout.heads, layout.query_blocks, layout.parts),
            in_specs=[layout.input_specs(inputs, at)],
            out_specs={name: spec for name, (_, spec) in outputs.items()},
            scratch_shapes=[_scratch(plan, layout)],
        ),
        out_shape={name: shape for name, (shape, _) in outputs.items()},
        compiler_params=compiler_params("parallel", "parallel", "arbitrary", "arbitrary"),
        cost_estimate=layout.cost(products=2),
        name="posjax_attention_forward",
    )
    return kernel(ranges.flat, inputs)


def _part(layout: Layout, span: Span, step: Array) -> Array:
    """The part of the keys at a step of the walk; where nothing of it is seen, the nearest seen."""
    blocks = layout.part_blocks
    return jnp.clip(
        layout.parts - 1 - step, span.first // blocks, jnp.maximum(span.last, 0) // blocks
    )


def _scratch(plan: Plan, layout: Layout) -> dict:
    """What lives while a block of queries walks over its keys."""
    rows = plan.blocks.query
    shapes = {"maximum": (rows, LANES), "total": (rows, LANES), "output": (rows, layout.value_size)}
    if plan.contextual is not None:
        shapes |= {"carry": (rows, LANES), "saved": (layout.carry_groups, rows, LANES)}
    scratch = {name: pltpu.VMEM(shape, jnp.float32) for name, shape in shapes.items()}
    if plan.contextual is not None:
        scratch |= tables.scratch_shapes(plan) | pipeline.scratch_shapes(plan, layout.dtype)
    if plan.relative:
        scratch |= relative.scratch_shapes(plan, gradient=False)
    return scratch


def _kernel(plan: Plan, layout: Layout, ranges: Ranges, numbers, inputs, outputs, scratch):
    b, i, m = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    start = (layout.parts - 1 - m) * layout.part_blocks
    block = Block(plan, inputs, scratch, start, layout.query_blocks - 1 - i)

    @pl.when(m == 0)
    def _():
        _begin(block, i)

    span, end = ranges.span(numbers, b, i), start + layout.part_blocks - 1
    inside = lambda low, high: (jnp.maximum(low, start), jnp.minimum(high, end))  # noqa: E731

    def side(number, _):
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
        index = _careful_tiles(block, masked_high, masked_low, further)
        _full_tiles(block, jnp.minimum(full_high, index), full_low)

    jax.lax.fori_loop(0, 2, side, None)

    @pl.when(m == layout.parts - 1)
    def _():
        _finish(block, outputs)


def _begin(block: Block, i: Array) -> None:
    """Nothing seen yet; the table of each query."""
    plan, inputs, scratch = block.plan, block.inputs, block.scratch
    scratch["maximum"][...] = jnp.full(scratch["maximum"].shape, MASKED, jnp.float32)
    scratch["total"][...] = jnp.zeros(scratch["total"].shape, jnp.float32)
    scratch["output"][...] = jnp.zeros(scratch["output"].shape, jnp.float32)
    if plan.contextual is None:
        return
    shape, never = scratch["carry"].shape, float(plan.contextual.positions)
    row = i * plan.blocks.query + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    # Rows of padding have nothing to count, so that the walk need not wait for them.
    scratch["carry"][...] = jnp.where(row < plan.queries, -HALF, never)
    scratch["saved"][...] = jnp.full(scratch["saved"].shape, never, jnp.float32)
    tiles.fill_tables(plan, inputs, scratch)


def _careful_tiles(block: Block, high: Array, low: Array, further: Array) -> Array:
    """The blocks high ... low with their masks; the block to go on with.

    Down to `further` as long as there is something to count that the pipeline cannot.
    """
    going_on = lambda index: index >= low  # noqa: E731
    if block.plan.contextual is not None:
        stop = jnp.where(pipeline.suits(block), low, further)
        going_on = lambda index: (  # noqa: E731
            (index >= low) | (index >= stop) & ~pipeline.is_finished(block)
        )
    step = functools.partial(_tile, block, masked=True, counts=True)
    return jax.lax.while_loop(going_on, step, high)


def _full_tiles(block: Block, high: Array, low: Array) -> None:
    """The blocks high ... low, of which every query sees every key."""
    if block.plan.contextual is not None and not block.plan.relative:
        high = pipeline.count_on(block, high, low)
    step = functools.partial(_tile, block, masked=False, counts=False)
    jax.lax.while_loop(lambda index: index >= low, step, high)


def _tile(block: Block, index: Array, *, masked: bool, counts: bool) -> Array:
    """Adds one block of keys; the block on its left."""
    tile = block.tile(index, masked)
    if counts and block.plan.contextual is not None:
        save_carry(block.scratch, index)
        counted, block.scratch["carry"][...] = tiles.count(tile, block.scratch["carry"][...])
        logits, _ = tiles.biased(block.plan, block.scratch, counted, slopes=False)
    else:
        logits = tiles.plain_logits(tile)
    if block.plan.relative:
        relative.fill(block.plan, block.inputs, block.scratch, block.after, index)
        logits = relative.add(block.plan, block.scratch, logits)
    weights, shrink = weigh(block, tile.hide, logits)
    add_values(block, tile, registers.join(weights), shrink)
    return index - 1


def _finish(block: Block, outputs: dict) -> None:
    """Divides; a row that has seen nothing is 0."""
    scratch = block.scratch
    total = registers.over_lanes(scratch["total"][...], jnp.sum)
    total = jnp.where(total == 0, 1.0, total)
    size = outputs["output"].shape[1]
    output = scratch["output"][...] / registers.wide(total, size)
    rounded = output.astype(outputs["output"].dtype)
    outputs["output"][...] = rounded
    if "rest" in outputs:
        outputs["rest"][...] = (output - rounded.astype(jnp.float32)).astype(rounded.dtype)
    outputs["lse"][...] = registers.row_of(scratch["maximum"][...] + jnp.log2(total))
    if block.plan.contextual is not None:
        count = outputs["carries"].shape[0]
        for group in range(scratch["saved"].shape[0]):
            rows = slice(group * LANES, min(count, (group + 1) * LANES))
            turned = jnp.transpose(scratch["saved"][group])
            outputs["carries"][rows, :] = turned[: rows.stop - rows.start]
