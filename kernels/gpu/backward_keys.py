"""The backward kernel of keys: gradients of keys and values, or of gate keys.

A warpgroup has 64 keys; all queries that see them pass by, 64 at a time, of each query head that
shares the keys in turn. What a tile needs of the others is there already: the places on its right
from the forward kernel, the sums on its left from the kernel of queries. So order does not matter,
and nothing is added up by two.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.gpu.gradients import (
    HALF,
    PAIR,
    Gradients,
    Rows,
    gradients_of,
    of_gates,
    of_keys,
    unit,
)
from posjax.kernels.gpu.instructions import multiply_transposed_into
from posjax.kernels.gpu.layout import (
    Refs,
    fits,
    launch,
    matrix,
    share_registers,
    with_barriers,
)
from posjax.kernels.gpu.plan import GROUPS, ROWS, Plan
from posjax.kernels.gpu.stores import meet, store_matrix
from posjax.kernels.gpu.tiles import Place, Tile, gate_bias
from posjax.kernels.gpu.walk import Ring, band_of, copy_own, own_span, union
from posjax.kernels.ranges import Ranges, Span
from posjax.types import Array, Float, Int

__all__ = ["KEYS", "key_gradients"]

# Keys of a warpgroup.
KEYS = PAIR
_STAGES = 2
# Bytes of a row of the keys of half a tile.
_SWIZZLE = 2 * HALF
# Kinds of tiles.
_SKIPPED, _CAREFUL, _BAND, _PLAIN = range(4)


def key_gradients(
    plan: Plan,
    of_queries: Ranges,
    of_keys: Ranges,
    inputs: dict[str, Array],
    wanted: tuple[str, ...],
) -> dict[str, Array]:
    """Gradients of `wanted`, ("key", "value") or ("gate_key",), in their shapes and dtypes.

    Args:
        of_queries: the blocks of keys of every 64 queries, as the forward kernel walked over them.
        of_keys: the blocks of 64 queries that see every 64 keys.
    """
    batch, keys, heads, _ = inputs[wanted[0]].shape
    outputs = {
        f"{name}_gradient": jax.ShapeDtypeStruct(inputs[name].shape, inputs[name].dtype)
        for name in wanted
    }
    groups = _groups(plan, inputs, wanted)
    return launch(
        functools.partial(_kernel, plan, of_queries, of_keys, groups, wanted),
        inputs,
        outputs,
        grid={"key_head": heads, "tile": keys // (KEYS * groups), "batch": batch},
        scratch=_scratch(plan, groups, inputs, wanted),
        name=f"posjax_attention_backward_{wanted[0]}s",
        groups=groups,
    )


def _groups(plan: Plan, inputs: dict[str, Array], wanted: tuple[str, ...]) -> int:
    """Warpgroups that compute: one where shared memory or the keys do not suffice for two."""
    even = inputs["key"].shape[1] % (KEYS * GROUPS) == 0
    return GROUPS if even and fits(_scratch(plan, GROUPS, inputs, wanted)) else 1


def _own(plan: Plan) -> list[str]:
    """What a warpgroup has of its keys."""
    return ["key", "value", *["gate_key"] * _has_gate_key(plan)]


def _has_gate_key(plan: Plan) -> bool:
    return plan.contextual is not None and plan.contextual.own_gate_key


def _scratch(plan: Plan, groups: int, inputs: dict[str, Array], wanted: tuple[str, ...]) -> dict:
    dtype, size = inputs["query"].dtype, inputs["query"].shape[3]
    operand = functools.partial(matrix, swizzle=_SWIZZLE)
    own = dict.fromkeys(_own(plan), operand((groups, KEYS, size), dtype))
    rows = operand((_STAGES, ROWS, size), dtype)
    constants, passing = {}, dict.fromkeys(("query", "cotangent"), rows)
    if plan.contextual is not None:
        passing["tables"] = plgpu.SMEM((_STAGES, ROWS, inputs["tables"].shape[3]), jnp.float32)
        constants["lower"] = operand((HALF, HALF), jnp.float16)
        constants["upper"] = operand((HALF, HALF), jnp.bfloat16)
    if plan.relative:
        passing["bands"] = plgpu.SMEM((_STAGES, ROWS + groups * KEYS), jnp.float32)
    scratch = with_barriers(own=own, constants=constants, passing=passing, groups=groups)
    turned = operand((groups, ROWS, KEYS), dtype)
    return scratch | {f"{name}_weights": turned for name in wanted}


def _kernel(
    plan: Plan,
    of_queries: Ranges,
    of_keys: Ranges,
    groups: int,
    wanted: tuple[str, ...],
    refs: Refs,
    scratch: Refs,
) -> None:
    batch, group = jax.lax.axis_index("batch"), jax.lax.axis_index("group")
    tile = jax.lax.axis_index("tile")
    spans = [of_keys.span(refs["key_ranges"], batch, tile * groups + g) for g in range(groups)]
    low, high = union(spans)
    blocks = jnp.maximum(high - low + 1, 0)
    shared = refs["query"].shape[2] // refs["key"].shape[2]
    names = ["query", "cotangent"]
    names += ["tables"] * (plan.contextual is not None) + ["bands"] * plan.relative
    ring = Ring(plan, scratch, names, _STAGES, jnp.int32(0), 1)
    first_head = jax.lax.axis_index("key_head") * shared
    walk = _Walk(first_head, low, blocks, blocks * shared)

    def source(step, name):
        head, block = walk.at(step)
        rows = pl.ds(block * ROWS, ROWS)
        if name == "bands":
            keys = pl.ds(tile * groups * KEYS, groups * KEYS)
            return band_of(refs, batch, head, rows, keys)
        at = (batch, head, rows) if name == "tables" else (batch, rows, head)
        return refs[name].at[at]

    @pl.when(group == groups)
    def _():
        share_registers(groups, computes=False)
        ring.fetch(walk.steps, source)

    @pl.when(group < groups)
    def _():
        share_registers(groups, computes=True)
        span = own_span(spans, group)
        number = tile * groups + group
        keys = _Keys(plan, refs, scratch, group, number, batch, ring, of_queries, wanted)
        keys.fetch_own()
        size = refs["query"].shape[3]
        zero = plgpu.layout_cast(jnp.zeros((KEYS, size), jnp.float32), plgpu.Layout.WGMMA)
        keys.send(keys.walk_over(walk, span, (zero,) * len(wanted)))


class _Walk(NamedTuple):
    """Blocks of queries low ... low + blocks of the first query head, of the second, ..."""

    first_head: Int[Array, ""]
    low: Int[Array, ""]
    blocks: Int[Array, ""]
    steps: Int[Array, ""]

    def at(self, step: Array) -> tuple[Array, Array]:
        """The query head and the block of queries of a step."""
        head = self.first_head + jax.lax.div(step, self.blocks)
        return head, self.low + jax.lax.rem(step, self.blocks)

    def after(self, head: Array, block: Array) -> tuple[Array, Array]:
        """Those of the step after, without a division."""
        wraps = block + 1 == self.low + self.blocks
        return jnp.where(wraps, head + 1, head), jnp.where(wraps, self.low, block + 1)


class _Step(NamedTuple):
    """64 queries that pass by: number, query head, block of queries, kind of tile."""

    number: Int[Array, ""]
    head: Int[Array, ""]
    block: Int[Array, ""]
    kind: Int[Array, ""]


class _Keys:
    """The 64 keys of a warpgroup."""

    def __init__(self, plan, refs, scratch, group, number, batch, ring, of_queries, wanted):
        self.plan, self.refs, self.scratch, self.group = plan, refs, scratch, group
        self.number, self.batch, self.ring = number, batch, ring
        self.of_queries, self.wanted = of_queries, wanted

    def fetch_own(self) -> None:
        """Copies this warpgroup's keys and values, and constants."""
        rows, head = pl.ds(self.number * KEYS, KEYS), jax.lax.axis_index("key_head")
        sources = {name: self.refs[name].at[self.batch, rows, head] for name in _own(self.plan)}
        constants = [name for name in ("lower", "upper") if name in self.scratch]
        copy_own(self.refs, self.scratch, self.group, sources, constants)

    def walk_over(self, walk: _Walk, span: Span, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        """The sums over all queries, in loops that are each for one kind of tile."""
        bodies = {
            _SKIPPED: lambda step, sums: sums,
            _CAREFUL: functools.partial(self._add, counts=True, masked=True),
            _BAND: functools.partial(self._add, counts=True, masked=False),
            _PLAIN: functools.partial(self._add, counts=False, masked=False),
        }
        inside = lambda loop: loop[0].number < walk.steps  # noqa: E731

        def loop_of(kind, loop):
            def body(loop):
                step, sums = loop
                # What comes next is read while the tile is worked on.
                following = self._following(walk, span, step)
                self.ring.wait(self.ring.names, step.number)
                sums = bodies[kind](step, sums)
                self.ring.release(self.ring.names, step.number)
                return following, sums

            return jax.lax.while_loop(
                lambda loop: inside(loop) & (loop[0].kind == kind), body, loop
            )

        def loops(loop):
            for kind in bodies:
                loop = loop_of(kind, loop)
            return loop

        head, block = walk.first_head, jnp.minimum(walk.low, self._last_block())
        first = _Step(jnp.int32(0), head, block, self._kind(head, block, span))
        return jax.lax.while_loop(inside, loops, (first, sums))[1]

    def _following(self, walk: _Walk, span: Span, step: _Step) -> _Step:
        head, block = walk.after(step.head, step.block)
        # The last one has none, and may read its own again.
        there = step.number + 1 < walk.steps
        head, block = jnp.where(there, head, step.head), jnp.where(there, block, step.block)
        return _Step(step.number + 1, head, block, self._kind(head, block, span))

    def _last_block(self) -> int:
        return self.refs["query"].shape[1] // ROWS - 1

    def _kind(self, head: Array, block: Array, span: Span) -> Int[Array, ""]:
        seen = (block >= span.first) & (block <= span.last)
        full = (block >= span.full_first) & (block <= span.full_last)
        plain = full if self.plan.contextual is None else self._was_plain(head, block)
        return jnp.where(seen, jnp.where(plain, _PLAIN, jnp.where(full, _BAND, _CAREFUL)), _SKIPPED)

    def _was_plain(self, head: Array, block: Array) -> Array:
        """Whether the forward kernel left counting out here."""
        span = self.of_queries.span(self.refs["ranges"], self.batch, block)
        last = jnp.minimum(span.full_last, self.refs["plain"][self.batch, head, block * ROWS])
        own = jax.lax.div(self.number * KEYS, self.plan.blocks.key)
        return (own >= span.full_first) & (own <= last)

    def _half(self, index: Array, head: Array, row: Array, number: int) -> Tile:
        """Half of the keys: registers hold no more beside the sums."""
        slot, keys = self.ring.slot(index), pl.ds(number * HALF, HALF)
        operands = {name: self.scratch[name].at[slot] for name in self.ring.names}
        if "bands" in operands:
            start = self.group * KEYS + number * HALF
            operands["bands"] = self.scratch["bands"].at[slot, pl.ds(start, ROWS + HALF)]
        operands |= {name: self.scratch[name].at[self.group, keys] for name in _own(self.plan)}
        operands |= {n: self.scratch[n] for n in ("lower", "upper") if n in self.scratch}
        place = Place(self.batch, head, row, self.number * KEYS + number * HALF)
        bias = gate_bias(self.plan, self.refs, head)
        return Tile(self.plan, self.refs, operands, place, HALF, bias)

    def _add(self, step: _Step, sums, *, counts: bool, masked: bool):
        """Adds the tile's part to the sums."""
        row = step.block * ROWS
        halves = [self._half(step.number, step.head, row, number) for number in range(2)]
        counts = counts and self.plan.contextual is not None
        if not counts and "gate_key" in self.wanted:
            return sums
        left = halves[0].per_query("prefixes", self.number) if counts else None
        lse, delta = (halves[0].per_query(name) for name in ("lse", "delta"))
        emulated = self.plan.emulated
        # The last tile's products have been read by all warps.
        meet(emulated=emulated)
        for number, tile in enumerate(halves):
            rows = Rows(lse, delta, left)
            found = gradients_of(tile, rows, counts=counts, masked=masked)[1]
            left = found.left
            for name in self.wanted:
                room = self._room(name).at[:, number * HALF : (number + 1) * HALF]
                weights = self._weights(name, found).astype(room.dtype)
                store_matrix(room, weights, swizzle=_SWIZZLE, emulated=emulated)
        plgpu.commit_smem()
        rows_of = lambda name: halves[0].operands["cotangent" if name == "value" else "query"]  # noqa: E731
        multiply = functools.partial(multiply_transposed_into, emulated=emulated)
        return tuple(
            multiply(total, self._room(name), rows_of(name))
            for name, total in zip(self.wanted, sums, strict=True)
        )

    def _room(self, name: str):
        return self.scratch[f"{name}_weights"].at[self.group]

    def _weights(self, name: str, found: Gradients) -> Float[Array, "64 32"]:
        """What each row of cotangents or queries is added with."""
        if name == "value":
            return found.weights
        if name == "key":
            return of_keys(self.plan, found)
        return of_gates(self.plan, found)

    def send(self, sums: tuple[Array, ...]) -> None:
        """Writes the sums through the keys' own shared memory."""
        head = jax.lax.axis_index("key_head")
        for name, total in zip(self.wanted, sums, strict=True):
            room = self.scratch[name].at[self.group]
            factor = 1.0 if name == "value" else unit(self.plan)
            room[...] = (total * factor).astype(room.dtype)
            plgpu.commit_smem()
            target = self.refs[f"{name}_gradient"]
            rows = pl.ds(self.number * KEYS, KEYS)
            plgpu.copy_smem_to_gmem(room, target.at[self.batch, rows, head])
        plgpu.wait_smem_to_gmem(0)
