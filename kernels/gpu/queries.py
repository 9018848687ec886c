"""A warpgroup's 64 queries, and its loops over blocks of keys."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.gpu.arrays import Inputs
from posjax.kernels.gpu.layout import Buffer, present
from posjax.kernels.gpu.plan import ROWS, Plan
from posjax.kernels.gpu.ring import Ring
from posjax.kernels.gpu.tiles import Operands, Origin, Tile
from posjax.masks import Span
from posjax.types import Array, Float, Int, Num

__all__ = ["Queries", "QueryScratch", "loop_down", "loop_up", "own_span", "union"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryScratch:
    """Shared memory of the kernels whose warpgroups have queries; None: not for this kernel.

    Fields are in the order of memory. `key`, `gate_key`, `value` and `distance_bias` are rings, the
    triangles constants, the others each warpgroup's own. `diagonals` and `carried_diagonals` are
    described in `relative`; `turn` is a barrier at which the warpgroups of the forward kernel meet.
    """

    distance_bias: Buffer | None = None  # [stages, queries + keys]
    carried_diagonals: Any = None  # [groups, 192]
    cotangent: Buffer | None = None  # [groups, 64, H]
    gate_key: Buffer | None = None  # [stages, keys, H]
    key: Buffer  # [stages, keys, H]
    lower_triangle: Buffer | None = None  # [n, n]
    query: Buffer  # [groups, 64, H]
    slots: Buffer | None = None  # [groups, 64, words]
    diagonals: Any = None  # [groups, 32, 136]
    tables: Buffer | None = None  # [groups, 64, words]
    turn: Any = None
    upper_triangle: Buffer | None = None  # [32, 32]
    value: Buffer  # [stages, keys, H]

    @property
    def rings(self) -> tuple[Buffer, ...]:
        """The buffers that blocks of keys pass through."""
        return present(self.key, self.gate_key, self.value, self.distance_bias)


def union(spans: list[Span]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The first and the last block that any warpgroup needs."""
    low = functools.reduce(jnp.minimum, [span.first for span in spans])
    return low, functools.reduce(jnp.maximum, [span.last for span in spans])


def own_span(spans: list[Span], group: Int[Array, ""]) -> Span:
    """The span of one of at most two warpgroups."""
    pairs = zip(spans[0], spans[-1], strict=True)
    return Span(*(jnp.where(group == 0, a, b) for a, b in pairs))


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
class Queries:
    """The 64 queries of a warpgroup, and the ring of keys."""

    plan: Plan
    inputs: Inputs
    scratch: QueryScratch
    group: Int[Array, ""]
    origin: Origin
    ring: Ring
    gate_bias: Float[Array, ""] | None

    def tile(self, index: Array, start: int, size: int) -> Tile:
        """Keys start ... start + size of block `index`."""
        scratch, slot, keys = self.scratch, self.ring.slot(index), pl.ds(start, size)
        own = lambda x: None if x is None else x.array.at[self.group]  # noqa: E731
        passing = lambda x: None if x is None else x.array.at[slot, keys]  # noqa: E731
        constant = lambda x: None if x is None else x.array  # noqa: E731
        operands = Operands(
            query=own(scratch.query),
            key=passing(scratch.key),
            value=passing(scratch.value),
            gate_key=passing(scratch.gate_key),
            cotangent=own(scratch.cotangent),
            tables=own(scratch.tables),
            distance_bias=self._distance_bias(slot, start, size),
            lower_triangle=constant(scratch.lower_triangle),
            upper_triangle=constant(scratch.upper_triangle),
        )
        origin = self.origin._replace(key=index * scratch.key.array.shape[1] + start)
        return Tile(self.plan, self.inputs, operands, origin, size, self.gate_bias)

    def _distance_bias(self, slot: Array, start: int, size: int) -> Any:
        buffer, groups = self.scratch.distance_bias, self.scratch.query.array.shape[0]
        if buffer is None:
            return None
        # The last warpgroup's queries have the first diagonals.
        first = (groups - 1 - self.group) * ROWS + start
        return buffer.array.at[slot, pl.ds(first, ROWS + size)]

    def save(self, ref: Any, x: Num[Array, "64"]) -> None:
        """Writes a number for each query to [B, N, T]."""
        ref[self.origin.batch, self.origin.head, pl.ds(self.origin.query, ROWS)] = x

    def send(self, buffer: Buffer, target: Any) -> None:
        """Writes this warpgroup's part of a buffer to global memory."""
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer.array.at[self.group], target)
        plgpu.wait_smem_to_gmem(0)

    def send_tokens(self, ref: Any, x: Num[Array, "64 H"]) -> None:
        """Writes to [B, T, N, H], through the shared memory of the queries, which is free now."""
        self.scratch.query.array.at[self.group][...] = x
        self.send(self.scratch.query, self.origin.of_tokens(ref))
