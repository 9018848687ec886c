"""The backward kernel of queries: their gradients, and those of their tables.

It walks from left to right, 64 keys at a time in two halves, because the gradient of a gate is a
sum over the keys on its left. Places come from the right; the forward kernel kept one every 32
keys.

The gradient of a table adds up dlogits over the keys of each bin. Places fall from key to key by
less than 1, so each bin's keys are neighbours, and its sums are differences of running sums: where
the next key lies in a lower bin the sums so far go to the bin's slot. `tables.table_gradients`
makes the rest of it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.gpu import bands
from posjax.kernels.gpu.diagonals import collect
from posjax.kernels.gpu.gradients import (
    HALF,
    PAIR,
    Counted,
    Rows,
    gradients_of,
    of_gates,
    of_keys,
    scan,
    unit,
)
from posjax.kernels.gpu.instructions import column, multiply_into, store_crossings
from posjax.kernels.gpu.layout import (
    Refs,
    fits,
    launch,
    matrix,
    per_row,
    share_registers,
    with_barriers,
)
from posjax.kernels.gpu.plan import GROUPS, ROWS, Plan
from posjax.kernels.gpu.tiles import Place, Tile, gate_bias
from posjax.kernels.gpu.walk import (
    Queries,
    Ring,
    fetched,
    keys_of,
    loop_up,
    own_span,
    union,
)
from posjax.kernels.ranges import Ranges, Span
from posjax.types import Array, Float

__all__ = ["query_gradients"]

# Bytes of a row of the keys of a tile.
_SWIZZLE = 2 * HALF
# Before every block of keys.
_NOWHERE = -1
_STAGES = (4, 3, 2, 1)


class Walk(NamedTuple):
    """Sums over the keys so far: of gradients, and in the last four of what needs counts."""

    query: Float[Array, "64 H"]
    left: Float[Array, "64"] | None
    total: Float[Array, "64"] | None
    moment: Float[Array, "64"] | None
    gate_bias: Float[Array, "64 8"] | None


def query_gradients(plan: Plan, ranges: Ranges, inputs: dict[str, Array]) -> dict[str, Array]:
    """The query's gradient [B, T, N, H]; with a contextual bias also these.

    `prefixes` [B, N, S / 64, T]: sums of dplace on the left of every 64 keys that count; `slots`
    [B, N, T, words], `total` and `moment` [B, N, T]: running sums where places cross into a lower
    bin, and at the end; `gate_bias_gradient` [B, N, T]: sums of dx. With a bias of the distance
    that trains also `bands_gradient`, see `bands.gradient_shape`.
    """
    batch, length, heads, size = inputs["query"].shape
    shape = (batch, length, heads, size)
    outputs = {"query_gradient": jax.ShapeDtypeStruct(shape, inputs["query"].dtype)}
    if plan.contextual is not None:
        rows = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
        words = inputs["unwritten"].shape[1]
        prefixes = (batch, heads, inputs["key"].shape[1] // PAIR, length)
        outputs |= {
            "prefixes": jax.ShapeDtypeStruct(prefixes, jnp.float32),
            "slots": jax.ShapeDtypeStruct((batch, heads, length, words), jnp.float32),
            **dict.fromkeys(("total", "moment", "gate_bias_gradient"), rows),
        }
    if plan.trained:
        shape = bands.gradient_shape(inputs)
        outputs["bands_gradient"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    groups = _groups(plan)
    # Halves in shared memory: as many as there is room for.
    scratches = [_scratch(plan, groups, stages, inputs) for stages in _STAGES]
    return launch(
        functools.partial(_kernel, plan, ranges, groups),
        inputs,
        outputs,
        grid={"head": heads, "tile": length // (ROWS * groups), "batch": batch},
        scratch=next(filter(fits, scratches), scratches[-1]),
        name="posjax_attention_backward_queries",
        groups=groups,
    )


def _groups(plan: Plan) -> int:
    """Warpgroups that compute: large tables, slots and sums leave no room for a second one's."""
    if plan.contextual is None:
        return GROUPS
    return 1 if plan.contextual.positions > 64 or plan.trained else GROUPS


