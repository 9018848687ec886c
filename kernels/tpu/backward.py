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
from posjax.kernels.ranges import Ranges, Span
from posjax.kernels.tpu import backward_pipeline, counting, gradients, relative, tables, tiles
from posjax.kernels.tpu.counting import HALF
from posjax.kernels.tpu.gradients import Block
from posjax.kernels.tpu.layout import Indices, Layout, compiler_params
from posjax.kernels.tpu.plan import LANES, Plan
from posjax.kernels.tpu.registers import (
    TN,
    matmul,
    over_lanes,
    row_of,
    rows_of,
)
from posjax.types import Array

__all__ = ["backward"]


def backward(plan: Plan, ranges: Ranges, inputs: dict[str, Array]) -> dict[str, Array]:
    """Gradients in float32 of all arrays.

    Those of query and keys lack `gradients.unit`; those of keys and values are [B, K, size, S].

    Args:
        inputs: those of the forward kernel, its log-sum-exp and carries, the cotangent of its
            output, and delta [B, N, 1, T].
    """
    layout = Layout.of(plan, inputs)
    at = Indices(
        batch=lambda b, k, m, g, i, _: b,
        head=lambda b, k, m, g, i, _: k * layout.groups + g,
        query=lambda b, k, m, g, i, _: i,
        memory=lambda b, k, m, g, i, _: m,
    )
    outputs = layout.gradients(at)
    kernel = pl.pallas_call(
        functools.partial(_kernel, plan, layout, ranges),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(layout.batch, layout.kv_heads, layout.parts, layout.groups, layout.query_blocks),
            in_specs=[layout.input_specs(inputs, at)],
            out_specs={name: spec for name, (_, spec) in outputs.items()},
            scratch_shapes=[_scratch(plan, layout)],
        ),
        out_shape={name: shape for name, (shape, _) in outputs.items()},
        compiler_params=compiler_params("parallel", "parallel", *["arbitrary"] * 3),
        cost_estimate=layout.cost(products=5),
        name="posjax_attention_backward",
    )
    return kernel(ranges.flat, inputs)


def _scratch(plan: Plan, layout: Layout) -> dict:
    """What lives while a block of queries walks; `carried` waits for the next part of the keys."""
    rows = plan.blocks.query
    shapes = {"query": (rows, layout.size), "lse": (rows, LANES), "delta": (rows, LANES)}
    if plan.contextual is not None:
        table = (rows, plan.pieces * LANES)
        shapes |= {"hinge": table, "total": (rows, LANES)}
        shapes |= {"saved": (layout.carry_groups, rows, LANES), "prefix": (rows, LANES)}
        shapes |= {"carried": (layout.groups * layout.query_blocks, rows)}
    scratch = {name: pltpu.VMEM(shape, jnp.float32) for name, shape in shapes.items()}
    for name, size in (("query", layout.size), ("cotangent", layout.value_size)):
        scratch[f"{name}_turned"] = pltpu.VMEM((size, rows), layout.dtype)
    scratch["transfer"] = pltpu.SemaphoreType.DMA(())
    if plan.contextual is not None:
        scratch |= tables.scratch_shapes(plan) | backward_pipeline.scratch_shapes(
            plan, layout.dtype
        )
    if plan.relative:
        scratch |= relative.scratch_shapes(plan, gradient=True)
    return scratch


