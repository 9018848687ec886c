"""Tile mathematics of attention; a tile is a list of [rows, 128] chunks of keys."""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Ref
from jax.experimental import pallas as pl

from posjax.kernels.common import LOG2E
from posjax.kernels.tpu import counting, tables
from posjax.kernels.tpu.arrays import Inputs
from posjax.kernels.tpu.plan import Plan
from posjax.kernels.tpu.registers import NT, chunks, from_row, matmul
from posjax.types import Array, Bool, Float, Num

__all__ = [
    "Chunks",
    "CountedTile",
    "Tile",
    "biased_logits",
    "count",
    "fill_tables",
    "gate_exponents",
    "negative_gate_logits",
    "negative_logits",
    "plain_logits",
]

Chunks = list[Float[Array, "t 128"]]


class CountedTile(NamedTuple):
    """Places of a tile's keys, to look their biases up, and `negative_logits` to add these to."""

    negative_logits: Chunks
    places: Chunks
    gates: Chunks | None = None


@dataclasses.dataclass(frozen=True)
class Tile:
    """A block of queries with a block of the keys that are in memory.

    Args:
        index: number of the block of keys, from the first one in memory.
        masked: whether some pair may not attend.
    """

    plan: Plan
    inputs: Inputs
    index: Array
    masked: bool

    @property
    def here(self) -> pl.Slice:
        """Its place among the keys in memory."""
        size = self.plan.blocks.key
        return pl.ds(pl.multiple_of(self.index * size, size), size)

    def read(self, keys: Num[Ref, "S size"]) -> Num[Array, "s size"]:
        """The block of keys, values or gate keys."""
        return keys[self.here, :]

    def products(self, keys: Num[Ref, "S size"]) -> Chunks:
        """Query . key, or query . gate key, unscaled."""
        block = self.read(keys)
        return chunks(matmul(self.inputs.query[...].astype(block.dtype), block, NT))

    @functools.cached_property
    def allowed(self) -> list[Bool[Array, "t 128"]] | None:
        """The pairs that may attend; None if all may."""
        if not (self.masked and self.plan.restricted):
            return None
        inputs, segments = self.inputs, self.plan.segments
        query = from_row(inputs.query_positions[...])
        query_segments = from_row(inputs.query_segments[...]) if segments else None
        keys = chunks(inputs.key_positions[:, self.here])
        key_segments = chunks(inputs.key_segments[:, self.here]) if segments else None
        visible = []
        for c, key in enumerate(keys):
            distance = query - key
            parts = [distance >= 0] if self.plan.is_causal else []
            if self.plan.window is not None:
                left, right = self.plan.window
                parts += [distance <= left, distance >= -right]
            if segments:
                parts.append(query_segments == key_segments[c])
            visible.append(functools.reduce(operator.and_, parts))
        return visible

    def hide(self, x: Chunks, instead: float) -> Chunks:
        """`x` with `instead` for the pairs that may not attend."""
        if self.allowed is None:
            return x
        return [jnp.where(a, one, instead) for a, one in zip(self.allowed, x, strict=True)]


def plain_logits(tile: Tile) -> Chunks:
    """The scaled products of query and key, in units of ln 2."""
    return [x * (tile.plan.scale * LOG2E) for x in tile.products(tile.inputs.key)]


def negative_logits(tile: Tile) -> Chunks:
    """The scaled products of query and key, in units of -ln 2."""
    return [x * (-tile.plan.scale * LOG2E) for x in tile.products(tile.inputs.key)]


def negative_gate_logits(tile: Tile) -> Chunks:
    """The scaled products of query and gate key, in units of -ln 2."""
    scale = tile.plan.cope.gate_scale
    return [x * (-scale * LOG2E) for x in tile.products(tile.inputs.gate_key)]


def gate_exponents(plan: Plan, gate_bias: Float[Ref, "1 128"] | None, logits: Chunks) -> Chunks:
    """The x of gates 1 / (1 + 2^x).

    Args:
        logits: `negative_gate_logits` if gates have keys of their own, or `negative_logits`.
    """
    cope = plan.cope
    if not cope.own_gate_key and cope.gate_scale != plan.scale:
        logits = [x * (cope.gate_scale / plan.scale) for x in logits]
    if cope.has_gate_bias:
        logits = [x - gate_bias[...] for x in logits]
    return logits


def count(tile: Tile, carry: Array) -> tuple[CountedTile, Array]:
    """Counts a tile; also the carry for the block on its left.

    Args:
        carry: place of each query on the right of the block.
    """
    cope, inputs, logits = tile.plan.cope, tile.inputs, negative_logits(tile)
    gate_logits = negative_gate_logits(tile) if cope.own_gate_key else logits
    exponents = gate_exponents(tile.plan, inputs.gate_bias, gate_logits)
    gates = tile.hide([counting.gate(x, cope.newton) for x in exponents], 0.0)
    places, carry = counting.places(gates, carry, inputs.lower_triangle[...], cope.last)
    return CountedTile(logits, places, gates), carry


def biased_logits(
    plan: Plan,
    scratch: tables.TableScratch,
    counted: CountedTile,
    rows: slice = slice(None),
    base: Array | float = 0.0,
    slopes: bool = True,
) -> tuple[Chunks, Chunks]:
    """Logits with the contextual bias, less `base`, in units of ln 2, and the bias's slopes."""
    found = tables.look_up(plan, scratch, counted.places, rows, base, slopes)
    logits = [f.bias - x for x, f in zip(counted.negative_logits, found, strict=True)]
    return logits, [f.slope for f in found]


def fill_tables(plan: Plan, inputs: Inputs, scratch: tables.TableScratch) -> None:
    """Keeps the products of each query with the table."""
    query = inputs.query[...].astype(jnp.float32)
    tables.fill(plan, scratch, matmul(query, inputs.table[...], NT))
