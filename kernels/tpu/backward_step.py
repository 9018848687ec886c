"""One place of the backward kernel's grid: its scratch memory, and the gradients of its tiles.

Gradients of query and keys lack a factor, `gradient_scale`, by which XLA multiplies in the end.
Those of keys and values are made with lengths last: queries and cotangent are transposed, once for
each block of queries, instead of transposing every tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Ref

from posjax.kernels.common import LN2
from posjax.kernels.tpu import counting, relative, tiles
from posjax.kernels.tpu.arrays import Gradients, Inputs, Residuals
from posjax.kernels.tpu.counting import LaneMoments
from posjax.kernels.tpu.plan import LANES, Plan
from posjax.kernels.tpu.registers import (
    NT,
    chunks,
    join,
    matmul,
    reduce_lanes,
    sum_chunks,
)
from posjax.kernels.tpu.tables import TableScratch
from posjax.kernels.tpu.tiles import Chunks, CountedTile, Tile
from posjax.types import Array, Float, Num

__all__ = [
    "FEW_CROSSINGS",
    "BackwardScratch",
    "BackwardStages",
    "BackwardStep",
    "add_products",
    "add_table",
    "add_tile",
    "add_values",
    "gate_product_gradients",
    "gradient_scale",
    "product_gradients",
    "saved_carry",
]

# Crossings for which the pipeline has code without an inner loop.
FEW_CROSSINGS = 2


class BackwardStages(NamedTuple):
    """Memory in which one stage of the counting pipeline leaves its results for the next.

    Args:
        next_logits: `tiles.negative_logits` of the next block.
        negative_logits: later the running sums of `lane_dcounts`.
        lane_prefix: sums of gates from the last chunk of a lane up to each key.
        count_before_lane: place of the keys behind each lane, from which it counts on.
        dlogits: first the gradients of the weights.
        lane_dcounts: each lane's sum of dlogit * slope; later the sum of all lanes before it.
        lane_total: see `LaneMoments`; so for `lane_moment` and `lane_ramp_sums`.
        weights: packed, see `registers.pack_words`; `dproducts`, of query . key, likewise.
    """

    next_logits: Float[Ref, "t s"]
    negative_logits: Float[Ref, "t s"]
    gates: Float[Ref, "t s"]
    lane_prefix: Float[Ref, "t s"]
    count_before_lane: Float[Ref, "t 128"]
    dlogits: Float[Ref, "t s"]
    lane_dcounts: Float[Ref, "t 128"]
    lane_total: Float[Ref, "t 128"]
    lane_moment: Float[Ref, "t 128"]
    lane_ramp_sums: tuple[Float[Ref, "t 128"], ...]
    weights: Num[Ref, "words s"]
    dproducts: Num[Ref, "words s"]


class BackwardScratch(NamedTuple):
    """Memory that lives while a block of queries walks over its keys.

    Args:
        copy_done: semaphore of the copies of `dquery`.
        ramp_sums: see `counting.ramp_sums`, of the gradients of the logits.
        dlogits_total: their sum in each lane.
        saved_carries: carry of every block of keys, in the lane of its number.
        dcount_prefix: sum of dlogit * slope over all keys so far.
        saved_prefixes: `dcount_prefix` of every block of queries, until the next part of the keys.
        band: see `relative`; `dband` is its gradient.
    """

    dquery: Float[Ref, "t H"]
    lse: Float[Ref, "t 128"]
    delta: Float[Ref, "t 128"]
    query_transposed: Num[Ref, "H t"]
    cotangent_transposed: Num[Ref, "E t"]
    copy_done: Ref
    ramp_sums: Float[Ref, "t width"] | None = None
    dlogits_total: Float[Ref, "t 128"] | None = None
    saved_carries: Float[Ref, "carry_groups t 128"] | None = None
    dcount_prefix: Float[Ref, "t 128"] | None = None
    saved_prefixes: Float[Ref, "query_blocks t"] | None = None
    tables: TableScratch | None = None
    stages: BackwardStages | None = None
    band: Float[Ref, "band 128"] | None = None
    dband: Float[Ref, "band 128"] | None = None


class BackwardStep(NamedTuple):
    """One place of the grid: what is static, and what can be read and written.

    Args:
        first_block: number of the first block of keys in memory.
        head: number of the query head in its group.
        blocks_after: blocks of queries behind this one.
    """

    plan: Plan
    inputs: Inputs
    residuals: Residuals
    gradients: Gradients
    scratch: BackwardScratch
    first_block: Array
    head: Array
    blocks_after: Array

    def tile(self, index: Array, masked: bool) -> Tile:
        """The tile of a block of keys."""
        return Tile(self.plan, self.inputs, index - self.first_block, masked)


class TileGradients(NamedTuple):
    """The weights of a tile, and gradients of the products of query with key and gate key."""

    weights: Chunks
    key: Chunks
    gate_key: Chunks | None = None


def add_tile(step: BackwardStep, index: Array, *, masked: bool, counts: bool) -> None:
    """Adds the gradients of one block of keys."""
    plan, scratch, tile = step.plan, step.scratch, step.tile(index, masked)
    inputs, gradients = step.inputs, step.gradients
    counted, crossings = None, 0
    if counts and plan.cope is not None:
        counted, _ = tiles.count(tile, saved_carry(scratch.saved_carries, index))
        places = counted.places
        crossings = counting.crossings(places[0], places[-1], plan.cope.last)
    dweights = chunks(matmul(step.residuals.cotangent[...], tile.read(inputs.value), NT))
    if plan.relative:
        relative.fill_band(plan, inputs.strips, scratch.band, step.blocks_after, index)
    found = _tile_gradients(step, tile, counted, dweights, crossings)
    if plan.relative:
        dstrips = gradients.strips.at[step.head]
        relative.add_strips_gradient(plan, scratch.dband, dstrips, step.blocks_after, index)
    add_products(step, tile, inputs.key, gradients.key, join(found.key))
    if found.gate_key is not None:
        add_products(step, tile, inputs.gate_key, gradients.gate_key, join(found.gate_key))
    add_values(step, tile, join(found.weights))


def _tile_gradients(
    step: BackwardStep,
    tile: Tile,
    counted: CountedTile | None,
    dweights: Chunks,
    crossings: int | Array,
) -> TileGradients:
    """Also adds the gradients of the table, of gate biases and of the band.

    Args:
        counted: None if nothing is counted.
        crossings: see `counting.ramp_sums`.
    """
    plan, scratch = step.plan, step.scratch
    if counted is None:
        logits = [x - scratch.lse[...] for x in tiles.plain_logits(tile)]
    else:
        logits, slopes = tiles.biased_logits(plan, scratch.tables, counted, base=scratch.lse[...])
    if plan.relative:
        logits = relative.add_band(plan, scratch.band, logits)
    weights = [jnp.exp2(x) for x in logits]
    weights = tile.hide(weights, 0.0)
    dlogits = [w * (d - scratch.delta[...]) for w, d in zip(weights, dweights, strict=True)]
    if plan.relative:
        relative.collect_band_gradient(plan, scratch.dband, dlogits)
    dproducts = product_gradients(plan, dlogits)
    if counted is None:
        return TileGradients(weights, dproducts)
    add_table(step, LaneMoments.of(counted.places, dlogits), crossings)
    dcounts = [d * slope for d, slope in zip(dlogits, slopes, strict=True)]
    prefix, upper = scratch.dcount_prefix[...], step.residuals.upper_triangle[...]
    dgates, scratch.dcount_prefix[...] = counting.prefix_sums(dcounts, prefix, upper)
    dgate_products = gate_product_gradients(step, counted.gates, dgates)
    if plan.cope.own_gate_key:
        return TileGradients(weights, dproducts, dgate_products)
    return TileGradients(weights, [a + b for a, b in zip(dproducts, dgate_products, strict=True)])


def gradient_scale(plan: Plan) -> float:
    """The factor that the kernel's gradients of query and keys lack."""
    return plan.scale or 1.0


