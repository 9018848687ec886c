"""Tile mathematics of attention; a tile is a list of [rows, 128] chunks of keys."""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from posjax.kernels.common import LOG2E
from posjax.kernels.tpu import counting, tables
from posjax.kernels.tpu.plan import Plan
from posjax.kernels.tpu.registers import NT, chunks, matmul, rows_of
from posjax.types import Array, Bool, Float, Num

__all__ = [
    "Chunks",
    "Counted",
    "Tile",
    "biased",
    "count",
    "exponents",
    "falls",
    "fill_tables",
    "gate_falls",
    "plain_logits",
]

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


def products(tile: Tile, name: str) -> Chunks:
    """Query . key, or query . gate key, unscaled."""
    keys = tile.keys(name)
    return chunks(matmul(tile.inputs["query"][...].astype(keys.dtype), keys, NT))


def plain_logits(tile: Tile) -> Chunks:
    """Scaled products in units of ln 2."""
    return [x * (tile.plan.scale * LOG2E) for x in products(tile, "key")]


def falls(tile: Tile) -> Chunks:
    """The scaled products of query and key, in units of -ln 2."""
    return [x * (-tile.plan.scale * LOG2E) for x in products(tile, "key")]


def gate_falls(tile: Tile) -> Chunks:
    """The scaled products of query and gate key, in units of -ln 2."""
    return [x * (-tile.plan.contextual.gate_scale * LOG2E) for x in products(tile, "gate_key")]


def exponents(plan: Plan, inputs: dict, falls: Chunks) -> Chunks:
    """The logits of the gates, in units of -ln 2, from `gate_falls`, or without those `falls`."""
    contextual = plan.contextual
    if not contextual.own_gate_key and contextual.gate_scale != plan.scale:
        falls = [x * (contextual.gate_scale / plan.scale) for x in falls]
    if contextual.gate_bias:
        falls = [x - inputs["gate_bias"][...] for x in falls]
    return falls


def count(tile: Tile, carry: Array) -> tuple[Counted, Array]:
    """Counts the block; also the carry for the block on its left.

    Args:
        carry: count - 1/2 of each query on the right of the block.
    """
    contextual, fallen = tile.plan.contextual, falls(tile)
    source = gate_falls(tile) if contextual.own_gate_key else fallen
    gates = [counting.gate(x, contextual.newton) for x in exponents(tile.plan, tile.inputs, source)]
    gates, lower = tile.hide(gates, 0.0), tile.inputs["lower"][...]
    places, carry = counting.places(gates, carry, lower, contextual.last)
    return Counted(fallen, places, gates), carry


def biased(
    plan: Plan,
    scratch: dict,
    counted: Counted,
    rows: slice = slice(None),
    base: Array | float = 0.0,
    slopes: bool = True,
) -> tuple[Chunks, Chunks]:
    """Logits with the contextual bias, less `base`, in units of ln 2, and the bias's slopes."""
    found = tables.look_up(plan, scratch, counted.places, rows, base, slopes)
    logits = [f.bias - x for x, f in zip(counted.falls, found, strict=True)]
    return logits, [f.slope for f in found]


def fill_tables(plan: Plan, inputs: dict, scratch: dict) -> None:
    """The products of each query with the table."""
    query = inputs["query"][...].astype(jnp.float32)
    tables.fill(plan, scratch, matmul(query, inputs["table"][...], NT))
