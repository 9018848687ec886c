"""What the backward kernel does with a tile; the full counting tiles go through a pipeline.

| stage | block | reads                           | writes                         |
|-------|-------|---------------------------------|--------------------------------|
| 1     | t     | query, keys, carry, cotangent   | falls, places, gates, dweights |
| 2     | t - 1 | these, table, prefix sum        | weights, ddots, sums for table |
| 3     | t - 2 | weights, ddots                  | gradients of query, key, value |
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.kernels.tpu import counting, relative, tiles
from posjax.kernels.tpu.plan import LANES, LN2, Plan
from posjax.kernels.tpu.registers import NT, TN, added, chunks, join, matmul, over_lanes
from posjax.kernels.tpu.tiles import Chunks, Counted, Tile
from posjax.types import Array

__all__ = ["Block", "add_counting", "add_tile", "scratch_shapes"]


# Crossings for which the pipeline has code without an inner loop.
_FEW = 2


class Block(NamedTuple):
    """One place of the grid: what is static, and what can be read and written."""

    plan: Plan
    inputs: dict
    outputs: dict
    scratch: dict
    start: Array  # the first block of keys in memory
    head: Array  # number of the query head in its group
    after: Array  # blocks of queries behind this one

    def tile(self, index: Array, masked: bool) -> Tile:
        """The tile of a block of keys."""
        return Tile(self.plan, self.inputs, index - self.start, masked)


def scratch_shapes(plan: Plan, dtype: jnp.dtype) -> dict:
    """What one stage leaves for the next."""
    shape = plan.blocks.query, plan.blocks.key
    held = dict.fromkeys(("falls", "places", "gates", "dweights"), pltpu.VMEM(shape, jnp.float32))
    return held | dict.fromkeys(("weights", "ddots"), pltpu.VMEM(shape, dtype))


def add_tile(block: Block, index: Array, *, masked: bool, counts: bool) -> None:
    """Adds the gradients of one block of keys."""
    plan, tile = block.plan, block.tile(index, masked)
    counted, crossings = None, 0
    if counts and plan.contextual is not None:
        counted, _ = tiles.count(tile, _carry(block.scratch["saved"], index))
        crossings = counting.crossings(counted.places, plan.contextual.last)
    dweights = chunks(matmul(block.inputs["cotangent"][...], tile.keys("value"), NT))
    if plan.relative:
        relative.fill(plan, block.inputs, block.scratch, block.after, index)
    found = _gradients(block, tile, counted, dweights, crossings)
    if plan.relative:
        strips = block.outputs["strips"].at[block.head]
        relative.end_gradient(plan, block.scratch, strips, block.after, index)
    for name, parts in found.items():
        if name != "weights":
            _add_products(block, tile, name, join(parts))
    _add_values(block, tile, join(found["weights"]))


def add_counting(block: Block, low: Array, high: Array) -> None:
    """Adds the full blocks low ... high, all of which count."""
    if block.plan.contextual.own_gate_key or block.plan.relative:
        one = lambda i, _: add_tile(block, i, masked=False, counts=True)  # noqa: E731
        jax.lax.fori_loop(low, high + 1, one, None)
        return
    scratch = block.scratch

    def step(loop, most):
        index, _ = loop
        _third_stage(block, block.tile(jnp.maximum(index - 2, low), masked=False))
        _second_stage(block, most or loop[1])
        return index + 1, _first_stage(block, index)

    def steps(loop):
        """First while two crossings are enough, then while they are not: an inner loop for more."""
        inside = lambda loop: loop[0] <= high  # noqa: E731
        few = lambda loop: inside(loop) & (loop[1] <= _FEW)  # noqa: E731
        many = lambda loop: inside(loop) & (loop[1] > _FEW)  # noqa: E731
        loop = jax.lax.while_loop(few, functools.partial(step, most=_FEW), loop)
        return jax.lax.while_loop(many, functools.partial(step, most=None), loop)

    @pl.when(high >= low)
    def _():
        for name in ("weights", "ddots"):
            scratch[name][...] = jnp.zeros(scratch[name].shape, scratch[name].dtype)
        loop = low + 1, _first_stage(block, low)
        _, crossings = jax.lax.while_loop(lambda loop: loop[0] <= high, steps, loop)
        _third_stage(block, block.tile(jnp.maximum(high - 1, low), masked=False))
        _second_stage(block, crossings)
        _third_stage(block, block.tile(high, masked=False))


def _first_stage(block: Block, index: Array) -> Array:
    """Products, gates and counts; how many rows of the table a lane's counts pass at most."""
    tile, scratch = block.tile(index, masked=False), block.scratch
    counted, _ = tiles.count(tile, _carry(scratch["saved"], index))
    for name, parts in counted._asdict().items():
        scratch[name][...] = join(parts)
    scratch["dweights"][...] = matmul(block.inputs["cotangent"][...], tile.keys("value"), NT)
    return counting.crossings(counted.places, block.plan.contextual.last)


