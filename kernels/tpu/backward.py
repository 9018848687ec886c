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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.kernels.tpu import counting, tiles
from posjax.kernels.tpu.counting import HALF
from posjax.kernels.tpu.layout import Indices, Layout, compiler_params
from posjax.kernels.tpu.plan import LANES, LN2, Plan, Ranges, Span
from posjax.kernels.tpu.registers import (
    NT,
    TN,
    added,
    chunks,
    join,
    matmul,
    over_lanes,
    row_of,
    rows_of,
)
from posjax.kernels.tpu.tiles import Chunks, Scores, Tile
from posjax.types import Array

__all__ = ["backward"]


def backward(plan: Plan, ranges: Ranges, inputs: dict[str, Array]) -> dict[str, Array]:
    """Gradients in float32 of all arrays; those of the query in parts, to be added up.

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
        shapes |= {"middle": table, "slope": table, "hinge": table, "total": (rows, LANES)}
        shapes |= {"saved": (layout.carry_groups, rows, LANES), "prefix": (rows, LANES)}
        shapes |= {"carried": (layout.groups * layout.query_blocks, rows)}
    return {name: pltpu.VMEM(shape, jnp.float32) for name, shape in shapes.items()}


class _Block(NamedTuple):
    """One place of the grid: what is static, and what can be read and written."""

    plan: Plan
    inputs: dict
    outputs: dict
    scratch: dict
    start: Array  # the first block of keys in memory
    head: Array  # number of the query head in its group


def _kernel(plan: Plan, layout: Layout, ranges: Ranges, numbers, inputs, outputs, scratch):
    b, m, g, i = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    block = _Block(plan, inputs, outputs, scratch, m * layout.part_blocks, g)
    span = ranges.span(numbers, b, i)
    slot = g * layout.query_blocks + i

    @pl.when((g == 0) & (i == 0))
    def _():
        _clear(outputs, ("key", "value", "gate_key"))

    @pl.when((m == 0) & (g == 0) & (i == 0))
    def _():
        _clear(outputs, ("table", "gate_bias"))

    _begin(block, m, slot)
    edge = _plain_until(block, span)
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
        _rightwards(low, high, functools.partial(_tile, block, masked=True, counts=True))
        full_last = jnp.where(left, span.full_last, span.full_first - 1)
        low, high = inside(span.full_first, jnp.minimum(full_last, edge))
        _rightwards(low, high, functools.partial(_tile, block, masked=False, counts=False))
        if plan.contextual is not None:
            low, high = inside(jnp.maximum(span.full_first, edge + 1), full_last)
            _rightwards(low, high, functools.partial(_tile, block, masked=False, counts=True))

    jax.lax.fori_loop(0, 2, side, None)
    _finish(block, slot)


def _rightwards(low: Array, high: Array, body: Callable) -> None:
    jax.lax.fori_loop(low, high + 1, lambda index, _: body(index), None)


def _clear(outputs: dict, names: tuple[str, ...]) -> None:
    for name in names:
        if name in outputs:
            outputs[name][...] = jnp.zeros(outputs[name].shape, jnp.float32)


def _begin(block: _Block, part: Array, slot: Array) -> None:
    """What each query needs, and sums of nothing; the prefix sum goes on from the part before."""
    inputs, scratch = block.inputs, block.scratch
    scratch["lse"][...] = rows_of(inputs["lse"][...])
    scratch["delta"][...] = rows_of(inputs["delta"][...])
    _clear(scratch, ("query", "hinge", "total"))
    if block.plan.contextual is None:
        return
    scratch["middle"][...], scratch["slope"][...] = tiles.query_tables(inputs)
    carries = inputs["carries"]
    for group in range(scratch["saved"].shape[0]):
        some = carries[group * LANES : min(carries.shape[0], (group + 1) * LANES), :]
        missing = jnp.zeros((LANES - some.shape[0], some.shape[1]), jnp.float32)
        whole = jnp.concatenate([some, missing]) if missing.shape[0] else some
        scratch["saved"][group] = jnp.transpose(whole)

    @pl.when(part == 0)
    def _():
        _clear(scratch, ("prefix",))

    @pl.when(part > 0)
    def _():
        scratch["prefix"][...] = rows_of(scratch["carried"][pl.ds(slot, 1), :])


def _plain_until(block: _Block, span: Span) -> Array:
    """The last full block of keys that no query counts any more."""
    if block.plan.contextual is None:
        return span.full_last
    lowest = jnp.min(block.inputs["carries"][...], axis=1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, lowest.shape, 0)
    done = (lowest >= block.plan.contextual.last - HALF) & (index <= span.full_last)
    return jnp.max(jnp.where(done, index.astype(jnp.float32), -1.0)).astype(jnp.int32)


def _tile(block: _Block, index: Array, *, masked: bool, counts: bool) -> None:
    """Adds the gradients of one block of keys."""
    plan, inputs, scratch = block.plan, block.inputs, block.scratch
    tile = Tile(plan, inputs, index - block.start, masked)
    counts = counts and plan.contextual is not None
    if counts:
        carry = _carry(scratch["saved"], index)
        scores = tiles.contextual_scores(tile, carry, scratch["middle"], scratch["slope"])
    else:
        scores = tiles.plain_scores(tile)
    weights = tile.hide([jnp.exp2(x - scratch["lse"][...]) for x in scores.logits], 0.0)
    cotangent = inputs["cotangent"][...]
    _add_keys(block, tile, "value", join(weights).astype(cotangent.dtype), cotangent)
    dweights = chunks(matmul(cotangent, tile.keys("value"), NT))
    dlogits = [w * (d - scratch["delta"][...]) for w, d in zip(weights, dweights, strict=True)]
    ddots = [x * plan.scale for x in dlogits]
    if counts:
        _add_table(block, scores, dlogits)
        dgates = _gate_gradients(block, scores, dlogits)
        dgates = [x * plan.contextual.gate_scale for x in dgates]
        if plan.contextual.own_gate_key:
            _add_products(block, tile, "gate_key", dgates)
        else:
            ddots = [a + b for a, b in zip(ddots, dgates, strict=True)]
    _add_products(block, tile, "key", ddots)


def _carry(saved, index: Array) -> Array:
    """The count before a block, from the lane where the forward kernel kept it."""
    group = saved[index // LANES]
    lane = jax.lax.broadcasted_iota(jnp.int32, group.shape, 1)
    return over_lanes(jnp.where(lane == index % LANES, group, 0.0), jnp.sum)


def _add_table(block: _Block, scores: Scores, dlogits: Chunks) -> None:
    """Sums from which `_finish` makes the gradients of the table's entries."""
    upper = block.inputs["upper"][...]
    hinge, total = block.scratch["hinge"], block.scratch["total"]
    hinge[...] += counting.hinges(scores.places, dlogits, upper, block.plan.pieces)
    total[...] += added(dlogits)


