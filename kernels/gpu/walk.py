"""A warpgroup's 64 queries, and the blocks of keys that pass by in shared memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.gpu.layout import Refs
from posjax.kernels.gpu.plan import ROWS, Plan
from posjax.kernels.gpu.tiles import Place, Tile
from posjax.kernels.ranges import Span
from posjax.types import Array, Float, Int

__all__ = [
    "Queries",
    "Ring",
    "band_of",
    "copy_own",
    "fetched",
    "keys_of",
    "loop_down",
    "loop_up",
    "own_span",
    "union",
]


def fetched(plan: Plan) -> list[str]:
    """What is fetched for each block of keys."""
    own = plan.contextual is not None and plan.contextual.own_gate_key
    return ["key", *["gate_key"] * own, "value", *["bands"] * plan.relative]


def band_of(refs: Refs, batch: Array, head: Array, queries: pl.Slice, keys: pl.Slice):
    """The piece of `bands` for these queries and keys: as many words as both have tokens."""
    array = refs["bands"]
    last = refs["query"].shape[1] - queries.size
    where = pl.ds(keys.start - queries.start + last, queries.size + keys.size)
    return array.at[batch if array.shape[0] > 1 else 0, head if array.shape[1] > 1 else 0, where]


def keys_of(refs: Refs, batch: Array, head: Array, queries: pl.Slice, size: int):
    """Where a block of keys, values, gate keys or its band is, for `Ring.fetch`."""

    def source(index: Array, name: str):
        array = refs[name]
        if name == "bands":
            return band_of(refs, batch, head, queries, pl.ds(index * size, size))
        own = jax.lax.div(head, refs["query"].shape[2] // array.shape[2])
        return array.at[batch, pl.ds(index * size, size), own]

    return source


def union(spans: list[Span]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The first and the last block that any warpgroup needs."""
    low = functools.reduce(jnp.minimum, [span.first for span in spans])
    return low, functools.reduce(jnp.maximum, [span.last for span in spans])


def own_span(spans: list[Span], group: Int[Array, ""]) -> Span:
    """That of one of at most two warpgroups."""
    pairs = zip(spans[0], spans[-1], strict=True)
    return Span(*(jnp.where(group == 0, a, b) for a, b in pairs))


def copy_own(refs: Refs, scratch: Refs, group: Array, sources: Refs, constants: list[str]) -> None:
    """Copies a warpgroup's own parts from `sources`, and constants; returns when all are there."""
    barriers = [scratch[f"{name}_full"].at[group] for name in sources]
    for (name, source), barrier in zip(sources.items(), barriers, strict=True):
        plgpu.copy_gmem_to_smem(source, scratch[name].at[group], barrier)
    shared = [scratch[f"{name}_full"].at[0] for name in constants]

    @pl.when(group == 0)
    def _():
        for name, barrier in zip(constants, shared, strict=True):
            plgpu.copy_gmem_to_smem(refs[name], scratch[name], barrier)

    for barrier in [*barriers, *shared]:
        plgpu.barrier_wait(barrier)


def loop_down(bound: Int[Array, ""], body, loop, unless=None):
    """Blocks from loop[0] down to `bound`, or until `unless` of the state loop[1]."""

    def going_on(loop):
        inside = loop[0] >= bound
        return inside if unless is None else inside & ~unless(loop[1])

    return jax.lax.while_loop(going_on, lambda loop: (loop[0] - 1, body(*loop)), loop)


def loop_up(bound: Int[Array, ""], body, loop):
    """Blocks from loop[0] up to `bound`."""
    return jax.lax.while_loop(
        lambda loop: loop[0] <= bound, lambda loop: (loop[0] + 1, body(*loop)), loop
    )