def _second_stage(block: Block, crossings: int | Array) -> None:
    """Everything that is no large product."""
    scratch = block.scratch
    counted = Counted(*(chunks(scratch[name][...]) for name in Counted._fields))
    found = _gradients(block, None, counted, chunks(scratch["dweights"][...]), crossings)
    scratch["weights"][...] = join(found["weights"]).astype(scratch["weights"].dtype)
    scratch["ddots"][...] = join(found["key"]).astype(scratch["ddots"].dtype)


def _third_stage(block: Block, tile: Tile) -> None:
    """The products that the gradients are."""
    _add_values(block, tile, block.scratch["weights"][...])
    _add_products(block, tile, "key", block.scratch["ddots"][...])


def _gradients(
    block: Block,
    tile: Tile | None,
    counted: Counted | None,
    dweights: Chunks,
    crossings: int | Array,
) -> dict[str, Chunks]:
    """The weights, and the gradients of the products with keys and with gate keys.

    Args:
        tile: None where nothing is masked.
        counted: None where nothing is counted.
        crossings: see `counting.hinges`.
    """
    plan, scratch = block.plan, block.scratch
    if counted is None:
        logits = [x - scratch["lse"][...] for x in tiles.plain_logits(tile)]
    else:
        logits, slopes = tiles.biased(plan, scratch, counted, base=scratch["lse"][...])
    if plan.relative:
        logits = relative.add(plan, scratch, logits)
    weights = [jnp.exp2(x) for x in logits]
    weights = weights if tile is None else tile.hide(weights, 0.0)
    dlogits = [w * (d - scratch["delta"][...]) for w, d in zip(weights, dweights, strict=True)]
    if plan.relative:
        relative.collect(plan, scratch, dlogits)
    found = {"weights": weights, "key": [x * plan.scale for x in dlogits]}
    if counted is None:
        return found
    _add_table(block, counted, dlogits, crossings)
    dgates = _gate_gradients(block, counted, slopes, dlogits)
    if plan.contextual.own_gate_key:
        return found | {"gate_key": dgates}
    return found | {"key": [a + b for a, b in zip(found["key"], dgates, strict=True)]}


def _carry(saved, index: Array) -> Array:
    """The count before a block, from the lane where the forward kernel kept it."""
    group = saved[index // LANES]
    lane = jax.lax.broadcasted_iota(jnp.int32, group.shape, 1)
    return over_lanes(jnp.where(lane == index % LANES, group, 0.0), jnp.sum)


def _add_table(block: Block, counted: Counted, dlogits: Chunks, crossings: int | Array) -> None:
    """Sums from which `_finish` makes the gradients of the table's entries."""
    upper = block.inputs["upper"][...]
    hinge, total = block.scratch["hinge"], block.scratch["total"]
    hinge[...] += counting.hinges(counted.places, dlogits, upper, block.plan.pieces, crossings)
    total[...] += added(dlogits)


def _gate_gradients(block: Block, counted: Counted, slopes: Chunks, dlogits: Chunks) -> Chunks:
    """Gradients of the products that the gates are made of."""
    prefix = block.scratch["prefix"]
    dcounts = [d * slope for d, slope in zip(dlogits, slopes, strict=True)]
    sums, carry = counting.prefixes(dcounts, prefix[...], block.inputs["upper"][...])
    prefix[...] = carry
    # Slopes are in units of ln 2.
    found = [(g - g * g) * (s * LN2) for g, s in zip(counted.gates, sums, strict=True)]
    if block.plan.contextual.gate_bias:
        rows = jnp.sum(added(found), axis=0, keepdims=True) * LN2
        block.outputs["gate_bias"][block.head] += rows
    return [x * block.plan.contextual.gate_scale for x in found]


def _add_products(block: Block, tile: Tile, name: str, dproducts: Array) -> None:
    """Gradients of query . key, handed on to both."""
    keys = tile.keys(name)
    dproducts = dproducts.astype(keys.dtype)
    block.scratch["query"][...] += matmul(dproducts, keys)
    query = block.inputs["query"][...].astype(keys.dtype)
    block.outputs[name][tile.here, :] += matmul(dproducts, query, TN)


def _add_values(block: Block, tile: Tile, weights: Array) -> None:
    cotangent = block.inputs["cotangent"][...]
    block.outputs["value"][tile.here, :] += matmul(weights.astype(cotangent.dtype), cotangent, TN)
