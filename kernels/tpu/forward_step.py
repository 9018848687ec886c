"""One place of the forward kernel's grid: its scratch memory, and online softmax over its tiles."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Ref

from posjax.kernels.common import MASKED
from posjax.kernels.tpu import registers
from posjax.kernels.tpu.arrays import Inputs
from posjax.kernels.tpu.plan import LANES, Plan
from posjax.kernels.tpu.tables import TableScratch
from posjax.kernels.tpu.tiles import Chunks, Tile
from posjax.types import Array, Float, Num

__all__ = [
    "ForwardScratch",
    "ForwardStages",
    "ForwardStep",
    "add_values",
    "save_carry",
    "softmax_weights",
]


class ForwardStages(NamedTuple):
    """Memory in which one stage of the counting pipeline leaves its results for the next.

    Args:
        next_logits: `tiles.negative_logits` of the next block; `next_gate_logits` likewise.
        lane_prefix: sums of gates from the last chunk of a lane up to each key.
        lane_total: the whole sum of a lane.
        count_before_lane: place of the first key behind each lane, which it counts on from.
        lane_minimum: the least of the negative logits.
        weights: packed, see `registers.pack_words`.
    """

    next_logits: Float[Ref, "t s"]
    next_gate_logits: Float[Ref, "t s"] | None
    negative_logits: Float[Ref, "t s"]
    lane_prefix: Float[Ref, "t s"]
    lane_total: Float[Ref, "t 128"]
    count_before_lane: Float[Ref, "t 128"]
    lane_minimum: Float[Ref, "t 128"]
    next_shrink: Float[Ref, "t 128"]
    shrink: Float[Ref, "t 128"]
    weights: Num[Ref, "words s"]


class ForwardScratch(NamedTuple):
    """Memory that lives while a block of queries walks over its keys.

    Args:
        total: sums of weights in each lane.
        output: sums of weight * value.
        carry: place of each query on the right of the next block.
        saved_carries: `carry` of every block, in the lane of its number.
        band: see `relative`.
    """

    maximum: Float[Ref, "t 128"]
    total: Float[Ref, "t 128"]
    output: Float[Ref, "t E"]
    carry: Float[Ref, "t 128"] | None = None
    saved_carries: Float[Ref, "carry_groups t 128"] | None = None
    tables: TableScratch | None = None
    stages: ForwardStages | None = None
    band: Float[Ref, "band 128"] | None = None


class ForwardStep(NamedTuple):
    """One place of the grid: what is static, and what can be read and written.

    Args:
        first_block: number of the first block of keys in memory.
        blocks_after: blocks of queries behind this one.
    """

    plan: Plan
    inputs: Inputs
    scratch: ForwardScratch
    first_block: Array
    blocks_after: Array

    def tile(self, index: Array, masked: bool) -> Tile:
        """The tile of a block of keys."""
        return Tile(self.plan, self.inputs, index - self.first_block, masked)


def save_carry(scratch: ForwardScratch, index: Array) -> None:
    """Keeps the carry of a block for the backward pass, in the block's lane."""
    carry, saved = scratch.carry[...], scratch.saved_carries
    group, lane = index // LANES, jax.lax.broadcasted_iota(jnp.int32, carry.shape, 1)
    saved[group] = jnp.where(lane == index % LANES, carry, saved[group])


def softmax_weights(
    scratch: ForwardScratch, hide: Callable, logits: Chunks
) -> tuple[Chunks, Float[Array, "t 128"]]:
    """Online softmax: weights relative to the new maximum, and the factor of earlier ones."""
    logits, old = hide(logits, MASKED), scratch.maximum[...]
    new = jnp.maximum(old, registers.reduce_lanes(functools.reduce(jnp.maximum, logits), jnp.max))
    weights = hide([jnp.exp2(x - new) for x in logits], 0.0)
    shrink = jnp.exp2(old - new)
    scratch.maximum[...] = new
    scratch.total[...] = scratch.total[...] * shrink + registers.sum_chunks(weights)
    return weights, shrink


def add_values(step: ForwardStep, tile: Tile, weights: Array, shrink: Array) -> None:
    """Adds the values of one more block of keys to the output."""
    value, output = tile.read(step.inputs.value), step.scratch.output
    part = registers.matmul(weights.astype(value.dtype), value)
    output[...] = output[...] * registers.broadcast_lanes(shrink, output.shape[1]) + part