def _kernel(plan: Plan, layout: Layout, ranges: Ranges, numbers, inputs, outputs, scratch):
    b, k, m, g, i = (pl.program_id(axis) for axis in range(5))
    after = layout.query_blocks - 1 - i
    block = Block(plan, inputs, outputs, scratch, m * layout.part_blocks, g, after)
    span = ranges.span(numbers, b, i)
    slot = g * layout.query_blocks + i

    @pl.when((g == 0) & (i == 0))
    def _():
        _clear(outputs, ("key", "value", "gate_key"))

    @pl.when((m == 0) & (g == 0) & (i == 0))
    def _():
        _clear(outputs, ("table", "gate_bias", "strips"))

    rows = pl.ds(i * plan.blocks.query, plan.blocks.query)
    dquery = outputs["query"].at[b, k * layout.groups + g, rows, :]
    _begin(block, dquery, m, slot)
    edge = _plain_until(block, span)
    add = functools.partial(gradients.add_tile, block)
    inside = lambda low, high: (  # noqa: E731
        jnp.maximum(low, block.start),
        jnp.minimum(high, block.start + layout.part_blocks - 1),
    )

    def side(number, _):
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
        if plan.contextual is not None:
            low, high = inside(jnp.maximum(span.full_first, edge + 1), full_last)
            if plan.contextual.own_gate_key or plan.relative:
                _rightwards(low, high, functools.partial(add, masked=False, counts=True))
            else:
                backward_pipeline.count_on(block, low, high)

    jax.lax.fori_loop(0, 2, side, None)
    _finish(block, dquery, slot)


def _rightwards(low: Array, high: Array, body: Callable) -> None:
    jax.lax.fori_loop(low, high + 1, lambda index, _: body(index), None)


def _clear(outputs: dict, names: tuple[str, ...]) -> None:
    for name in names:
        if name in outputs:
            outputs[name][...] = jnp.zeros(outputs[name].shape, jnp.float32)


def _begin(block: Block, dquery, part: Array, slot: Array) -> None:
    """What each query needs, and sums: of nothing, or from the part of the keys before."""
    inputs, scratch = block.inputs, block.scratch
    scratch["lse"][...] = rows_of(inputs["lse"][...])
    scratch["delta"][...] = rows_of(inputs["delta"][...])
    # Once for each block of queries, so that no tile turns them.
    for name in ("query", "cotangent"):
        scratch[f"{name}_turned"][...] = jnp.transpose(inputs[name][...])
    _clear(scratch, ("hinge", "total"))

    @pl.when(part == 0)
    def _():
        _clear(scratch, ("query", "prefix"))

    @pl.when(part > 0)
    def _():
        _transfer(dquery, scratch["query"], scratch["transfer"])

    if block.plan.contextual is None:
        return
    tiles.fill_tables(block.plan, inputs, scratch)
    carries = inputs["carries"]
    for group in range(scratch["saved"].shape[0]):
        some = carries[group * LANES : min(carries.shape[0], (group + 1) * LANES), :]
        missing = jnp.zeros((LANES - some.shape[0], some.shape[1]), jnp.float32)
        whole = jnp.concatenate([some, missing]) if missing.shape[0] else some
        scratch["saved"][group] = jnp.transpose(whole)

    @pl.when(part > 0)
    def _():
        scratch["prefix"][...] = rows_of(scratch["carried"][pl.ds(slot, 1), :])


def _plain_until(block: Block, span: Span) -> Array:
    """The last full block of keys that no query counts any more."""
    if block.plan.contextual is None:
        return span.full_last
    lowest = jnp.min(block.inputs["carries"][...], axis=1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, lowest.shape, 0)
    done = (lowest >= block.plan.contextual.last - HALF) & (index <= span.full_last)
    return jnp.max(jnp.where(done, index.astype(jnp.float32), -1.0)).astype(jnp.int32)


def _finish(block: Block, dquery, slot: Array) -> None:
    """Hands the gradients of the queries' tables on to queries and table."""
    plan, inputs, outputs, scratch = block.plan, block.inputs, block.outputs, block.scratch
    if plan.contextual is not None:
        total = over_lanes(scratch["total"][...], jnp.sum)
        positions = plan.contextual.positions
        dz = counting.second_differences(scratch["hinge"][...], total, positions) * LN2
        scratch["query"][...] += matmul(dz / gradients.unit(plan), inputs["table"][...])
        outputs["table"][block.head] += matmul(dz, inputs["query"][...].astype(jnp.float32), TN)
        scratch["carried"][pl.ds(slot, 1), :] = row_of(scratch["prefix"][...])
    _transfer(scratch["query"], dquery, scratch["transfer"])


def _transfer(source, target, semaphore) -> None:
    copy = pltpu.make_async_copy(source, target, semaphore)
    copy.start()
    copy.wait()
