"""The counting tiles that need no mask, as a pipeline over the blocks of keys.

While a block is counted (matrix unit), the one before it is looked up and weighed (lanes, vector
unit), and the values of the one before that are added (matrix unit). In one stage after the other
the units would wait for each other.

| stage | block    | reads                | writes                 |
|-------|----------|----------------------|------------------------|
| 1     | t        | query, key, carry    | falls, places, carry   |
| 2     | t + 1    | falls, places, table | weights, shrink        |
| 3     | t + 2    | weights, shrink      | output                 |
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from posjax.kernels.tpu import counting, registers, tiles
from posjax.kernels.tpu.counting import HALF
from posjax.kernels.tpu.plan import LANES, Plan
from posjax.kernels.tpu.softmax import Block, add_values, save_carry, weigh
from posjax.kernels.tpu.tiles import Counted, Tile
from posjax.types import Array, Bool

__all__ = ["count_on", "is_finished", "scratch_shapes"]


def scratch_shapes(plan: Plan, dtype: jnp.dtype) -> dict:
    """What one stage leaves for the next."""
    rows, keys = plan.blocks.query, plan.blocks.key
    return {
        "falls": pltpu.VMEM((rows, keys), jnp.float32),
        "places": pltpu.VMEM((rows, keys), jnp.float32),
        "weights": pltpu.VMEM((rows, keys), dtype),
        "shrink": pltpu.VMEM((rows, LANES), jnp.float32),
    }


def count_on(block: Block, high: Array, low: Array) -> Array:
    """Adds full blocks until nothing is left to count; the block to go on with."""
    tile = functools.partial(block.tile, masked=False)

    def counting() -> Array:
        return (~is_finished(block)).astype(jnp.int32)

    def step(loop):
        index, _ = loop
        _add_held(block, tile(jnp.minimum(index + 2, high)))
        _weigh_held(block)
        _count_and_hold(block, tile(index), index)
        return index - 1, counting()

    def pipeline(_):
        scratch = block.scratch
        scratch["weights"][...] = jnp.zeros(scratch["weights"].shape, scratch["weights"].dtype)
        scratch["shrink"][...] = jnp.ones(scratch["shrink"].shape, jnp.float32)
        _count_and_hold(block, tile(high), high)
        going_on = lambda loop: (loop[0] >= low) & (loop[1] == 1)  # noqa: E731
        index, _ = jax.lax.while_loop(going_on, step, (high - 1, counting()))
        _add_held(block, tile(jnp.minimum(index + 2, high)))
        _weigh_held(block)
        _add_held(block, tile(index + 1))
        return index

    return jax.lax.cond((high >= low) & (counting() == 1), pipeline, lambda _: high, None)


def is_finished(block: Block) -> Bool[Array, ""]:
    """Whether every query has counted to the end of the table."""
    return jnp.min(block.scratch["carry"][...]) >= block.plan.contextual.last - HALF


def _count_and_hold(block: Block, tile: Tile, index: Array) -> None:
    """The first stage: products, gates and counts."""
    plan, scratch = block.plan, block.scratch
    save_carry(scratch, index)
    falls, exponents = tiles.falls_and_exponents(tile)
    scratch["falls"][...] = registers.join(falls)
    lower, last = block.inputs["lower"][...], plan.contextual.last
    for rows in _row_groups(plan):
        gates = [counting.gate(x[rows], plan.contextual.newton) for x in exponents]
        places, carry = counting.places(gates, scratch["carry"][rows, :], lower, last)
        scratch["places"][rows, :] = registers.join(places)
        scratch["carry"][rows, :] = carry


def _weigh_held(block: Block) -> None:
    """The second stage: biases, softmax."""
    plan, scratch = block.plan, block.scratch
    for rows in _row_groups(plan):
        held = (registers.chunks(scratch[name][rows, :]) for name in ("falls", "places"))
        logits, _ = tiles.biased(plan, scratch, Counted(*held), rows)
        weights, shrink = weigh(block, lambda x, _: x, logits, rows)
        scratch["weights"][rows, :] = registers.join(weights).astype(scratch["weights"].dtype)
        scratch["shrink"][rows, :] = shrink


def _row_groups(plan: Plan) -> list[slice]:
    """Some rows at a time, so that what is computed for them stays in registers."""
    size = plan.blocks.rows or plan.blocks.query
    return [slice(start, start + size) for start in range(0, plan.blocks.query, size)]


def _add_held(block: Block, tile: Tile) -> None:
    """The third stage: the output."""
    scratch = block.scratch
    add_values(block, tile, scratch["weights"][...], scratch["shrink"][...])