def _scratch(plan: Plan, groups: int, stages: int, inputs: dict[str, Array]) -> dict:
    dtype, size = inputs["query"].dtype, inputs["query"].shape[3]
    operand = functools.partial(matrix, swizzle=_SWIZZLE)
    own = dict.fromkeys(("query", "cotangent"), operand((groups, ROWS, size), dtype))
    constants = {}
    if plan.contextual is not None:
        shapes = {"tables": inputs["tables"].shape[3], "slots": inputs["unwritten"].shape[1]}
        own |= {n: plgpu.SMEM((groups, ROWS, words), jnp.float32) for n, words in shapes.items()}
        constants["lower"] = operand((HALF, HALF), jnp.float16)
        constants["upper"] = operand((HALF, HALF), jnp.bfloat16)
    passing = dict.fromkeys(fetched(plan), operand((stages, HALF, size), dtype))
    if plan.relative:
        passing["bands"] = plgpu.SMEM((stages, groups * ROWS + HALF), jnp.float32)
    scratch = with_barriers(own=own, constants=constants, passing=passing, groups=groups)
    return scratch | (bands.scratch_shapes(groups) if plan.trained else {})


def _kernel(plan: Plan, ranges: Ranges, groups: int, refs: Refs, scratch: Refs) -> None:
    batch, head, group = (jax.lax.axis_index(name) for name in ("batch", "head", "group"))
    tile = refs["query"].shape[1] // (ROWS * groups) - 1 - jax.lax.axis_index("tile")
    pairs = plan.blocks.key // PAIR
    spans = [
        _in_pairs(ranges.span(refs["ranges"], batch, tile * groups + g), pairs)
        for g in range(groups)
    ]
    low, high = union(spans)
    ring = Ring(plan, scratch, fetched(plan), scratch["key"].shape[0], 2 * low, 1)

    @pl.when(group == groups)
    def _():
        share_registers(groups, computes=False)
        rows = pl.ds(tile * groups * ROWS, groups * ROWS)
        sources = keys_of(refs, batch, head, rows, HALF)
        ring.fetch(2 * jnp.maximum(high - low + 1, 0), sources)

    @pl.when(group < groups)
    def _():
        share_registers(groups, computes=True)
        place = Place(batch, head, (tile * groups + group) * ROWS, jnp.int32(0))
        queries = Queries(plan, refs, scratch, group, place, ring, gate_bias(plan, refs, head))
        _compute(queries, own_span(spans, group), high, low)


def _in_pairs(span: Span, pairs: int) -> Span:
    """From blocks of `GpuBlocks.key` keys to 64 keys."""
    first, full_first, full_last, last = span
    end = pairs - 1
    return Span(first * pairs, full_first * pairs, full_last * pairs + end, last * pairs + end)


def _compute(queries: Queries, span: Span, high: Array, low: Array) -> None:
    """All of one warpgroup."""
    plan, size = queries.plan, queries.refs["query"].shape[3]
    own = plan.contextual is not None
    queries.fetch_own(["query", "cotangent"], ["tables"] * own, ["lower", "upper"] * own)
    if own:
        queries.fill("slots", "unwritten")
    if plan.trained:
        bands.clear(queries)
    zeros = lambda n: plgpu.layout_cast(jnp.zeros((ROWS, n), jnp.float32), plgpu.Layout.WGMMA)  # noqa: E731
    sums = [*[per_row(0.0)] * 3, zeros(8)] if own else [None] * 4
    walk = Walk(zeros(size), *sums)
    first = queries.tile(jnp.int32(0), 0, HALF)
    rows = Rows(first.per_query("lse"), first.per_query("delta"), None)
    careful, band, plain = (
        functools.partial(_pair, queries, rows, counts=counts and own, masked=masked)
        for counts, masked in ((True, True), (True, False), (False, False))
    )
    last_plain = span.full_last
    if own:
        pairs = plan.blocks.key // PAIR
        last_plain = queries.number("plain") * pairs + pairs - 1

    def side(number, loop):
        """On the left of the full ones and over them; on the right of them; the rest."""
        choose = lambda a, b, c: jnp.where(number == 0, a, jnp.where(number == 1, b, c))  # noqa: E731
        loop = loop_up(choose(span.first - 1, _NOWHERE, high), _skip(queries.ring), loop)
        loop = loop_up(choose(span.full_first - 1, span.last, _NOWHERE), careful, loop)
        full = choose(span.full_last, _NOWHERE, _NOWHERE)
        loop = loop_up(jnp.minimum(full, last_plain), plain, loop)
        return loop_up(full, band, loop) if own else loop

    _, walk = jax.lax.fori_loop(0, 3, side, (low, walk))
    queries.send("query_gradient", (walk.query * unit(plan)).astype(queries.refs["query"].dtype))
    if own:
        queries.save("total", walk.total)
        queries.save("moment", walk.moment)
        queries.save("gate_bias_gradient", jnp.sum(walk.gate_bias, axis=1))
        queries.send_rows("slots")