@dataclasses.dataclass(frozen=True)
class Ring:
    """Blocks in shared memory, each in the place of the one `stages` before it.

    Block `first` comes first; `step` is 1 or -1.
    """

    plan: Plan
    scratch: Refs
    names: list[str]
    stages: int
    first: Int[Array, ""]
    step: int

    def slot(self, index: Array) -> Array:
        """Where a block lies."""
        return jax.lax.rem((index - self.first) * self.step, self.stages)

    def wait(self, names: list[str], index: Array) -> None:
        """Until they are there."""
        for name in names:
            plgpu.barrier_wait(self.scratch[f"{name}_full"].at[self.slot(index)])

    def release(self, names: list[str], index: Array) -> None:
        """This warpgroup needs them no more."""
        if self.plan.emulated or {"tables", "bands"} & set(names):
            # What threads read needs a fence before a transfer writes over it: tables, bands, and
            # in the interpreter the operands of matrix products.
            plgpu.commit_smem()
        for name in names:
            plgpu.barrier_arrive(self.scratch[f"{name}_free"].at[self.slot(index)])

    def skip(self, index: Array, state):
        """A block that only the other warpgroup needs."""
        self.wait(self.names, index)
        self.release(self.names, index)
        return state

    def fetch(self, steps: Int[Array, ""], sources) -> None:
        """Fetches all blocks, each as soon as there is room.

        Args:
            sources: from the number of a block and a name to where it is in global memory.
        """

        @pl.loop(0, steps)
        def _(step):
            slot = jax.lax.rem(step, self.stages)
            for name in self.names:
                free = self.scratch[f"{name}_free"].at[slot]
                pl.when(step >= self.stages)(lambda free=free: plgpu.barrier_wait(free))
                source = sources(self.first + step * self.step, name)
                full = self.scratch[f"{name}_full"].at[slot]
                plgpu.copy_gmem_to_smem(source, self.scratch[name].at[slot], full)

        # Nothing may be on its way to a barrier when the kernel ends.
        @pl.loop(jnp.maximum(steps - self.stages, 0), steps)
        def _(step):
            for name in self.names:
                free = self.scratch[f"{name}_free"].at[jax.lax.rem(step, self.stages)]
                plgpu.barrier_wait(free)


@dataclasses.dataclass(frozen=True)
class Queries:
    """The 64 queries of a warpgroup, and the ring of keys."""

    plan: Plan
    refs: Refs
    scratch: Refs
    group: Int[Array, ""]
    place: Place
    ring: Ring
    gate_bias: Float[Array, ""] | None

    def fetch_own(self, per_row: list[str], per_head_row: list[str], constants: list[str]) -> None:
        """Copies arrays [B, T, N, ...] and [B, N, T, ...] of these queries, and constants."""
        batch, head, row, _ = self.place
        rows = pl.ds(row, ROWS)
        sources = {name: self.refs[name].at[batch, rows, head] for name in per_row}
        sources |= {name: self.refs[name].at[batch, head, rows] for name in per_head_row}
        copy_own(self.refs, self.scratch, self.group, sources, constants)

    def tile(self, index: Array, start: int, size: int) -> Tile:
        """Keys start ... start + size of block `index`."""
        slot, block = self.ring.slot(index), self.scratch["key"].shape[1]
        operands = {
            name: self.scratch[name].at[self.group]
            for name in ("query", "cotangent", "tables", "slots", "sums")
            if name in self.scratch
        }
        starts = dict.fromkeys(self.ring.names, pl.ds(start, size))
        if "bands" in starts:
            # The last warpgroup's queries have the first diagonals.
            groups = self.scratch["query"].shape[0]
            starts["bands"] = pl.ds((groups - 1 - self.group) * ROWS + start, ROWS + size)
        operands |= {name: self.scratch[name].at[slot, where] for name, where in starts.items()}
        operands |= {n: self.scratch[n] for n in ("lower", "upper") if n in self.scratch}
        place = self.place._replace(key=index * block + start)
        return Tile(self.plan, self.refs, operands, place, size, self.gate_bias)

    def fill(self, name: str, constant: str) -> None:
        """Copies a constant [64, words] into this warpgroup's part of shared memory."""
        full = self.scratch[f"{name}_full"].at[self.group]
        plgpu.copy_gmem_to_smem(self.refs[constant], self.scratch[name].at[self.group], full)
        plgpu.barrier_wait(full)

    def number(self, name: str) -> Array:
        """One number for all queries, of [B, N, T]."""
        return self.refs[name][self.place.batch, self.place.head, self.place.query]

    def send_rows(self, name: str) -> None:
        """Writes [64, words] of this warpgroup's part of shared memory to [B, N, T, words]."""
        batch, head, row, _ = self.place
        plgpu.commit_smem()
        target = self.refs[name].at[batch, head, pl.ds(row, ROWS)]
        plgpu.copy_smem_to_gmem(self.scratch[name].at[self.group], target)
        plgpu.wait_smem_to_gmem(0)

    def save(self, name: str, x: Array) -> None:
        """Writes a number for each query."""
        batch, head, row, _ = self.place
        self.refs[name][batch, head, pl.ds(row, ROWS)] = x

    def send(self, name: str, x: Array, through: str = "query") -> None:
        """Writes [64, E] through shared memory that is needed no more."""
        room = self.scratch[through].at[self.group]
        room[...] = x
        plgpu.commit_smem()
        target = self.refs[name].at[
            self.place.batch, pl.ds(self.place.query, ROWS), self.place.head
        ]
        plgpu.copy_smem_to_gmem(room, target)
        plgpu.wait_smem_to_gmem(0)
