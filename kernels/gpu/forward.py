"""The forward kernel.

    output_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j        over the keys j that i sees

Two warpgroups compute, 64 queries each; a third one fetches blocks of keys and values, from right
to left, which both share. A warpgroup goes through these loops:

| loop    | blocks                                                 | tile                        |
|---------|--------------------------------------------------------|-----------------------------|
| skip    | that the other warpgroup needs                         | none                        |
| careful | that are masked in parts                               | mask, count, table          |
| band    | that all queries see, until every count has saturated  | count, table                |
| plain   | the others that all queries see                        | attention without a bias    |

With `GpuBlocks.ping_pong` the two warpgroups take turns: they meet twice in every block of keys,
before the softmax and after it, one of them half a block behind. While one computes its softmax the
matrix units work for the other. Both visit every block, so they meet equally often.

Logits and their log-sum-exp are in units of ln 2.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.common import LOG2E, MASKED
from posjax.kernels.gpu.instructions import multiply_into
from posjax.kernels.gpu.layout import (
    Barriers,
    Refs,
    launch,
    matrix,
    per_row,
    share_registers,
    with_barriers,
)
from posjax.kernels.gpu.plan import GROUPS, ROWS, Plan
from posjax.kernels.gpu.stores import all_reach
from posjax.kernels.gpu.tiles import SAVED, Place, Tile, along_rows, first_place, gate_bias
from posjax.kernels.gpu.walk import Queries, Ring, fetched, keys_of, loop_down, own_span, union
from posjax.kernels.ranges import Ranges, Span
from posjax.types import Array, Float

__all__ = ["forward"]

# Beyond every block of keys.
_NOWHERE = 2**30


class Walk(NamedTuple):
    """What a warpgroup has of its queries; `place` only with a contextual bias."""

    output: Float[Array, "64 E"]
    maximum: Float[Array, "64"]
    total: Float[Array, "64"]
    place: Float[Array, "64"] | None


def forward(plan: Plan, ranges: Ranges, inputs: dict[str, Array]) -> dict[str, Array]:
    """Output [B, T, N, E], what rounding took from it (`rest`), and log-sum-exp [B, N, T].

    With a contextual bias also `carries` [B, N, S / 32, T], places on the right of every 32 keys
    that were counted (elsewhere nothing is written), and `plain` [B, N, T], the last block of keys
    that was plain attention, one number for 64 queries.
    """
    batch, length, heads, _ = inputs["query"].shape
    keys, size = inputs["value"].shape[1], inputs["value"].shape[3]
    dtype = inputs["query"].dtype
    outputs = {
        "output": jax.ShapeDtypeStruct((batch, length, heads, size), dtype),
        "rest": jax.ShapeDtypeStruct((batch, length, heads, size), dtype),
        "lse": jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
    }
    if plan.contextual is not None:
        carries = (batch, heads, keys // SAVED, length)
        outputs["carries"] = jax.ShapeDtypeStruct(carries, jnp.float32)
        outputs["plain"] = jax.ShapeDtypeStruct((batch, heads, length), jnp.int32)
    return launch(
        functools.partial(_kernel, plan, ranges),
        inputs,
        outputs,
        grid={"head": heads, "tile": length // (ROWS * GROUPS), "batch": batch},
        scratch=_scratch(plan, inputs),
        name="posjax_attention_forward",
    )


def _scratch(plan: Plan, inputs: dict[str, Array]) -> dict:
    """Shared memory and barriers of a block of queries."""
    blocks, dtype, size = plan.blocks, inputs["query"].dtype, inputs["query"].shape[3]
    own = {"query": matrix((GROUPS, ROWS, size), dtype)}
    constants = {}
    if plan.contextual is not None:
        own["tables"] = plgpu.SMEM((GROUPS, *_table_shape(inputs)), jnp.float32)
        constants["lower"] = matrix((blocks.count, blocks.count), jnp.float16)
    passing = dict.fromkeys(fetched(plan), matrix((blocks.stages, blocks.key, size), dtype))
    if plan.relative:
        words = ROWS * GROUPS + blocks.key
        passing["bands"] = plgpu.SMEM((blocks.stages, words), jnp.float32)
    turns = {"turn": Barriers(1, arrivals=GROUPS)} if blocks.ping_pong else {}
    return with_barriers(own=own, constants=constants, passing=passing) | turns


def _table_shape(inputs: dict[str, Array]) -> tuple[int, int]:
    return ROWS, inputs["tables"].shape[3]


def _kernel(plan: Plan, ranges: Ranges, refs: Refs, scratch: Refs) -> None:
    batch, head, group = (jax.lax.axis_index(name) for name in ("batch", "head", "group"))
    # The tiles with most keys first.
    tile = refs["query"].shape[1] // (ROWS * GROUPS) - 1 - jax.lax.axis_index("tile")
    spans = [ranges.span(refs["ranges"], batch, tile * GROUPS + g) for g in range(GROUPS)]
    low, high = union(spans)
    ring = Ring(plan, scratch, fetched(plan), plan.blocks.stages, high, -1)

    @pl.when(group == GROUPS)
    def _():
        share_registers(GROUPS, computes=False)
        rows = pl.ds(tile * GROUPS * ROWS, GROUPS * ROWS)
        sources = keys_of(refs, batch, head, rows, plan.blocks.key)
        ring.fetch(jnp.maximum(high - low + 1, 0), sources)

    @pl.when(group < GROUPS)
    def _():
        share_registers(GROUPS, computes=True)
        place = Place(batch, head, (tile * GROUPS + group) * ROWS, jnp.int32(0))
        bias = gate_bias(plan, refs, head)
        queries = Queries(plan, refs, scratch, group, place, ring, bias)
        _compute(queries, own_span(spans, group), high, low)


def _compute(queries: Queries, span: Span, high: Array, low: Array) -> None:
    """All of one warpgroup."""
    plan, size = queries.plan, queries.refs["output"].shape[3]
    own = plan.contextual is not None
    queries.fetch_own(["query"], ["tables"] * own, ["lower"] * own)
    walk = Walk(
        output=plgpu.layout_cast(jnp.zeros((ROWS, size), jnp.float32), plgpu.Layout.WGMMA),
        maximum=per_row(MASKED),
        total=per_row(0.0),
        place=first_place(plan, queries.place.query) if own else None,
    )
    careful, band, plain = (
        functools.partial(_block, queries, counts=counts and own, masked=masked)
        for counts, masked in ((True, True), (True, False), (False, False))
    )

    def side(number, loop):
        """On the right of the full blocks and over them; on the left of them; the rest."""
        choose = lambda a, b, c: jnp.where(number == 0, a, jnp.where(number == 1, b, c))  # noqa: E731
        skip = functools.partial(_skip, queries)
        loop = loop_down(choose(span.last + 1, _NOWHERE, low), skip, loop)
        loop = loop_down(choose(span.full_last + 1, span.first, _NOWHERE), careful, loop)
        bound = choose(span.full_first, _NOWHERE, _NOWHERE)
        if own:
            loop = loop_down(bound, band, loop, unless=functools.partial(_finished, plan))
            last = per_row(loop[0], jnp.int32)
            pl.when(number == 0)(lambda: queries.save("plain", last))
        return loop_down(bound, plain, loop)

    # The second warpgroup starts when the first one comes to its softmax.
    pl.when(queries.group == 1)(functools.partial(_meet, queries))
    _, walk = jax.lax.fori_loop(0, 3, side, (high, walk))
    pl.when(queries.group == 0)(functools.partial(_meet, queries))
    _finish(queries, walk)


def _finished(plan: Plan, walk: Walk) -> Array:
    """Whether all queries have counted to the end of the table."""
    return all_reach(walk.place, plan.contextual.finished, emulated=plan.emulated)


def _meet(queries: Queries) -> None:
    """Waits until the other warpgroup comes here too, if they take turns."""
    if queries.plan.blocks.ping_pong:
        turn = queries.scratch["turn"].at[0]
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)


def _skip(queries: Queries, index: Array, walk: Walk) -> Walk:
    """A block that only the other warpgroup needs."""
    for _ in range(2):
        _meet(queries)
    return queries.ring.skip(index, walk)


def _block(queries: Queries, index: Array, walk: Walk, *, counts: bool, masked: bool) -> Walk:
    """One block of keys, some keys at a time, from right to left."""
    plan, ring = queries.plan, queries.ring
    size = plan.blocks.count if counts else plan.blocks.key
    # Masks take registers.
    size = min(size, 64) if masked else size
    late = [name for name in ring.names if name in ("value", "bands")]
    names = [name for name in ring.names if name not in late]
    ring.wait(names, index)
    starts = list(reversed(range(0, plan.blocks.key, size)))
    for start in starts:
        tile = queries.tile(index, start, size)
        dots = gate_dots = tile.dots("query", "key")
        if counts and "gate_key" in names:
            gate_dots = tile.dots("query", "gate_key")
        if start == starts[0]:
            _meet(queries)
        if start == 0:
            ring.release(names, index)
        allowed = tile.allowed() if masked else None
        if start == starts[0] and plan.relative:
            ring.wait(["bands"], index)
        unit, values = plan.scale * LOG2E, None
        if counts:
            places = tile.places(tile.gates(gate_dots, allowed), walk.place)
            values = tile.table_values(places)
            walk = walk._replace(place=_save_places(tile, places, walk.place))
        if unit > 0 and not (counts or plan.relative):
            logits = dots, unit
        else:
            logits = tile.logits(dots, values), 1.0
        if start == starts[0]:
            # Softmax is on its way meanwhile.
            ring.wait(["value"], index)
        turn = functools.partial(_meet, queries) if start == 0 else None
        walk = _absorb(tile, walk, *logits, allowed, turn)
    ring.release(late, index)
    return walk


def _save_places(tile: Tile, places: Array, right: Array) -> Array:
    """Keeps the places on the right of every `SAVED` keys; that on the left of the tile."""
    lefts = [tile.left(places, start) for start in range(0, tile.size, SAVED)]
    for number, place in enumerate([*lefts[1:], right]):
        tile.save("carries", place, tile.place.key // SAVED + number)
    return lefts[0]


def _absorb(
    tile: Tile, walk: Walk, logits: Array, unit: float, allowed: Array | None, turn: Callable | None
) -> Walk:
    """Softmax over the keys so far, and their values; logits are in units of ln 2 / `unit` > 0.

    Args:
        turn: what waits for this warpgroup's turn at the matrix units.
    """
    if allowed is not None:
        logits = jnp.where(allowed, logits, MASKED)
    maximum = jnp.maximum(walk.maximum, jnp.max(logits, axis=1) * unit)
    weights = jnp.exp2(logits * unit - along_rows(maximum, logits.shape))
    if allowed is not None:
        weights = jnp.where(allowed, weights, 0.0)
    shrink = jnp.exp2(walk.maximum - maximum)
    total = walk.total * shrink + jnp.sum(weights, axis=1)
    output = walk.output * along_rows(shrink, walk.output.shape)
    value = tile.operands["value"]
    weights = weights.astype(value.dtype)
    if turn is not None:
        turn()
    output = multiply_into(output, weights, value, emulated=tile.plan.emulated)
    return walk._replace(output=output, maximum=maximum, total=total)


def _finish(queries: Queries, walk: Walk) -> None:
    """Divides; a row that has seen nothing is 0."""
    total = jnp.where(walk.total == 0, 1.0, walk.total)
    queries.save("lse", walk.maximum + jnp.log2(total))
    output = walk.output * along_rows(1.0 / total, walk.output.shape)
    rounded = output.astype(queries.refs["output"].dtype)
    queries.send("output", rounded)
    queries.send("rest", (output - rounded.astype(jnp.float32)).astype(rounded.dtype))