def _skip(ring: Ring):
    def body(index, walk):
        return ring.skip(2 * index + 1, ring.skip(2 * index, walk))

    return body


def _pair(
    queries: Queries, rows: Rows, index: Array, walk: Walk, *, counts: bool, masked: bool
) -> Walk:
    """64 keys, the left half first."""
    ring = queries.ring
    left, right = (queries.tile(2 * index + n, 0, HALF) for n in range(2))
    ring.wait(ring.names, 2 * index)
    ring.wait(ring.names, 2 * index + 1)
    if counts:
        walk = _apart(walk)
        left.save("prefixes", walk.left, index)
    for number, tile in enumerate((left, right)):
        walk = _half(tile, rows, walk, number * HALF, counts=counts, masked=masked)
        ring.release(ring.names, 2 * index + number)
    if queries.plan.trained:
        bands.send(queries, index)
    return walk


def _apart(walk: Walk) -> Walk:
    """The same sums in registers of their own.

    ptxas makes all matrix instructions wait for each other (its message C7511) where accumulators
    begin in a register that a loop carries on. Adding 0 is a copy that no compiler leaves out.
    """
    names = ("left", "total", "moment")
    return walk._replace(**{name: getattr(walk, name) + 0.0 for name in names})


def _half(tile: Tile, rows: Rows, walk: Walk, start: int, *, counts: bool, masked: bool) -> Walk:
    """32 keys, `start` of the same 64 before them."""
    plan, dtype = tile.plan, tile.operands["key"].dtype
    multiply = functools.partial(multiply_into, emulated=plan.emulated)
    rows = rows._replace(left=walk.left)
    counted, found = gradients_of(tile, rows, counts=counts, masked=masked)
    if plan.trained:
        collect(tile.operands["sums"], found.dlogits, start=start, emulated=plan.emulated)
    query = multiply(walk.query, of_keys(plan, found).astype(dtype), tile.operands["key"])
    if counted is None:
        return walk._replace(query=query)
    if plan.contextual.own_gate_key:
        query = multiply(query, of_gates(plan, found).astype(dtype), tile.operands["gate_key"])
    if plan.contextual.gate_bias:
        walk = walk._replace(gate_bias=_added(walk.gate_bias, found.dx))
    total, moment = _table_sums(tile, counted, found.dlogits, walk)
    return walk._replace(query=query, left=found.left, total=total, moment=moment)


def _added(total: Float[Array, "64 8"], x: Float[Array, "64 n"]) -> Float[Array, "64 8"]:
    """Every eighth column; the rest of the sum takes other threads' numbers, once in the end."""
    for start in range(0, x.shape[1], total.shape[1]):
        total = total + x[:, start : start + total.shape[1]]
    return total


def _table_sums(tile: Tile, counted: Counted, dlogits: Array, walk: Walk) -> tuple[Array, Array]:
    """Running sums of dlogits and of dlogits times where in their bin, to slots and onward."""
    contextual = tile.plan.contextual
    totals = scan(tile, dlogits, walk.total)
    moments = scan(tile, dlogits * counted.values.fraction, walk.moment)
    store_crossings(
        tile.operands["slots"],
        tile.operands["tables"],
        counted.places,
        counted.gates,
        totals,
        moments,
        last=contextual.last,
        gate_unit=contextual.gate_unit,
        emulated=tile.plan.emulated,
    )
    last = functools.partial(column, index=tile.size - 1, emulated=tile.plan.emulated)
    return last(totals), last(moments)