def _gate_gradients(block: _Block, scores: Scores, dlogits: Chunks) -> Chunks:
    """Gradients of the logits of the gates."""
    prefix = block.scratch["prefix"]
    dcounts = [d * slope for d, slope in zip(dlogits, scores.slopes, strict=True)]
    sums, carry = counting.prefixes(dcounts, prefix[...], block.inputs["upper"][...])
    prefix[...] = carry
    # Slopes are in units of ln 2.
    found = [(g - g * g) * (s * LN2) for g, s in zip(scores.gates, sums, strict=True)]
    if block.plan.contextual.gate_bias:
        rows = jnp.sum(added(found), axis=0, keepdims=True) * LN2
        block.outputs["gate_bias"][block.head] += rows
    return found


def _add_products(block: _Block, tile: Tile, name: str, dproducts: Chunks) -> None:
    """Gradients of query . key, handed on to both."""
    keys = tile.keys(name)
    query = block.inputs["query"][...].astype(keys.dtype)
    joined = join(dproducts).astype(keys.dtype)
    block.scratch["query"][...] += matmul(joined, keys)
    _add_keys(block, tile, name, joined, query)


def _add_keys(block: _Block, tile: Tile, name: str, weights: Array, rows: Array) -> None:
    """Adds weights' sums of rows to the gradients of the block's keys or values."""
    block.outputs[name][tile.here, :] += matmul(weights, rows, TN)


def _finish(block: _Block, slot: Array) -> None:
    """Hands the gradients of the queries' tables on to queries and table."""
    plan, inputs, outputs, scratch = block.plan, block.inputs, block.outputs, block.scratch
    dquery = scratch["query"][...]
    if plan.contextual is not None:
        total = over_lanes(scratch["total"][...], jnp.sum)
        positions = plan.contextual.positions
        dz = counting.second_differences(scratch["hinge"][...], total, positions) * LN2
        dquery += matmul(dz, inputs["table"][...])
        outputs["table"][block.head] += matmul(dz, inputs["query"][...].astype(jnp.float32), TN)
        scratch["carried"][pl.ds(slot, 1), :] = row_of(scratch["prefix"][...])
    outputs["query"][...] = dquery
