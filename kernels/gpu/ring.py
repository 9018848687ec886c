"""Transfers from global to shared memory: rings of blocks, and what is copied once."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.gpu.arrays import Inputs
from posjax.kernels.gpu.layout import Buffer, present
from posjax.types import Array, Int

__all__ = ["Ring", "band_of", "copy_once", "key_sources"]


@dataclasses.dataclass(frozen=True)
class Ring:
    """Blocks in shared memory, each in the place of the one `stages` before it.

    Block `first` comes first; `step` is 1 or -1.
    """

    buffers: tuple[Buffer, ...]
    stages: int
    first: Int[Array, ""]
    step: int
    emulated: bool

    def slot(self, index: Array) -> Array:
        """The place of a block."""
        return jax.lax.rem((index - self.first) * self.step, self.stages)

    def wait(self, buffers: Sequence[Buffer], index: Array) -> None:
        """Waits until the block has arrived in these buffers."""
        for buffer in buffers:
            plgpu.barrier_wait(buffer.full.at[self.slot(index)])

    def release(self, buffers: Sequence[Buffer], index: Array) -> None:
        """Tells that this warpgroup is done with the block in these buffers."""
        if self.emulated or any(buffer.array.dtype == jnp.float32 for buffer in buffers):
            # A fence before a transfer writes over what threads read: numbers of float32, and in
            # the interpreter also the operands of matrix products.
            plgpu.commit_smem()
        for buffer in buffers:
            plgpu.barrier_arrive(buffer.free.at[self.slot(index)])

    def skip(self, index: Array, state: Any) -> Any:
        """Passes a block that only the other warpgroup needs."""
        self.wait(self.buffers, index)
        self.release(self.buffers, index)
        return state

    def fetch(self, steps: Int[Array, ""], sources: Sequence[Callable[[Array], Any]]) -> None:
        """Fetches all blocks, each as soon as there is room.

        Args:
            sources: for each buffer a function from a block's index to its part of global memory.
        """

        @pl.loop(0, steps)
        def _(step):
            slot = jax.lax.rem(step, self.stages)
            for buffer, source in zip(self.buffers, sources, strict=True):
                free = buffer.free.at[slot]
                pl.when(step >= self.stages)(lambda free=free: plgpu.barrier_wait(free))
                block = source(self.first + step * self.step)
                plgpu.copy_gmem_to_smem(block, buffer.array.at[slot], buffer.full.at[slot])

        # No transfer may be under way when the kernel ends.
        @pl.loop(jnp.maximum(steps - self.stages, 0), steps)
        def _(step):
            for buffer in self.buffers:
                plgpu.barrier_wait(buffer.free.at[jax.lax.rem(step, self.stages)])


def key_sources(
    inputs: Inputs, batch: Array, head: Array, queries: pl.Slice, size: int
) -> list[Callable[[Array], Any]]:
    """Places of a block's keys, gate keys, values and bias of the distance, for `Ring.fetch`."""

    def rows(array: Any, index: Array) -> Any:
        kv_head = jax.lax.div(head, inputs.query.shape[2] // array.shape[2])
        return array.at[batch, pl.ds(index * size, size), kv_head]

    def bias(index: Array) -> Any:
        return band_of(inputs, batch, head, queries, pl.ds(index * size, size))

    arrays = present(inputs.key, inputs.gate_key, inputs.value)
    of_bias = [] if inputs.distance_bias is None else [bias]
    return [*(functools.partial(rows, array) for array in arrays), *of_bias]


def band_of(inputs: Inputs, batch: Array, head: Array, queries: pl.Slice, keys: pl.Slice) -> Any:
    """The part of the bias of the distance for these queries and keys: a number per diagonal."""
    bias = inputs.distance_bias
    last = inputs.query.shape[1] - queries.size
    where = pl.ds(keys.start - queries.start + last, queries.size + keys.size)
    return bias.at[batch if bias.shape[0] > 1 else 0, head if bias.shape[1] > 1 else 0, where]


def copy_once(
    group: Array, own: Sequence[tuple[Any, Buffer]], constants: Sequence[tuple[Any, Buffer]]
) -> None:
    """Copies a warpgroup's own parts, and constants for all; returns when they have arrived.

    Args:
        own: parts of global memory, and the buffers that they go to; `constants` likewise.
    """
    waits = [buffer.full.at[group] for _, buffer in own]
    for (source, buffer), barrier in zip(own, waits, strict=True):
        plgpu.copy_gmem_to_smem(source, buffer.array.at[group], barrier)

    @pl.when(group == 0)
    def _():
        for source, buffer in constants:
            plgpu.copy_gmem_to_smem(source, buffer.array, buffer.full.at[0])

    for barrier in [*waits, *(buffer.full.at[0] for _, buffer in constants)]:
        plgpu.barrier_wait(barrier)
