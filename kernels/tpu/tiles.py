"""Tile mathematics of attention; a tile is a list of [rows, 128] chunks of keys."""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from posjax.kernels.tpu import counting, tables
from posjax.kernels.tpu.plan import LOG2E, Plan
from posjax.kernels.tpu.registers import NT, chunks, matmul, rows_of
from posjax.types import Array, Bool, Float, Num

__all__ = ["Chunks", "Counted", "Tile", "biased", "count", "fill_tables", "plain_logits"]

Chunks = list[Float[Array, "t 128"]]


class Counted(NamedTuple):
    """A block of keys, counted: what is needed to look its biases up.

    `falls` are the products of query and key, scaled, in units of -ln 2.
    """

    falls: Chunks
    places: Chunks
    gates: Chunks | None = None


@dataclasses.dataclass(frozen=True)
class Tile:
    """A block of queries with a block of the keys that are in memory.

    Args:
        inputs: where the kernel's inputs can be read.
        index: number of the block of keys, from the first one in memory.
        masked: whether some pair may not attend.
    """

    plan: Plan
    inputs: dict
    index: Array
    masked: bool

    def keys(self, name: str) -> Num[Array, "s size"]:
        """The block of keys, values or gate keys."""
        return self.inputs[name][self.here, :]

    @property
    def here(self) -> pl.Slice:
        """Its place among the keys in memory."""
        size = self.plan.blocks.key
        return pl.ds(pl.multiple_of(self.index * size, size), size)

    @functools.cached_property
    def allowed(self) -> list[Bool[Array, "t 128"]] | None:
        """Which pairs may attend; None where all may."""
        if not (self.masked and self.plan.restricted):
            return None
        names = [name for name in ("positions", "segments") if f"query_{name}" in self.inputs]
        query = {name: rows_of(self.inputs[f"query_{name}"][...]) for name in names}
        key = {name: chunks(self.inputs[f"key_{name}"][:, self.here]) for name in names}
        return [
            self._visible(query, {n: key[n][c] for n in names}) for c in range(self.plan.chunks)
        ]

    def _visible(self, query: dict, key: dict) -> Bool[Array, "t 128"]:
        parts = []
        distance = query["positions"] - key["positions"]
        if self.plan.is_causal:
            parts.append(distance >= 0)
        if self.plan.window is not None:
            left, right = self.plan.window
            parts += [distance <= left, distance >= -right]
        if self.plan.segments:
            parts.append(query["segments"] == key["segments"])
        return functools.reduce(operator.and_, parts)

    def hide(self, x: Chunks, instead: float) -> Chunks:
        """`x` with `instead` where a pair may not attend."""
        if self.allowed is None:
            return x
        return [jnp.where(a, one, instead) for a, one in zip(self.allowed, x, strict=True)]


def products(tile: Tile, name: str, rows: slice = slice(None)) -> Chunks:
    """Query . key, or query . gate key, unscaled."""
    keys = tile.keys(name)
    return chunks(matmul(tile.inputs["query"][rows, :].astype(keys.dtype), keys, NT))


def plain_logits(tile: Tile) -> Chunks:
    """Scaled products in units of ln 2."""
    return [x * (tile.plan.scale * LOG2E) for x in products(tile, "key")]


def falls_and_exponents(tile: Tile, rows: slice = slice(None)) -> tuple[Chunks, Chunks]:
    """The products of query and key, and the logits of the gates, both in units of -ln 2."""
    plan, contextual = tile.plan, tile.plan.contextual
    dots = products(tile, "key", rows)
    falls = [x * (-plan.scale * LOG2E) for x in dots]
    exponents = falls
    if contextual.own_gate_key or contextual.gate_scale != plan.scale:
        gate_dots = products(tile, "gate_key", rows) if contextual.own_gate_key else dots
        exponents = [x * (-contextual.gate_scale * LOG2E) for x in gate_dots]
    if contextual.gate_bias:
        exponents = [x - tile.inputs["gate_bias"][...] for x in exponents]
    return falls, exponents


def count(tile: Tile, carry: Array) -> tuple[Counted, Array]:
    """Counts the block; also the carry for the block on its left.

    Args:
        carry: count - 1/2 of each query on the right of the block.
    """
    contextual = tile.plan.contextual
    falls, exponents = falls_and_exponents(tile)
    gates = tile.hide([counting.gate(x, contextual.newton) for x in exponents], 0.0)
    lower = tile.inputs["lower"][...]
    places, carry = counting.places(gates, carry, lower, contextual.last)
    return Counted(falls, places, gates), carry


def biased(
    plan: Plan, scratch: dict, counted: Counted, rows: slice = slice(None)
) -> tuple[Chunks, Chunks]:
    """Logits with the contextual bias, in units of ln 2, and the slopes of the bias."""
    found = tables.look_up(plan, scratch, counted.places, rows)
    logits = [f.bias - x for x, f in zip(counted.falls, found, strict=True)]
    return logits, [f.slope for f in found]


def fill_tables(plan: Plan, inputs: dict, scratch: dict) -> None:
    """The products of each query with the table."""
    query = inputs["query"][...].astype(jnp.float32)
    tables.fill(plan, scratch, matmul(query, inputs["table"][...], NT))
