"""The full tiles of the forward kernel, as pipelines over the blocks of keys.

A tile that counts goes through four stages. While a block is multiplied with the queries (matrix
unit), the gates of the one before it are added up (vector unit), the one before that is looked up
and weighed (lanes, vector unit), and the values of the one before that are added (matrix unit). In
one stage after the other the units would wait for each other, and registers would overflow.

| stage | block | reads                      | writes                                        |
|-------|-------|----------------------------|-----------------------------------------------|
| 1     | t     | query, key                 | coming                                        |
| 2     | t + 1 | coming, carry, maximum     | falls, within, behind, carry, maximum, shrink |
| 3     | t + 2 | these, table               | weights                                       |
| 4     | t + 3 | weights, shrink            | output                                        |

The maximum of a row is a bound: the largest logit without the bias and the largest entry of the
row's table. So stage 3 sees each number once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from posjax.kernels.tpu import counting, registers, tiles
from posjax.kernels.tpu.counting import HALF
from posjax.kernels.tpu.plan import LANES, Plan
from posjax.kernels.tpu.softmax import Block, add_values, save_carry
from posjax.kernels.tpu.tiles import Counted, Tile
from posjax.types import Array, Bool

__all__ = ["count_on", "is_finished", "scratch_shapes", "suits"]

# By how much, in units of ln 2, the bound of a row's largest logit may exceed it.
_FAR = 64.0


def scratch_shapes(plan: Plan, dtype: jnp.dtype) -> dict:
    """What one stage leaves for the next."""
    rows, keys = plan.blocks.query, plan.blocks.key
    wide, narrow = (pltpu.VMEM((rows, n), jnp.float32) for n in (keys, LANES))
    names = ("coming", "falls", "within", *["gates_coming"] * plan.contextual.own_gate_key)
    shapes = dict.fromkeys(names, wide)
    shapes |= dict.fromkeys(("lowest", "sums", "behind", "next_shrink", "shrink"), narrow)
    held = registers.held_shape(rows, keys, dtype)
    return shapes | {"weights": pltpu.VMEM(held.shape, held.dtype)}


def suits(block: Block) -> bool | Bool[Array, ""]:
    """Whether the bound of the softmax's maximum is near enough to it."""
    return not block.plan.relative and jnp.max(block.scratch["spread"][...]) <= _FAR


def is_finished(block: Block) -> Bool[Array, ""]:
    """Whether every query has counted to the end of the table."""
    return jnp.min(block.scratch["carry"][...]) >= block.plan.contextual.last - HALF


def count_on(block: Block, high: Array, low: Array) -> Array:
    """Adds full blocks until nothing is left to count; the block to go on with."""
    near = _near(block, low, high)
    counting = lambda: (~is_finished(block)).astype(jnp.int32)  # noqa: E731

    def step(loop):
        index, _ = loop
        _add_held(block, near(index + 3))
        _weigh_held(block)
        _count_and_hold(block, index + 1)
        _multiply(block, near(index))
        return index - 1, counting()

    def pipeline(_):
        _hold_nothing(block)
        _multiply(block, near(high))
        _count_and_hold(block, high)
        _multiply(block, near(high - 1))
        going_on = lambda loop: (loop[0] + 1 >= low) & (loop[1] == 1)  # noqa: E731
        index, _ = jax.lax.while_loop(going_on, step, (high - 2, counting()))
        _add_held(block, near(index + 3))
        _weigh_held(block)
        _add_held(block, near(index + 2))
        return index + 1

    return jax.lax.cond((high >= low) & (counting() == 1), pipeline, lambda _: high, None)


def _near(block: Block, low: Array, high: Array) -> Callable[[Array], Tile]:
    """The tile of a block that is there, or of another one."""
    return lambda index: block.tile(jnp.clip(index, low, high), masked=False)


def _hold_nothing(block: Block) -> None:
    """What the last stage may add when it has been given nothing."""
    weights, shrink = block.scratch["weights"], block.scratch["shrink"]
    weights[...] = jnp.zeros(weights.shape, weights.dtype)
    shrink[...] = jnp.ones(shrink.shape, jnp.float32)


def _multiply(block: Block, tile: Tile) -> None:
    """The first stage: products."""
    block.scratch["coming"][...] = registers.join(tiles.falls(tile))
    if block.plan.contextual.own_gate_key:
        block.scratch["gates_coming"][...] = registers.join(tiles.gate_falls(tile))


def _count_and_hold(block: Block, index: Array) -> None:
    """The second stage: gates, counts, and a bound of the logits."""
    plan, scratch = block.plan, block.scratch
    save_carry(scratch, index)
    for rows in plan.row_groups:
        scratch["lowest"][rows, :], scratch["sums"][rows, :] = _count_rows(block, rows)
    last, lower = plan.contextual.last, block.inputs["lower"][...]
    within, old = scratch["sums"][...], scratch["maximum"][...]
    behind = jnp.minimum(scratch["carry"][...] + counting.exclusive(within, lower), last)
    lowest = registers.over_lanes(scratch["lowest"][...], jnp.min)
    new = jnp.maximum(old, scratch["highest"][...] - lowest)
    scratch["behind"][...] = behind
    scratch["carry"][...] = registers.first_lane(within + behind)
    scratch["maximum"][...] = new
    scratch["next_shrink"][...] = jnp.exp2(old - new)


def _count_rows(block: Block, rows: slice) -> tuple[Array, Array]:
    """Sums of gates in each lane, down to each key; the least fall and the whole sum of a lane."""
    plan, scratch = block.plan, block.scratch
    lowest = within = None
    for c in reversed(range(plan.chunks)):
        lanes = slice(c * LANES, (c + 1) * LANES)
        fall = scratch["coming"][rows, lanes]
        source = scratch["gates_coming"][rows, lanes] if plan.contextual.own_gate_key else fall
        (exponent,) = tiles.exponents(plan, block.inputs, [source])
        gate = counting.gate(exponent, plan.contextual.newton)
        lowest = fall if lowest is None else jnp.minimum(lowest, fall)
        within = gate if within is None else within + gate
        scratch["falls"][rows, lanes], scratch["within"][rows, lanes] = fall, within
    return lowest, within


def _weigh_held(block: Block) -> None:
    """The third stage: biases, softmax."""
    plan, scratch = block.plan, block.scratch
    for rows in plan.row_groups:
        falls, within = (registers.chunks(scratch[name][rows, :]) for name in ("falls", "within"))
        behind = scratch["behind"][rows, :]
        held = Counted(falls, [x + behind for x in within])
        maximum = scratch["maximum"][rows, :]
        logits, _ = tiles.biased(plan, scratch, held, rows, maximum, slopes=False)
        weights, shrink = [jnp.exp2(x) for x in logits], scratch["next_shrink"][rows, :]
        scratch["total"][rows, :] = scratch["total"][rows, :] * shrink + registers.added(weights)
        rounded = registers.hold(registers.join(weights), block.inputs["value"].dtype)
        start = rows.start * scratch["weights"].shape[0] // plan.blocks.query
        scratch["weights"][start : start + rounded.shape[0], :] = rounded
        scratch["shrink"][rows, :] = shrink


def _add_held(block: Block, tile: Tile) -> None:
    """The fourth stage: the output."""
    weights = registers.held(block.scratch["weights"][...], block.inputs["value"].dtype)
    add_values(block, tile, weights, block.scratch["shrink"][...])
