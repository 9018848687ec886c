"""The full tiles of the backward kernel that count, as a pipeline over the blocks of keys.

| stage | block | reads                            | writes                                |
|-------|-------|----------------------------------|---------------------------------------|
| 1     | t     | query, key                       | coming                                |
| 2     | t - 1 | coming, carry, cotangent, value  | falls, gates, within, behind, dlogits |
| 3     | t - 2 | these, table, prefix sum         | weights, ddots, sums for the table    |
| 4     | t - 3 | weights, ddots                   | gradients of query, key, value        |

What stage 2 calls dlogits are the gradients of the weights; stage 3 makes those of the logits of
them, in two walks over the rows, because a gate's gradient needs the sums of all lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.kernels.tpu import counting, gradients, registers, tiles
from posjax.kernels.tpu.counting import LaneSums
from posjax.kernels.tpu.gradients import Block
from posjax.kernels.tpu.plan import LANES, Plan
from posjax.kernels.tpu.registers import NT, chunks, join, last_lane, matmul
from posjax.kernels.tpu.tiles import Counted
from posjax.types import Array

__all__ = ["count_on", "scratch_shapes"]

# Crossings for which the pipeline has code without an inner loop.
_FEW = 2
# The sums that stage 2 leaves for each of them.
_OWN = tuple(f"own_{rank}" for rank in range(_FEW))


def scratch_shapes(plan: Plan, dtype: jnp.dtype) -> dict:
    """What one stage leaves for the next."""
    rows, keys = plan.blocks.query, plan.blocks.key
    wide, narrow = (pltpu.VMEM((rows, n), jnp.float32) for n in (keys, LANES))
    held = registers.held_shape(rows, keys, dtype)
    shapes = dict.fromkeys(("coming", "falls", "gates", "within", "dlogits"), wide)
    shapes |= dict.fromkeys(("weights", "ddots"), pltpu.VMEM(held.shape, held.dtype))
    names = ("behind", "lane_total", "lane_moment", "lane_slopes", *_OWN)
    return shapes | dict.fromkeys(names, narrow)


def count_on(block: Block, low: Array, high: Array) -> None:
    """Adds the full blocks low ... high, all of which count."""
    scratch = block.scratch
    near = lambda index: block.tile(jnp.clip(index, low, high), masked=False)  # noqa: E731

    def step(loop, most):
        index, _ = loop
        _add_held(block, near(index - 3))
        _weigh_held(block, most or loop[1])
        crossings = _count_and_hold(block, near(index - 1), index - 1)
        _multiply(block, near(index))
        return index + 1, crossings

    def steps(loop):
        """First while two crossings are enough, then while they are not: an inner loop for more."""
        inside = lambda loop: loop[0] <= high + 1  # noqa: E731
        few = lambda loop: inside(loop) & (loop[1] <= _FEW)  # noqa: E731
        many = lambda loop: inside(loop) & (loop[1] > _FEW)  # noqa: E731
        loop = jax.lax.while_loop(few, functools.partial(step, most=_FEW), loop)
        return jax.lax.while_loop(many, functools.partial(step, most=None), loop)

    @pl.when(high >= low)
    def _():
        for name in ("weights", "ddots"):
            scratch[name][...] = jnp.zeros(scratch[name].shape, scratch[name].dtype)
        _multiply(block, near(low))
        loop = low + 2, _count_and_hold(block, near(low), low)
        _multiply(block, near(low + 1))
        _, crossings = jax.lax.while_loop(lambda loop: loop[0] <= high + 1, steps, loop)
        _add_held(block, near(high - 1))
        _weigh_held(block, crossings)
        _add_held(block, near(high))


def _multiply(block: Block, tile: tiles.Tile) -> None:
    """The first stage: products of queries and keys."""
    block.scratch["coming"][...] = join(tiles.falls(tile))


def _count_and_hold(block: Block, tile: tiles.Tile, index: Array) -> Array:
    """The second stage: gates and counts; how many rows of the table a lane passes at most."""
    plan, scratch = block.plan, block.scratch
    scratch["dlogits"][...] = matmul(block.inputs["cotangent"][...], tile.keys("value"), NT)
    for rows in plan.row_groups:
        falls = scratch["coming"][rows, :]
        exponents = tiles.exponents(plan, block.inputs, chunks(falls))
        gates = [counting.gate(x, plan.contextual.newton) for x in exponents]
        within = _running(gates[::-1])[::-1]
        scratch["falls"][rows, :], scratch["gates"][rows, :] = falls, join(gates)
        scratch["within"][rows, :] = join(within)
    places = [_count_rows(block, rows, index) for rows in plan.lane_groups]
    highest, lowest = (jnp.concatenate(parts) for parts in zip(*places, strict=True))
    return counting.crossings(highest, lowest, plan.contextual.last)


def _count_rows(block: Block, rows: slice, index: Array) -> tuple[Array, Array]:
    """Counts behind each lane, from its sum of gates; the highest and the lowest place in it."""
    scratch, lower = block.scratch, block.inputs["lower"][...]
    sums, lowest = scratch["within"][rows, :LANES], scratch["within"][rows, -LANES:]
    carry = gradients.carry(scratch["saved"].at[:, rows], index)
    behind = jnp.minimum(carry + counting.exclusive(sums, lower), block.plan.contextual.last)
    scratch["behind"][rows, :] = behind
    return sums + behind, lowest + behind


def _running(parts: list[Array]) -> list[Array]:
    sums = parts[:1]
    for part in parts[1:]:
        sums.append(sums[-1] + part)
    return sums


def _weigh_held(block: Block, crossings: int | Array) -> None:
    """The third stage: everything that is no large product."""
    plan = block.plan
    ranks = range(crossings if isinstance(crossings, int) else 0)
    for rows in plan.row_groups:
        _weigh_rows(block, rows, ranks)
    for rows in plan.lane_groups:
        _add_table(block, crossings, rows)
        _add_slopes(block, rows)
    for rows in plan.row_groups:
        _hand_on_rows(block, rows)


def _weigh_rows(block: Block, rows: slice, ranks: range) -> None:
    """Weights, gradients of logits, their running sums for the gates and their sums for tables."""
    plan, scratch = block.plan, block.scratch
    falls, within, dweights = (
        chunks(scratch[name][rows, :]) for name in ("falls", "within", "dlogits")
    )
    behind, delta = scratch["behind"][rows, :], scratch["delta"][rows, :]
    places = [x + behind for x in within]
    logits, slopes = tiles.biased(
        plan, scratch, Counted(falls, places), rows, scratch["lse"][rows, :]
    )
    weights = [jnp.exp2(x) for x in logits]
    dlogits = [w * (d - delta) for w, d in zip(weights, dweights, strict=True)]
    running = _running([d * slope for d, slope in zip(dlogits, slopes, strict=True)])
    sums = LaneSums.of(places, dlogits)
    for rank in ranks:
        scratch[_OWN[rank]][rows, :] = sums.own(rank)
    scratch["lane_total"][rows, :], scratch["lane_moment"][rows, :] = sums.total, sums.moment
    scratch["lane_slopes"][rows, :] = running[-1]
    # In the place of what has been read.
    scratch["falls"][rows, :], scratch["dlogits"][rows, :] = join(running), join(dlogits)
    _hold(block, "weights", rows, weights)


def _add_slopes(block: Block, rows: slice) -> None:
    """Sums for the gates, from those of each lane."""
    scratch = block.scratch
    slopes, upper = scratch["lane_slopes"][rows, :], block.inputs["upper"][...]
    before = scratch["prefix"][rows, :] + counting.exclusive(slopes, upper)
    scratch["prefix"][rows, :] = last_lane(before + slopes)
    scratch["lane_slopes"][rows, :] = before


def _add_table(block: Block, crossings: int | Array, rows: slice) -> None:
    """As `gradients.add_table`, from the sums of each lane."""
    scratch = block.scratch
    behind = scratch["behind"][rows, :]

    def own(rank):
        if isinstance(rank, int):
            return scratch[_OWN[rank]][rows, :]
        places = [x + behind for x in chunks(scratch["within"][rows, :])]
        return counting.own_sum(places, chunks(scratch["dlogits"][rows, :]), rank)

    lowest = scratch["within"][rows, -LANES:] + behind
    sums = LaneSums(scratch["lane_total"][rows, :], scratch["lane_moment"][rows, :], lowest, own)
    gradients.add_table(block, sums, crossings, rows)


def _hand_on_rows(block: Block, rows: slice) -> None:
    """The gradients of the products of query and key, by logits and by gates."""
    scratch = block.scratch
    gates, running, dlogits = (
        chunks(scratch[name][rows, :]) for name in ("gates", "falls", "dlogits")
    )
    before = scratch["lane_slopes"][rows, :]
    dgates = gradients.through_gates(block, gates, [x + before for x in running])
    ddots = gradients.of_products(block.plan, dlogits)
    _hold(block, "ddots", rows, [a + b for a, b in zip(ddots, dgates, strict=True)])


def _hold(block: Block, name: str, rows: slice, parts: list[Array]) -> None:
    held, target = registers.hold(join(parts), block.inputs["query"].dtype), block.scratch[name]
    start = rows.start * target.shape[0] // block.plan.blocks.query
    target[start : start + held.shape[0], :] = held


def _add_held(block: Block, tile: tiles.Tile) -> None:
    """The fourth stage: the products that the gradients are."""
    weights, ddots = (
        registers.held(block.scratch[name][...], block.inputs["query"].dtype)
        for name in ("weights", "ddots")
    )
    gradients.add_values(block, tile, weights)
    gradients.add_products(block, tile, "key", ddots)
