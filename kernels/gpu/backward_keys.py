"""The backward kernel of keys: gradients of keys and values, or of gate keys.

A warpgroup has 64 keys; all queries that see them pass by, 64 at a time, of each query head that
shares the keys in turn. All that a tile needs of other tiles is there already: the places on its
right from the forward kernel, the sums on its left from the kernel of queries. So order does not
matter, and no two warpgroups add to the same sum.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.gpu.arrays import Inputs, KeyGradients, Residuals
from posjax.kernels.gpu.keys import KEYS, SWIZZLE, Keys, KeyScratch, Step, Sums
from posjax.kernels.gpu.layout import Buffer, fits, launch, matrix, share_registers
from posjax.kernels.gpu.plan import GROUPS, ROWS, TILE_KEYS, Plan
from posjax.kernels.gpu.queries import own_span, union
from posjax.kernels.gpu.ring import Ring, band_of
from posjax.masks import Ranges, Span
from posjax.types import Array, Bool, Int

__all__ = ["key_gradients"]

_STAGES = 2
# Kinds of tiles.
_SKIPPED, _CAREFUL, _BAND, _PLAIN = range(4)


def key_gradients(
    plan: Plan,
    of_queries: Ranges,
    of_keys: Ranges,
    inputs: Inputs,
    residuals: Residuals,
    *,
    of_gates: bool,
) -> KeyGradients:
    """Gradients of keys and values, or of gate keys.

    Args:
        of_queries: the blocks of keys of every 64 queries, as the forward kernel went over them.
        of_keys: the blocks of 64 queries that see every 64 keys.
    """
    batch, keys, heads, _ = inputs.key.shape
    shape = jax.ShapeDtypeStruct(inputs.key.shape, inputs.key.dtype)
    outputs = KeyGradients(gate_key=shape) if of_gates else KeyGradients(key=shape, value=shape)
    groups = _groups(plan, inputs, of_gates)
    return launch(
        functools.partial(_kernel, plan, of_queries, of_keys, groups),
        (inputs, residuals),
        outputs,
        grid={"key_head": heads, "tile": keys // (KEYS * groups), "batch": batch},
        scratch=_scratch(plan, groups, inputs, of_gates),
        name=f"posjax_attention_backward_{'gate_keys' if of_gates else 'keys'}",
        groups=groups,
    )


def _groups(plan: Plan, inputs: Inputs, of_gates: bool) -> int:
    """Warpgroups that compute: one if shared memory or the keys do not suffice for two."""
    even = inputs.key.shape[1] % (KEYS * GROUPS) == 0
    return GROUPS if even and fits(_scratch(plan, GROUPS, inputs, of_gates)) else 1


def _scratch(plan: Plan, groups: int, inputs: Inputs, of_gates: bool) -> KeyScratch:
    dtype, size = inputs.query.dtype, inputs.query.shape[3]
    operand = functools.partial(matrix, swizzle=SWIZZLE)
    ring = functools.partial(Buffer.ring, readers=groups)
    own = Buffer.own(operand((groups, KEYS, size), dtype))
    rows = ring(operand((_STAGES, ROWS, size), dtype))
    weights = operand((groups, ROWS, KEYS), dtype)
    scratch = KeyScratch(
        key=own,
        value=own,
        gate_key=None if inputs.gate_key is None else own,
        query=rows,
        cotangent=rows,
        key_weights=None if of_gates else weights,
        value_weights=None if of_gates else weights,
        gate_key_weights=weights if of_gates else None,
    )
    if plan.relative:
        words = plgpu.SMEM((_STAGES, ROWS + groups * KEYS), jnp.float32)
        scratch = dataclasses.replace(scratch, distance_bias=ring(words))
    if plan.cope is None:
        return scratch
    tables = plgpu.SMEM((_STAGES, ROWS, inputs.tables.shape[3]), jnp.float32)
    triangle = (TILE_KEYS, TILE_KEYS)
    return dataclasses.replace(
        scratch,
        tables=ring(tables),
        lower_triangle=Buffer.constant(operand(triangle, jnp.float16)),
        upper_triangle=Buffer.constant(operand(triangle, jnp.bfloat16)),
    )


class QuerySchedule(NamedTuple):
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
        """The query head and the block of the step after, without a division."""
        wraps = block + 1 == self.low + self.blocks
        return jnp.where(wraps, head + 1, head), jnp.where(wraps, self.low, block + 1)


def _kernel(
    plan: Plan,
    of_queries: Ranges,
    of_keys: Ranges,
    groups: int,
    inputs: Inputs,
    residuals: Residuals,
    outputs: KeyGradients,
    scratch: KeyScratch,
) -> None:
    batch, group = jax.lax.axis_index("batch"), jax.lax.axis_index("group")
    tile = jax.lax.axis_index("tile")
    spans = [of_keys.span(residuals.key_ranges, batch, tile * groups + g) for g in range(groups)]
    low, high = union(spans)
    blocks = jnp.maximum(high - low + 1, 0)
    shared = inputs.query.shape[2] // inputs.key.shape[2]
    ring = Ring(scratch.rings, _STAGES, jnp.int32(0), 1, plan.emulated)
    first_head = jax.lax.axis_index("key_head") * shared
    schedule = QuerySchedule(first_head, low, blocks, blocks * shared)

    @pl.when(group == groups)
    def _():
        share_registers(groups, computes=False)
        keys = pl.ds(tile * groups * KEYS, groups * KEYS)
        ring.fetch(schedule.steps, _sources(inputs, residuals, batch, keys, schedule))

    @pl.when(group < groups)
    def _():
        share_registers(groups, computes=True)
        span = own_span(spans, group)
        number = tile * groups + group
        keys = Keys(plan, inputs, residuals, outputs, scratch, group, number, batch, ring)
        keys.fetch_own()
        size = inputs.query.shape[3]
        zero = plgpu.layout_cast(jnp.zeros((KEYS, size), jnp.float32), plgpu.Layout.WGMMA)
        sums = (zero,) * len(scratch.weights)
        keys.send(_Loops(keys, schedule, span, of_queries).run(sums))


def _sources(
    inputs: Inputs, residuals: Residuals, batch: Array, keys: pl.Slice, schedule: QuerySchedule
) -> list[Callable[[Array], Any]]:
    """Places of a step's queries, cotangents, tables and bias of the distance, for `Ring.fetch`."""

    def place(step: Array) -> tuple[Array, pl.Slice]:
        head, block = schedule.at(step)
        return head, pl.ds(block * ROWS, ROWS)

    def tokens(array: Any, step: Array) -> Any:
        head, rows = place(step)
        return array.at[batch, rows, head]

    def tables(step: Array) -> Any:
        return inputs.tables.at[(batch, *place(step))]

    def bias(step: Array) -> Any:
        return band_of(inputs, batch, *place(step), keys)

    sources = [functools.partial(tokens, array) for array in (inputs.query, residuals.cotangent)]
    sources += [] if inputs.tables is None else [tables]
    return sources + ([] if inputs.distance_bias is None else [bias])


