"""The full tiles of the forward kernel, as pipelines over the blocks of keys.

A tile that counts goes through four stages. While a block is multiplied with the queries (matrix
unit), the gates of the one before it are added up (vector unit), the one before that is looked up
and weighed (lanes, vector unit), and the values of the one before that are added (matrix unit). In
one stage after the other the units would wait for each other, and registers would overflow.

| stage | block | reads                       | writes                                     |
|-------|-------|-----------------------------|--------------------------------------------|
| 1     | t     | query, key                  | next_logits                                |
| 2     | t + 1 | next_logits, carry, maximum | negative_logits, lane_prefix, carry,       |
|       |       |                             | count_before_lane, maximum, next_shrink    |
| 3     | t + 2 | these, tables               | weights, shrink                            |
| 4     | t + 3 | weights, shrink             | output                                     |

The maximum of a row is a bound: the largest logit without the bias and the largest entry of the
row's table. So stage 3 sees each number once.
"""

import jax
import jax.numpy as jnp

from posjax.kernels.tpu import counting, registers, tiles
from posjax.kernels.tpu.counting import PLACE_OFFSET
from posjax.kernels.tpu.forward_step import ForwardStep, add_values, save_carry
from posjax.kernels.tpu.plan import LANES
from posjax.kernels.tpu.tiles import CountedTile, Tile
from posjax.types import Array, Bool

__all__ = ["bound_is_near", "is_saturated", "run_counting_pipeline"]

# By how much, in units of ln 2, the bound of a row's largest logit may exceed it.
_FAR = 64.0


def bound_is_near(step: ForwardStep) -> bool | Bool[Array, ""]:
    """Whether the bound of the softmax's maximum is near enough to it."""
    return not step.plan.relative and jnp.max(step.scratch.tables.spread[...]) <= _FAR


def is_saturated(step: ForwardStep) -> Bool[Array, ""]:
    """Whether every query has counted to the end of the table."""
    return jnp.min(step.scratch.carry[...]) >= step.plan.cope.last - PLACE_OFFSET


def run_counting_pipeline(step: ForwardStep, high: Array, low: Array) -> Array:
    """Adds the full blocks high ... low until nothing is left to count; the block to go on with."""
    weights, shrink = step.scratch.stages.weights, step.scratch.stages.shrink
    # The tile of a block, or of the nearest one that is there.
    near = lambda index: step.tile(jnp.clip(index, low, high), masked=False)  # noqa: E731
    counting = lambda: (~is_saturated(step)).astype(jnp.int32)  # noqa: E731

    def advance(state):
        index, _ = state
        _accumulate(step, near(index + 3))
        _weigh(step)
        _count(step, index + 1)
        _multiply(step, near(index))
        return index - 1, counting()

    def pipeline(_):
        # The fourth stage adds nothing before the third has run.
        weights[...] = jnp.zeros(weights.shape, weights.dtype)
        shrink[...] = jnp.ones(shrink.shape, jnp.float32)
        _multiply(step, near(high))
        _count(step, high)
        _multiply(step, near(high - 1))
        going_on = lambda state: (state[0] + 1 >= low) & (state[1] == 1)  # noqa: E731
        index, _ = jax.lax.while_loop(going_on, advance, (high - 2, counting()))
        _accumulate(step, near(index + 3))
        _weigh(step)
        _accumulate(step, near(index + 2))
        return index + 1

    return jax.lax.cond((high >= low) & (counting() == 1), pipeline, lambda _: high, None)


def _multiply(step: ForwardStep, tile: Tile) -> None:
    """The first stage: products."""
    stages = step.scratch.stages
    stages.next_logits[...] = registers.join(tiles.negative_logits(tile))
    if step.plan.cope.own_gate_key:
        stages.next_gate_logits[...] = registers.join(tiles.negative_gate_logits(tile))


def _count(step: ForwardStep, index: Array) -> None:
    """The second stage: gates, counts, and a bound of the logits."""
    plan, scratch, stages = step.plan, step.scratch, step.scratch.stages
    save_carry(scratch, index)
    for rows in plan.row_groups:
        stages.lane_minimum[rows, :], stages.lane_total[rows, :] = _count_rows(step, rows)
    last, lower = plan.cope.last, step.inputs.lower_triangle[...]
    total, old = stages.lane_total[...], scratch.maximum[...]
    before = jnp.minimum(scratch.carry[...] + counting.exclusive_sum(total, lower), last)
    minimum = registers.reduce_lanes(stages.lane_minimum[...], jnp.min)
    new = jnp.maximum(old, scratch.tables.highest[...] - minimum)
    stages.count_before_lane[...] = before
    scratch.carry[...] = registers.first_lane(total + before)
    scratch.maximum[...] = new
    stages.next_shrink[...] = jnp.exp2(old - new)


def _count_rows(step: ForwardStep, rows: slice) -> tuple[Array, Array]:
    """Sums of gates down to each key of a lane; the lane's least negative logit and whole sum."""
    plan, stages = step.plan, step.scratch.stages
    lowest = total = None
    for c in reversed(range(plan.chunks)):
        lanes = slice(c * LANES, (c + 1) * LANES)
        logits = stages.next_logits[rows, lanes]
        gate_logits = stages.next_gate_logits[rows, lanes] if plan.cope.own_gate_key else logits
        (exponent,) = tiles.gate_exponents(plan, step.inputs.gate_bias, [gate_logits])
        gate = counting.gate(exponent, plan.cope.newton)
        lowest = logits if lowest is None else jnp.minimum(lowest, logits)
        total = gate if total is None else total + gate
        stages.negative_logits[rows, lanes], stages.lane_prefix[rows, lanes] = logits, total
    return lowest, total


def _weigh(step: ForwardStep) -> None:
    """The third stage: biases, softmax."""
    plan, scratch, stages = step.plan, step.scratch, step.scratch.stages
    for rows in plan.row_groups:
        negative_logits = registers.chunks(stages.negative_logits[rows, :])
        prefix = registers.chunks(stages.lane_prefix[rows, :])
        before = stages.count_before_lane[rows, :]
        counted = CountedTile(negative_logits, [x + before for x in prefix])
        maximum = scratch.maximum[rows, :]
        logits, _ = tiles.biased_logits(plan, scratch.tables, counted, rows, maximum, slopes=False)
        weights, shrink = [jnp.exp2(x) for x in logits], stages.next_shrink[rows, :]
        scratch.total[rows, :] = scratch.total[rows, :] * shrink + registers.sum_chunks(weights)
        packed = registers.pack_words(registers.join(weights), step.inputs.value.dtype)
        start = rows.start * stages.weights.shape[0] // plan.blocks.query
        stages.weights[start : start + packed.shape[0], :] = packed
        stages.shrink[rows, :] = shrink


def _accumulate(step: ForwardStep, tile: Tile) -> None:
    """The fourth stage: the output."""
    stages = step.scratch.stages
    weights = registers.unpack_words(stages.weights[...], step.inputs.value.dtype)
    add_values(step, tile, weights, stages.shrink[...])
