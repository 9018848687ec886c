"""Tile mathematics of attention; a tile is a list of [rows, 128] chunks of keys."""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from posjax.kernels.tpu import counting
from posjax.kernels.tpu.plan import LOG2E, Plan
from posjax.kernels.tpu.registers import NT, chunks, matmul, rows_of
from posjax.types import Array, Bool, Float, Num

__all__ = ["Chunks", "Scores", "Tile", "contextual_scores", "plain_scores", "query_tables"]

Chunks = list[Float[Array, "t 128"]]


class Scores(NamedTuple):
    """Logits in units of ln 2, and, with a contextual bias, what they were made of."""

    logits: Chunks
    gates: Chunks | None = None
    places: Chunks | None = None
    slopes: Chunks | None = None
    carry: Float[Array, "t 128"] | None = None


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


def plain_scores(tile: Tile) -> Scores:
    """Scaled logits without a bias."""
    return Scores([x * (tile.plan.scale * LOG2E) for x in products(tile, "key")])


def contextual_scores(tile: Tile, carry: Array, middle, slope) -> Scores:
    """Logits with the contextual bias, and the count for the block on the left.

    Args:
        carry: count - 1/2 of each query on the right of the block.
        middle: with `slope` the tables of the queries, as `query_tables` gives them.
    """
    plan, contextual = tile.plan, tile.plan.contextual
    dots = products(tile, "key")
    gate_dots = products(tile, "gate_key") if contextual.own_gate_key else dots
    gates = tile.hide([counting.gate(_gate_exponent(tile, x)) for x in gate_dots], 0.0)
    lower = tile.inputs["lower"][...]
    places, carry = counting.places(gates, carry, lower, contextual.last)
    found = [counting.look_up(middle[...], slope[...], place) for place in places]
    logits = [x * (plan.scale * LOG2E) + f.bias for x, f in zip(dots, found, strict=True)]
    return Scores(logits, gates, places, [f.slope for f in found], carry)


def _gate_exponent(tile: Tile, dots: Array) -> Float[Array, "t 128"]:
    """-(gate's logit) in units of ln 2."""
    exponent = dots * (-tile.plan.contextual.gate_scale * LOG2E)
    if not tile.plan.contextual.gate_bias:
        return exponent
    return exponent - tile.inputs["gate_bias"][...]


def query_tables(inputs: dict) -> tuple[Float[Array, "t width"], Float[Array, "t width"]]:
    """Each query's product with the table, as `counting.look_up` wants it."""
    query = inputs["query"][...].astype(jnp.float32)
    return counting.midpoints(matmul(query, inputs["table"][...], NT))