@dataclasses.dataclass(frozen=True)
class _Loops:
    """The loops of a warpgroup over the queries of a schedule."""

    keys: Keys
    schedule: QuerySchedule
    span: Span
    of_queries: Ranges

    def run(self, sums: Sums) -> Sums:
        """Adds all queries to the sums, in loops that are each for one kind of tile."""
        keys, ring = self.keys, self.keys.ring
        bodies = {
            _SKIPPED: lambda step, sums: sums,
            _CAREFUL: functools.partial(keys.add, counts=True, masked=True),
            _BAND: functools.partial(keys.add, counts=True, masked=False),
            _PLAIN: functools.partial(keys.add, counts=False, masked=False),
        }
        inside = lambda loop: loop[0].number < self.schedule.steps  # noqa: E731

        def loop_of(kind, loop):
            def body(loop):
                step, sums = loop
                # The next step is looked up while the tile is worked on.
                following = self._following(step)
                ring.wait(ring.buffers, step.number)
                sums = bodies[kind](step, sums)
                ring.release(ring.buffers, step.number)
                return following, sums

            return jax.lax.while_loop(
                lambda loop: inside(loop) & (loop[0].kind == kind), body, loop
            )

        def loops(loop):
            for kind in bodies:
                loop = loop_of(kind, loop)
            return loop

        last_block = keys.inputs.query.shape[1] // ROWS - 1
        head, block = self.schedule.first_head, jnp.minimum(self.schedule.low, last_block)
        first = Step(jnp.int32(0), head, block, self._kind(head, block))
        return jax.lax.while_loop(inside, loops, (first, sums))[1]

    def _following(self, step: Step) -> Step:
        head, block = self.schedule.after(step.head, step.block)
        # The last one has none, and may read its own again.
        there = step.number + 1 < self.schedule.steps
        head, block = jnp.where(there, head, step.head), jnp.where(there, block, step.block)
        return Step(step.number + 1, head, block, self._kind(head, block))

    def _kind(self, head: Array, block: Array) -> Int[Array, ""]:
        """The kind of the tiles of a block of queries."""
        span = self.span
        seen = (block >= span.first) & (block <= span.last)
        full = (block >= span.full_first) & (block <= span.full_last)
        plain = full if self.keys.plan.cope is None else self._was_plain(head, block)
        return jnp.where(seen, jnp.where(plain, _PLAIN, jnp.where(full, _BAND, _CAREFUL)), _SKIPPED)

    def _was_plain(self, head: Array, block: Array) -> Bool[Array, ""]:
        """Whether the forward kernel did not count here."""
        keys = self.keys
        span = self.of_queries.span(keys.inputs.ranges, keys.batch, block)
        last_plain = keys.residuals.last_plain[keys.batch, head, block * ROWS]
        last = jnp.minimum(span.full_last, last_plain)
        own = jax.lax.div(keys.number * KEYS, keys.plan.blocks.key)
        return (own >= span.full_first) & (own <= last)
