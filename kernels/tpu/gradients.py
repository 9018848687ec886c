"""What the backward kernel does with a tile.

Gradients of query and keys lack a factor, `unit`, which XLA multiplies by in the end. Those of keys
and values are made with lengths last: queries and cotangent are turned, once for each block of
queries, instead of turning every tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from posjax.kernels.common import LN2
from posjax.kernels.tpu import counting, relative, tiles
from posjax.kernels.tpu.counting import LaneSums
from posjax.kernels.tpu.plan import LANES, Plan
from posjax.kernels.tpu.registers import NT, added, chunks, join, matmul, over_lanes
from posjax.kernels.tpu.tiles import Chunks, Counted, Tile
from posjax.types import Array

__all__ = [
    "Block",
    "add_products",
    "add_table",
    "add_tile",
    "add_values",
    "carry",
    "of_products",
    "through_gates",
    "unit",
]


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


def add_tile(block: Block, index: Array, *, masked: bool, counts: bool) -> None:
    """Adds the gradients of one block of keys."""
    plan, tile = block.plan, block.tile(index, masked)
    counted, crossings = None, 0
    if counts and plan.contextual is not None:
        counted, _ = tiles.count(tile, carry(block.scratch["saved"], index))
        places = counted.places
        crossings = counting.crossings(places[0], places[-1], plan.contextual.last)
    dweights = chunks(matmul(block.inputs["cotangent"][...], tile.keys("value"), NT))
    if plan.relative:
        relative.fill(plan, block.inputs, block.scratch, block.after, index)
    found = _gradients(block, tile, counted, dweights, crossings)
    if plan.relative:
        strips = block.outputs["strips"].at[block.head]
        relative.end_gradient(plan, block.scratch, strips, block.after, index)
    for name, parts in found.items():
        if name != "weights":
            add_products(block, tile, name, join(parts))
    add_values(block, tile, join(found["weights"]))


def _gradients(
    block: Block,
    tile: Tile,
    counted: Counted | None,
    dweights: Chunks,
    crossings: int | Array,
) -> dict[str, Chunks]:
    """The weights, and the gradients of the products with keys and with gate keys.

    Args:
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
    weights = tile.hide(weights, 0.0)
    dlogits = [w * (d - scratch["delta"][...]) for w, d in zip(weights, dweights, strict=True)]
    if plan.relative:
        relative.collect(plan, scratch, dlogits)
    found = {"weights": weights, "key": of_products(plan, dlogits)}
    if counted is None:
        return found
    add_table(block, LaneSums.of(counted.places, dlogits), crossings)
    dgates = _gate_gradients(block, counted, slopes, dlogits)
    if plan.contextual.own_gate_key:
        return found | {"gate_key": dgates}
    return found | {"key": [a + b for a, b in zip(found["key"], dgates, strict=True)]}


def unit(plan: Plan) -> float:
    """What the gradients of query and keys are to be multiplied by."""
    return plan.scale or 1.0


def of_products(plan: Plan, dlogits: Chunks) -> Chunks:
    """From gradients of logits those of the products of query and key, less the `unit`."""
    factor = plan.scale / unit(plan)
    return dlogits if factor == 1 else [x * factor for x in dlogits]


def carry(saved, index: Array) -> Array:
    """The count before a block, from the lane where the forward kernel kept it."""
    group = saved[index // LANES]
    lane = jax.lax.broadcasted_iota(jnp.int32, group.shape, 1)
    return over_lanes(jnp.where(lane == index % LANES, group, 0.0), jnp.sum)


def add_table(
    block: Block, sums: LaneSums, crossings: int | Array, rows: slice = slice(None)
) -> None:
    """Sums of some rows from which the gradients of the table's entries are made in the end."""
    hinge, total = block.scratch["hinge"], block.scratch["total"]
    upper, pieces = block.inputs["upper"][...], block.plan.pieces
    hinge[rows, :] += counting.hinges(sums, upper, pieces, crossings)
    total[rows, :] += sums.total


def _gate_gradients(block: Block, counted: Counted, slopes: Chunks, dlogits: Chunks) -> Chunks:
    """Gradients of the products that the gates are made of."""
    prefix = block.scratch["prefix"]
    dcounts = [d * slope for d, slope in zip(dlogits, slopes, strict=True)]
    sums, carry = counting.prefixes(dcounts, prefix[...], block.inputs["upper"][...])
    prefix[...] = carry
    return through_gates(block, counted.gates, sums)


def through_gates(block: Block, gates: Chunks, dgates: Chunks) -> Chunks:
    """From gradients of gates, in units of 1 / ln 2, those of their products, less the `unit`."""
    contextual = block.plan.contextual
    found = [(g - g * g) * d for g, d in zip(gates, dgates, strict=True)]
    if contextual.gate_bias:
        rows = jnp.sum(added(found), axis=0, keepdims=True) * LN2**2
        block.outputs["gate_bias"][block.head] += rows
    return [x * (LN2 * contextual.gate_scale / unit(block.plan)) for x in found]


def add_products(block: Block, tile: Tile, name: str, dproducts: Array) -> None:
    """Gradients of query . key, handed on to both."""
    keys = tile.keys(name)
    dproducts = dproducts.astype(keys.dtype)
    block.scratch["query"][...] += matmul(dproducts, keys)
    query = block.scratch["query_turned"][...].astype(keys.dtype)
    block.outputs[name][:, tile.here] += matmul(query, dproducts)


def add_values(block: Block, tile: Tile, weights: Array) -> None:
    """Gradients of values."""
    cotangent = block.scratch["cotangent_turned"][...]
    block.outputs["value"][:, tile.here] += matmul(cotangent, weights.astype(cotangent.dtype))