def product_gradients(plan: Plan, dlogits: Chunks) -> Chunks:
    """Gradients of query . key, less the `gradient_scale`, from those of the logits."""
    factor = plan.scale / gradient_scale(plan)
    return dlogits if factor == 1 else [x * factor for x in dlogits]


def gate_product_gradients(step: BackwardStep, gates: Chunks, dgates: Chunks) -> Chunks:
    """Gradients of query . (gate) key, less the `gradient_scale`, from those of the gates.

    Also adds the gradient of the gate bias.

    Args:
        dgates: in units of 1 / ln 2.
    """
    cope = step.plan.cope
    dgate_logits = [(g - g * g) * d for g, d in zip(gates, dgates, strict=True)]
    if cope.has_gate_bias:
        rows = jnp.sum(sum_chunks(dgate_logits), axis=0, keepdims=True) * LN2**2
        step.gradients.gate_bias[step.head] += rows
    return [x * (LN2 * cope.gate_scale / gradient_scale(step.plan)) for x in dgate_logits]


def saved_carry(saved, index: Array) -> Float[Array, "t 128"]:
    """The carry of a block, from the lane in which the forward kernel kept it.

    Args:
        saved: a reference to [carry_groups, t, 128].
    """
    group = saved[index // LANES]
    lane = jax.lax.broadcasted_iota(jnp.int32, group.shape, 1)
    return reduce_lanes(jnp.where(lane == index % LANES, group, 0.0), jnp.sum)


def add_table(
    step: BackwardStep, lanes: LaneMoments, crossings: int | Array, rows: slice = slice(None)
) -> None:
    """Adds the sums of some rows from which the gradients of their tables are made in the end."""
    scratch = step.scratch
    upper, pieces = step.residuals.upper_triangle[...], step.plan.pieces
    scratch.ramp_sums[rows, :] += counting.ramp_sums(lanes, upper, pieces, crossings)
    scratch.dlogits_total[rows, :] += lanes.total


def add_products(
    step: BackwardStep,
    tile: Tile,
    keys: Num[Ref, "S H"],
    dkeys: Float[Ref, "H S"],
    dproducts: Num[Array, "t s"],
) -> None:
    """Adds the gradients of query and keys, from those of query . key."""
    block = tile.read(keys)
    dproducts = dproducts.astype(block.dtype)
    step.scratch.dquery[...] += matmul(dproducts, block)
    query = step.scratch.query_transposed[...].astype(block.dtype)
    dkeys[:, tile.here] += matmul(query, dproducts)


def add_values(step: BackwardStep, tile: Tile, weights: Num[Array, "t s"]) -> None:
    """Adds the gradients of values."""
    cotangent = step.scratch.cotangent_transposed[...]
    step.gradients.value[:, tile.here] += matmul(cotangent, weights.astype(cotangent.dtype))
