"""The backward kernel of keys: gradients of keys and values, or of gate keys.

A warpgroup has 64 keys; all queries that see them pass by, 64 at a time, of each query head that
shares the keys in turn. What a tile needs of the others is there already: the places on its right
from the forward kernel, the sums on its left from the kernel of queries. So order does not matter,
and nothing is added up by two.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.gpu.gradients import Gradients, Rows, count, gradients
from posjax.kernels.gpu.instructions import multiply_transposed_into
from posjax.kernels.gpu.layout import Refs, launch, matrix, with_barriers
from posjax.kernels.gpu.plan import GROUPS, ROWS, Plan
from posjax.kernels.gpu.tiles import SAVED, Place, Tile, gate_bias
from posjax.kernels.gpu.walk import Ring
from posjax.kernels.ranges import Ranges, Span
from posjax.types import Array, Float

__all__ = ["KEYS", "key_gradients"]

# Keys of a warpgroup.
KEYS = SAVED
_STAGES = 2


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
    batch, keys, heads, size = inputs[wanted[0]].shape
    outputs = {
        f"{name}_gradient": jax.ShapeDtypeStruct(inputs[name].shape, inputs[name].dtype)
        for name in wanted
    }
    few = plan.contextual is None or plan.contextual.positions <= 64
    groups = GROUPS if few and keys % (KEYS * GROUPS) == 0 else 1
    return launch(
        functools.partial(_kernel, plan, of_queries, of_keys, groups, wanted),
        inputs,
        outputs,
        grid={"key_head": heads, "tile": keys // (KEYS * groups), "batch": batch},
        scratch=_scratch(plan, groups, inputs, wanted),
        name=f"posjax_attention_backward_{wanted[0]}s",
        groups=groups,
    )


def _own(plan: Plan) -> list[str]:
    """What a warpgroup has of its keys."""
    return ["key", "value", *["gate_key"] * _has_gate_key(plan)]


def _has_gate_key(plan: Plan) -> bool:
    return plan.contextual is not None and plan.contextual.own_gate_key


def _scratch(plan: Plan, groups: int, inputs: dict[str, Array], wanted: tuple[str, ...]) -> dict:
    dtype, size = inputs["query"].dtype, inputs["query"].shape[3]
    own = dict.fromkeys(_own(plan), matrix((groups, KEYS, size), dtype))
    rows = matrix((_STAGES, ROWS, size), dtype)
    constants, passing = {}, dict.fromkeys(("query", "cotangent"), rows)
    if plan.contextual is not None:
        passing["tables"] = plgpu.SMEM((_STAGES, ROWS, inputs["tables"].shape[3]), jnp.float32)
        constants["lower"] = matrix((KEYS, KEYS), jnp.float16)
        constants["upper"] = matrix((KEYS, KEYS), jnp.bfloat16)
    scratch = with_barriers(own=own, constants=constants, passing=passing, groups=groups)
    turned = matrix((groups, ROWS, KEYS), dtype)
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
    high = functools.reduce(jnp.maximum, [span.last for span in spans])
    low = functools.reduce(jnp.minimum, [span.first for span in spans])
    blocks = jnp.maximum(high - low + 1, 0)
    shared = refs["query"].shape[2] // refs["key"].shape[2]
    names = ["query", "cotangent", *["tables"] * (plan.contextual is not None)]
    ring = Ring(plan, scratch, names, _STAGES, jnp.int32(0), 1)
    first_head = jax.lax.axis_index("key_head") * shared

    def source(step, name):
        head, rows = _place(step, first_head, low, blocks)
        at = (batch, head, rows) if name == "tables" else (batch, rows, head)
        return refs[name].at[at]

    @pl.when(group == groups)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        ring.fetch(blocks * shared, source)

    @pl.when(group < groups)
    def _():
        plgpu.set_max_registers(240, action="increase")
        span = Span(
            *(jnp.where(group == 0, a, b) for a, b in zip(spans[0], spans[-1], strict=True))
        )
        number = tile * groups + group
        keys = _Keys(plan, refs, scratch, group, number, batch, ring, of_queries, wanted)
        keys.fetch_own()

        def step(index, sums):
            head, rows = _place(index, first_head, low, blocks)
            return keys.step(index, head, rows.start, span, sums)

        size = refs["query"].shape[3]
        zero = plgpu.layout_cast(jnp.zeros((KEYS, size), jnp.float32), plgpu.Layout.WGMMA)
        sums = jax.lax.fori_loop(0, blocks * shared, step, (zero,) * len(wanted))
        keys.send(sums)


def _place(step: Array, first_head: Array, low: Array, blocks: Array) -> tuple[Array, pl.Slice]:
    """The query head and the queries of a step."""
    head = first_head + jax.lax.div(step, blocks)
    return head, pl.ds((low + jax.lax.rem(step, blocks)) * ROWS, ROWS)


class _Keys:
    """The 64 keys of a warpgroup."""

    def __init__(self, plan, refs, scratch, group, number, batch, ring, of_queries, wanted):
        self.plan, self.refs, self.scratch, self.group = plan, refs, scratch, group
        self.number, self.batch, self.ring = number, batch, ring
        self.of_queries, self.wanted = of_queries, wanted

    def fetch_own(self) -> None:
        """Copies this warpgroup's keys and values, and constants."""
        rows = pl.ds(self.number * KEYS, KEYS)
        head, names = jax.lax.axis_index("key_head"), _own(self.plan)
        barriers = [self.scratch[f"{name}_full"].at[self.group] for name in names]
        for name, barrier in zip(names, barriers, strict=True):
            array = self.refs[name]
            own = jax.lax.div(head * array.shape[2], self.refs["key"].shape[2])
            source, target = array.at[self.batch, rows, own], self.scratch[name].at[self.group]
            plgpu.copy_gmem_to_smem(source, target, barrier)
        constants = [name for name in ("lower", "upper") if name in self.scratch]

        @pl.when(self.group == 0)
        def _():
            for name in constants:
                full = self.scratch[f"{name}_full"].at[0]
                plgpu.copy_gmem_to_smem(self.refs[name], self.scratch[name], full)

        for barrier in [*barriers, *(self.scratch[f"{n}_full"].at[0] for n in constants)]:
            plgpu.barrier_wait(barrier)

    def step(self, index, head, row, span: Span, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        """64 queries."""
        self.ring.wait(self.ring.names, index)
        block = jax.lax.div(row, ROWS)
        seen = (block >= span.first) & (block <= span.last)
        full = (block >= span.full_first) & (block <= span.full_last)
        plain = full if self.plan.contextual is None else self._was_plain(head, block)
        kind = jnp.where(seen, jnp.where(plain, 3, jnp.where(full, 2, 1)), 0)
        careful, band, only = (
            functools.partial(self._add, index, head, row, counts, masked)
            for counts, masked in ((True, True), (True, False), (False, False))
        )
        sums = jax.lax.switch(kind, [lambda sums: sums, careful, band, only], sums)
        self.ring.release(self.ring.names, index)
        return sums

    def _was_plain(self, head: Array, block: Array) -> Array:
        """Whether the forward kernel left counting out here."""
        span = self.of_queries.span(self.refs["ranges"], self.batch, block)
        last = jnp.minimum(span.full_last, self.refs["plain"][self.batch, head, block * ROWS])
        own = jax.lax.div(self.number * KEYS, self.plan.blocks.key)
        return (own >= span.full_first) & (own <= last)

    def _tile(self, index: Array, head: Array, row: Array) -> Tile:
        slot = self.ring.slot(index)
        operands = {name: self.scratch[name].at[slot] for name in self.ring.names}
        operands |= {name: self.scratch[name].at[self.group] for name in _own(self.plan)}
        operands |= {n: self.scratch[n] for n in ("lower", "upper") if n in self.scratch}
        place = Place(self.batch, head, row, self.number * KEYS)
        bias = gate_bias(self.plan, self.refs, head)
        return Tile(self.plan, self.refs, operands, place, KEYS, bias)

    def _add(self, index, head, row, counts: bool, masked: bool, sums):
        """Adds a tile's part to the sums."""
        tile, contextual = self._tile(index, head, row), self.plan.contextual
        allowed = tile.allowed() if masked else None
        counts = counts and contextual is not None
        dots, counted, left = tile.dots("query", "key"), None, None
        if counts:
            gate_dots = tile.dots("query", "gate_key") if contextual.own_gate_key else dots
            counted = count(tile, gate_dots, tile.per_query("carries", self.number), allowed)
            left = tile.per_query("prefixes", self.number)
        rows = Rows(tile.per_query("lse"), tile.per_query("delta"), left)
        found = gradients(tile, dots, counted, rows, allowed)
        parts = {name: self._weights(name, found) for name in self.wanted}
        if all(part is None for part in parts.values()):
            return sums
        for name, part in parts.items():
            room = self.scratch[f"{name}_weights"].at[self.group]
            room[...] = part.astype(room.dtype)
        plgpu.commit_smem()
        results = []
        for name, total in zip(self.wanted, sums, strict=True):
            room = self.scratch[f"{name}_weights"].at[self.group]
            rows_of = tile.operands["cotangent" if name == "value" else "query"]
            results.append(
                multiply_transposed_into(total, room, rows_of, emulated=self.plan.emulated)
            )
        return tuple(results)

    def _weights(self, name: str, found: Gradients) -> Float[Array, "64 64"] | None:
        """What each row of cotangents or queries is added with."""
        contextual = self.plan.contextual
        if name == "value":
            return found.weights
        of_gates = None if found.dx is None else found.dx * contextual.gate_scale
        if name == "gate_key":
            return of_gates
        own = contextual is not None and contextual.own_gate_key
        scaled = found.dlogits * self.plan.scale
        return scaled if of_gates is None or own else scaled + of_gates

    def send(self, sums: tuple[Array, ...]) -> None:
        """Writes the sums through the keys' own shared memory."""
        head = jax.lax.axis_index("key_head")
        for name, total in zip(self.wanted, sums, strict=True):
            room = self.scratch[name].at[self.group]
            room[...] = total.astype(room.dtype)
            plgpu.commit_smem()
            target = self.refs[f"{name}_gradient"]
            rows = pl.ds(self.number * KEYS, KEYS)
            plgpu.copy_smem_to_gmem(room, target.at[self.batch, rows, head])
        plgpu.wait_smem_to_gmem(0)
