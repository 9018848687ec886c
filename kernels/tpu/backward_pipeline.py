"""The full tiles of the backward kernel that count, as a pipeline over the blocks of keys.

| stage | block | reads                              | writes                                   |
|-------|-------|------------------------------------|------------------------------------------|
| 1     | t     | query, key                         | next_logits                              |
| 2     | t - 1 | next_logits, carry, cotangent,     | negative_logits, gates, lane_prefix,     |
|       |       | value                              | count_before_lane, dlogits               |
| 3     | t - 2 | these, tables, sums over keys      | weights, dproducts, sums for the table   |
| 4     | t - 3 | weights, dproducts                 | gradients of query, key, value           |

Stage 2 leaves the gradients of the weights in dlogits; stage 3 makes those of the logits of them,
in two walks over the rows, because a gate's gradient needs the sums of all lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Ref
from jax.experimental import pallas as pl

from posjax.kernels.tpu import backward_step, counting, registers, tiles
from posjax.kernels.tpu.backward_step import FEW_CROSSINGS, BackwardStep
from posjax.kernels.tpu.counting import LaneMoments
from posjax.kernels.tpu.plan import LANES
from posjax.kernels.tpu.registers import NT, chunks, join, last_lane, matmul
from posjax.kernels.tpu.tiles import Chunks, CountedTile, Tile
from posjax.types import Array, Num

__all__ = ["run_counting_pipeline"]


def run_counting_pipeline(step: BackwardStep, low: Array, high: Array) -> None:
    """Adds the full blocks low ... high, all of which count."""
    stages = step.scratch.stages
    near = lambda index: step.tile(jnp.clip(index, low, high), masked=False)  # noqa: E731

    def advance(state, most):
        index, _ = state
        _accumulate(step, near(index - 3))
        _weigh(step, most or state[1])
        crossings = _count(step, near(index - 1), index - 1)
        _multiply(step, near(index))
        return index + 1, crossings

    def advance_all(state):
        """First while few crossings are enough, then while they are not: an inner loop for more."""
        inside = lambda state: state[0] <= high + 1  # noqa: E731
        few = lambda state: inside(state) & (state[1] <= FEW_CROSSINGS)  # noqa: E731
        many = lambda state: inside(state) & (state[1] > FEW_CROSSINGS)  # noqa: E731
        state = jax.lax.while_loop(few, functools.partial(advance, most=FEW_CROSSINGS), state)
        return jax.lax.while_loop(many, functools.partial(advance, most=None), state)

    @pl.when(high >= low)
    def _():
        for packed in (stages.weights, stages.dproducts):
            packed[...] = jnp.zeros(packed.shape, packed.dtype)
        _multiply(step, near(low))
        state = low + 2, _count(step, near(low), low)
        _multiply(step, near(low + 1))
        _, crossings = jax.lax.while_loop(lambda state: state[0] <= high + 1, advance_all, state)
        _accumulate(step, near(high - 1))
        _weigh(step, crossings)
        _accumulate(step, near(high))


def _multiply(step: BackwardStep, tile: Tile) -> None:
    """The first stage: products of queries and keys."""
    step.scratch.stages.next_logits[...] = join(tiles.negative_logits(tile))


def _count(step: BackwardStep, tile: Tile, index: Array) -> Array:
    """The second stage: gates and counts; the most rows of the table that a lane passes."""
    plan, inputs, stages = step.plan, step.inputs, step.scratch.stages
    stages.dlogits[...] = matmul(step.residuals.cotangent[...], tile.read(inputs.value), NT)
    for rows in plan.row_groups:
        logits = stages.next_logits[rows, :]
        exponents = tiles.gate_exponents(plan, inputs.gate_bias, chunks(logits))
        gates = [counting.gate(x, plan.cope.newton) for x in exponents]
        prefix = _running_sums(gates[::-1])[::-1]
        stages.negative_logits[rows, :], stages.gates[rows, :] = logits, join(gates)
        stages.lane_prefix[rows, :] = join(prefix)
    places = [_count_rows(step, rows, index) for rows in plan.lane_groups]
    highest, lowest = (jnp.concatenate(parts) for parts in zip(*places, strict=True))
    return counting.crossings(highest, lowest, plan.cope.last)


def _count_rows(step: BackwardStep, rows: slice, index: Array) -> tuple[Array, Array]:
    """The count before each lane, from its sum of gates; the highest and the lowest place in it."""
    scratch, stages, lower = step.scratch, step.scratch.stages, step.inputs.lower_triangle[...]
    total, lowest = stages.lane_prefix[rows, :LANES], stages.lane_prefix[rows, -LANES:]
    carry = backward_step.saved_carry(scratch.saved_carries.at[:, rows], index)
    before = jnp.minimum(carry + counting.exclusive_sum(total, lower), step.plan.cope.last)
    stages.count_before_lane[rows, :] = before
    return total + before, lowest + before


def _running_sums(parts: Chunks) -> Chunks:
    sums = parts[:1]
    for part in parts[1:]:
        sums.append(sums[-1] + part)
    return sums


def _weigh(step: BackwardStep, crossings: int | Array) -> None:
    """The third stage: everything but the large products."""
    plan = step.plan
    ranks = range(crossings if isinstance(crossings, int) else 0)
    for rows in plan.row_groups:
        _weigh_rows(step, rows, ranks)
    for rows in plan.lane_groups:
        _add_table(step, crossings, rows)
        _add_dcounts(step, rows)
    for rows in plan.row_groups:
        _add_gate_gradients(step, rows)


def _weigh_rows(step: BackwardStep, rows: slice, ranks: range) -> None:
    """Weights, gradients of logits, their running sums for the gates and their sums for tables."""
    plan, scratch, stages = step.plan, step.scratch, step.scratch.stages
    logits = chunks(stages.negative_logits[rows, :])
    prefix = chunks(stages.lane_prefix[rows, :])
    dweights = chunks(stages.dlogits[rows, :])
    before, delta = stages.count_before_lane[rows, :], scratch.delta[rows, :]
    places = [x + before for x in prefix]
    logits, slopes = tiles.biased_logits(
        plan, scratch.tables, CountedTile(logits, places), rows, scratch.lse[rows, :]
    )
    weights = [jnp.exp2(x) for x in logits]
    dlogits = [w * (d - delta) for w, d in zip(weights, dweights, strict=True)]
    dcounts = _running_sums([d * slope for d, slope in zip(dlogits, slopes, strict=True)])
    lanes = LaneMoments.of(places, dlogits)
    for rank in ranks:
        stages.lane_ramp_sums[rank][rows, :] = lanes.ramp_sum(rank)
    stages.lane_total[rows, :], stages.lane_moment[rows, :] = lanes.total, lanes.moment
    stages.lane_dcounts[rows, :] = dcounts[-1]
    # In the place of what has been read.
    stages.negative_logits[rows, :], stages.dlogits[rows, :] = join(dcounts), join(dlogits)
    _keep_packed(step, stages.weights, rows, weights)


def _add_dcounts(step: BackwardStep, rows: slice) -> None:
    """Sums over the keys before each lane for the gates, from those of each lane."""
    scratch, stages = step.scratch, step.scratch.stages
    dcounts, upper = stages.lane_dcounts[rows, :], step.residuals.upper_triangle[...]
    before = scratch.dcount_prefix[rows, :] + counting.exclusive_sum(dcounts, upper)
    scratch.dcount_prefix[rows, :] = last_lane(before + dcounts)
    stages.lane_dcounts[rows, :] = before


def _add_table(step: BackwardStep, crossings: int | Array, rows: slice) -> None:
    """`backward_step.add_table` with the sums of each lane."""
    stages = step.scratch.stages
    before = stages.count_before_lane[rows, :]

    def ramp_sum(rank):
        if isinstance(rank, int):
            return stages.lane_ramp_sums[rank][rows, :]
        places = [x + before for x in chunks(stages.lane_prefix[rows, :])]
        return counting.lane_ramp_sum(places, chunks(stages.dlogits[rows, :]), rank)

    lowest = stages.lane_prefix[rows, -LANES:] + before
    total, moment = stages.lane_total[rows, :], stages.lane_moment[rows, :]
    backward_step.add_table(step, LaneMoments(total, moment, lowest, ramp_sum), crossings, rows)


def _add_gate_gradients(step: BackwardStep, rows: slice) -> None:
    """The gradients of the products of query and key, by logits and by gates."""
    stages = step.scratch.stages
    gates = chunks(stages.gates[rows, :])
    dcounts = chunks(stages.negative_logits[rows, :])
    dlogits = chunks(stages.dlogits[rows, :])
    before = stages.lane_dcounts[rows, :]
    by_gates = backward_step.gate_product_gradients(step, gates, [x + before for x in dcounts])
    by_logits = backward_step.product_gradients(step.plan, dlogits)
    dproducts = [a + b for a, b in zip(by_logits, by_gates, strict=True)]
    _keep_packed(step, stages.dproducts, rows, dproducts)


def _keep_packed(
    step: BackwardStep, target: Num[Ref, "words s"], rows: slice, parts: Chunks
) -> None:
    packed = registers.pack_words(join(parts), step.inputs.query.dtype)
    start = rows.start * target.shape[0] // step.plan.blocks.query
    target[start : start + packed.shape[0], :] = packed


def _accumulate(step: BackwardStep, tile: Tile) -> None:
    """The fourth stage: the gradients, which are products."""
    stages, dtype = step.scratch.stages, step.inputs.query.dtype
    weights = registers.unpack_words(stages.weights[...], dtype)
    dproducts = registers.unpack_words(stages.dproducts[...], dtype)
    backward_step.add_values(step, tile, weights)
    backward_step.add_products(step, tile, step.inputs.key, step.gradients.key, dproducts)
