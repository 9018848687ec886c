"""A warpgroup's 64 keys, and its sums over queries."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.gpu.arrays import Inputs, KeyGradients, Residuals
from posjax.kernels.gpu.gradients import (
    RowValues,
    TileGradients,
    gate_weights,
    gradient_scale,
    key_weights,
    tile_gradients,
)
from posjax.kernels.gpu.layout import Buffer, present
from posjax.kernels.gpu.plan import ROWS, STEP_KEYS, TILE_KEYS, Plan
from posjax.kernels.gpu.products import multiply_transposed_into
from posjax.kernels.gpu.ring import Ring, copy_once
from posjax.kernels.gpu.stores import store_matrix, warpgroup_barrier
from posjax.kernels.gpu.tiles import Operands, Origin, Tile, gate_bias_of
from posjax.types import Array, Float, Int

__all__ = ["KEYS", "SWIZZLE", "KeyScratch", "Keys", "Step", "Sums"]

# Keys of a warpgroup: those of a prefix from the kernel of queries.
KEYS = STEP_KEYS
# Bytes of a row of the keys of a tile.
SWIZZLE = 2 * TILE_KEYS

Sums = tuple[Float[Array, "64 H"], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyScratch:
    """Shared memory of a block of keys; None: not for this kernel.

    Fields are in the order of memory. `query`, `cotangent`, `tables` and `distance_bias` are rings,
    the triangles constants, the others each warpgroup's own. The weights are those of
    `gradients.key_weights`, for all 64 keys.
    """

    distance_bias: Buffer | None = None  # [stages, 64 + keys]
    cotangent: Buffer  # [stages, 64, H]
    gate_key: Buffer | None = None  # [groups, 64, H]
    gate_key_weights: Any = None  # [groups, 64, 64]
    key: Buffer  # [groups, 64, H]
    key_weights: Any = None  # [groups, 64, 64]
    lower_triangle: Buffer | None = None  # [32, 32]
    query: Buffer  # [stages, 64, H]
    tables: Buffer | None = None  # [stages, 64, words]
    upper_triangle: Buffer | None = None  # [32, 32]
    value: Buffer  # [groups, 64, H]
    value_weights: Any = None  # [groups, 64, 64]

    @property
    def rings(self) -> tuple[Buffer, ...]:
        """The buffers that blocks of queries pass through."""
        return present(self.query, self.cotangent, self.tables, self.distance_bias)

    @property
    def weights(self) -> tuple[Any, ...]:
        """The weights of all gradients that are computed, in the order of `KeyGradients`."""
        return present(self.key_weights, self.value_weights, self.gate_key_weights)


class Step(NamedTuple):
    """A step over 64 queries: its number, query head, block of queries, kind of tile."""

    number: Int[Array, ""]
    head: Int[Array, ""]
    block: Int[Array, ""]
    kind: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Keys:
    """The 64 keys of a warpgroup, from `number` times 64 on, and the ring of queries."""

    plan: Plan
    inputs: Inputs
    residuals: Residuals
    outputs: KeyGradients
    scratch: KeyScratch
    group: Int[Array, ""]
    number: Int[Array, ""]
    batch: Int[Array, ""]
    ring: Ring

    @property
    def _of_gates(self) -> bool:
        return self.outputs.gate_key is not None

    def _own(self, array: Any) -> Any:
        """These keys' part of [B, S, K, ...]."""
        return array.at[self.batch, pl.ds(self.number * KEYS, KEYS), jax.lax.axis_index("key_head")]

    def fetch_own(self) -> None:
        """Copies this warpgroup's keys, values and gate keys, and the triangles."""
        inputs, scratch = self.inputs, self.scratch
        own = [(inputs.key, scratch.key), (inputs.value, scratch.value)]
        if inputs.gate_key is not None:
            own.append((inputs.gate_key, scratch.gate_key))
        triangles = [
            (inputs.lower_triangle, scratch.lower_triangle),
            (self.residuals.upper_triangle, scratch.upper_triangle),
        ]
        copy_once(
            self.group,
            [(self._own(array), buffer) for array, buffer in own],
            [] if self.plan.cope is None else triangles,
        )

    def _tile(self, step: Step, half: int) -> Tile:
        """One half of the keys: registers hold no more beside the sums."""
        scratch, slot = self.scratch, self.ring.slot(step.number)
        keys, bias = pl.ds(half * TILE_KEYS, TILE_KEYS), None
        if scratch.distance_bias is not None:
            start = self.group * KEYS + half * TILE_KEYS
            bias = scratch.distance_bias.array.at[slot, pl.ds(start, ROWS + TILE_KEYS)]
        own = lambda buffer: None if buffer is None else buffer.array.at[self.group, keys]  # noqa: E731
        counts = self.plan.cope is not None
        operands = Operands(
            query=scratch.query.array.at[slot],
            key=own(scratch.key),
            value=own(scratch.value),
            gate_key=own(scratch.gate_key),
            cotangent=scratch.cotangent.array.at[slot],
            tables=scratch.tables.array.at[slot] if counts else None,
            distance_bias=bias,
            lower_triangle=scratch.lower_triangle.array if counts else None,
            upper_triangle=scratch.upper_triangle.array if counts else None,
        )
        key = self.number * KEYS + half * TILE_KEYS
        origin = Origin(self.batch, step.head, step.block * ROWS, key)
        gate_bias = gate_bias_of(self.inputs, step.head)
        return Tile(self.plan, self.inputs, operands, origin, TILE_KEYS, gate_bias)

    def add(self, step: Step, sums: Sums, *, counts: bool, masked: bool) -> Sums:
        """Adds the step's part to the sums."""
        residuals, emulated = self.residuals, self.plan.emulated
        carries = residuals.carries if counts else None
        if carries is None and self._of_gates:
            return sums
        tiles = [self._tile(step, half) for half in range(2)]
        of_queries = tiles[0].per_query
        prefix = None if carries is None else of_queries(residuals.prefixes, self.number)
        rows = RowValues(of_queries(residuals.lse), of_queries(residuals.delta), prefix)
        # All warps have read the last step's weights.
        warpgroup_barrier(emulated=emulated)
        own_weights = [array.at[self.group] for array in self.scratch.weights]
        for half, tile in enumerate(tiles):
            _, gradients = tile_gradients(tile, rows, carries, masked=masked)
            rows = rows._replace(prefix=gradients.prefix)
            for array, weights in zip(own_weights, self._weights(gradients), strict=True):
                target = array.at[:, half * TILE_KEYS : (half + 1) * TILE_KEYS]
                weights = weights.astype(array.dtype)
                store_matrix(target, weights, swizzle=SWIZZLE, emulated=emulated)
        plgpu.commit_smem()
        operands = tiles[0].operands
        weighed = [operands.query] if self._of_gates else [operands.query, operands.cotangent]
        return tuple(
            multiply_transposed_into(total, weights, rows, emulated=emulated)
            for total, weights, rows in zip(sums, own_weights, weighed, strict=True)
        )

    def _weights(self, gradients: TileGradients) -> list[Float[Array, "64 32"]]:
        """Weights of queries and cotangents in the sums."""
        if self._of_gates:
            return [gate_weights(self.plan, gradients)]
        return [key_weights(self.plan, gradients), gradients.weights]

    def send(self, sums: Sums) -> None:
        """Writes the gradients through the keys' own shared memory."""
        scratch, scale = self.scratch, gradient_scale(self.plan)
        through = [scratch.gate_key] if self._of_gates else [scratch.key, scratch.value]
        targets = present(*self.outputs)
        for total, buffer, target in zip(sums, through, targets, strict=True):
            own = buffer.array.at[self.group]
            factor = 1.0 if buffer is scratch.value else scale
            own[...] = (total * factor).astype(own.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own, self._own(target))
        plgpu.wait_smem_to_gmem(0)
