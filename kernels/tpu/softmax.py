"""What the forward kernel does with a tile: online softmax over the blocks of keys."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from posjax.kernels.common import MASKED
from posjax.kernels.tpu import registers
from posjax.kernels.tpu.plan import LANES, Plan
from posjax.kernels.tpu.tiles import Chunks, Tile
from posjax.types import Array

__all__ = ["Block", "add_values", "save_carry", "weigh"]


class Block(NamedTuple):
    """One place of the grid: what is static, and what can be read and written."""

    plan: Plan
    inputs: dict
    scratch: dict
    start: Array  # the first block of keys in memory
    after: Array  # blocks of queries behind this one

    def tile(self, index: Array, masked: bool) -> Tile:
        """The tile of a block of keys."""
        return Tile(self.plan, self.inputs, index - self.start, masked)


def save_carry(scratch: dict, index: Array) -> None:
    """Keeps the count on the right of a block for the backward pass, in the block's lane."""
    carry, saved = scratch["carry"][...], scratch["saved"]
    group, lane = index // LANES, jax.lax.broadcasted_iota(jnp.int32, carry.shape, 1)
    saved[group] = jnp.where(lane == index % LANES, carry, saved[group])


def weigh(
    block: Block, hide: Callable, logits: Chunks, rows: slice = slice(None)
) -> tuple[Chunks, Array]:
    """Online softmax: weights relative to the new maximum, and what shrinks earlier ones."""
    maximum, total = block.scratch["maximum"], block.scratch["total"]
    logits, old = hide(logits, MASKED), maximum[rows, :]
    new = jnp.maximum(old, registers.over_lanes(functools.reduce(jnp.maximum, logits), jnp.max))
    weights = hide([jnp.exp2(x - new) for x in logits], 0.0)
    shrink = jnp.exp2(old - new)
    maximum[rows, :] = new
    total[rows, :] = total[rows, :] * shrink + registers.added(weights)
    return weights, shrink


def add_values(block: Block, tile: Tile, weights: Array, shrink: Array) -> None:
    """The output after one more block of keys."""
    value, output = tile.keys("value"), block.scratch["output"]
    part = registers.matmul(weights.astype(value.dtype), value)
    output[...] = output[...] * registers.wide(shrink, output.shape[1]) + part
