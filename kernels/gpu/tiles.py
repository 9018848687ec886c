"""What forward and backward kernels do with a tile of 64 queries and some keys."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.common import LOG2E
from posjax.kernels.gpu import diagonals, instructions
from posjax.kernels.gpu.layout import Refs, per_row, row_layout
from posjax.kernels.gpu.plan import ROWS, Plan
from posjax.kernels.gpu.reciprocals import paired_reciprocal
from posjax.kernels.gpu.stores import store
from posjax.types import Array, Bool, Float, Int, Num

__all__ = ["SAVED", "Place", "Tile", "Values", "along_rows", "first_place", "gate_bias"]

# Keys between two places that are kept for the backward pass.
SAVED = 32


def along_rows(x: Num[Array, "m"], shape: tuple[int, int]) -> Num[Array, "m n"]:
    """A number for each row, in every column."""
    return jax.lax.broadcast_in_dim(x, shape, [0])


def gate_bias(plan: Plan, refs: Refs, head: Array) -> Float[Array, ""] | None:
    """That of the head, in units of ln 2."""
    if plan.contextual is None or not plan.contextual.gate_bias:
        return None
    return refs["gate_bias"][head]


class Place(NamedTuple):
    """Where a tile stands: number in the batch, query's head, first query, first key."""

    batch: Int[Array, ""]
    head: Int[Array, ""]
    query: Int[Array, ""]
    key: Int[Array, ""]


class Values(NamedTuple):
    """Of the table, at the places of a tile; `fraction` is where in its bin a place lies."""

    bias: Float[Array, "64 n"]
    slope: Float[Array, "64 n"]
    fraction: Float[Array, "64 n"]


def first_place(plan: Plan, row: Int[Array, ""]) -> Float[Array, "64"]:
    """A count of 0; queries of padding have nothing to count, so that no walk waits for them."""
    rows = row + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=row_layout())
    return jnp.where(rows < plan.queries, per_row(-0.5), per_row(plan.contextual.last))


@dataclasses.dataclass(frozen=True)
class Tile:
    """64 queries and some keys.

    `refs` are the kernel's arguments, `operands` the tile's own parts in shared memory: query, key,
    value and, where there are any, gate_key, tables, bands, cotangent, lower, upper, sums.
    """

    plan: Plan
    refs: Refs
    operands: Refs
    place: Place
    size: int
    gate_bias: Float[Array, ""] | None

    @property
    def shape(self) -> tuple[int, int]:
        """Queries, keys."""
        return ROWS, self.size

    def dots(
        self, rows: str, columns: str, start: Float[Array, "64"] | None = None
    ) -> Float[Array, "64 n"]:
        """Products of two operands, added to a number of each query."""
        a, b = self.operands[rows], self.operands[columns].transpose((1, 0))
        if start is None:
            return instructions.products(a, b, self.shape)
        start = along_rows(start, self.shape)
        return instructions.products_into(start, a, b, emulated=self.plan.emulated)

    def allowed(self) -> Bool[Array, "64 n"]:
        """Which query sees which key."""
        plan, found = self.plan, []
        distance = self._row("query_positions") - self._column("key_positions")
        if plan.is_causal:
            found.append(distance >= 0)
        if plan.window is not None:
            left, right = plan.window
            found += [distance <= left, distance >= -right]
        if plan.segments:
            found.append(self._row("query_segments") == self._column("key_segments"))
        both = found[0]
        for one in found[1:]:
            both = both & one
        return both

    def per_query(self, name: str, *index: Array) -> Array:
        """A number for each query, of [B, N, (index), T]."""
        at = (self.place.batch, self.place.head, *index, pl.ds(self.place.query, ROWS))
        return instructions.load(self.refs[name].at[at], row_layout())

    def save(self, name: str, x: Array, *index: Array) -> None:
        """Writes what `per_query` reads."""
        at = (self.place.batch, self.place.head, *index, pl.ds(self.place.query, ROWS))
        store(self.refs[name].at[at], x, row_layout(), emulated=self.plan.emulated)

    def _row(self, name: str) -> Array:
        return along_rows(
            instructions.load(self._side(name, self.place.query, ROWS), row_layout()), self.shape
        )

    def _column(self, name: str) -> Array:
        layout = plgpu.Layout.WGMMA.reduce(0)
        columns = instructions.load(self._side(name, self.place.key, self.size), layout)
        return jax.lax.broadcast_in_dim(columns, self.shape, [1])

    def _side(self, name: str, start: Array, size: int):
        ref = self.refs[name]
        return ref.at[self.place.batch if ref.shape[0] > 1 else 0, pl.ds(start, size)]

    def gates(self, dots: Float[Array, "64 n"], allowed: Array | None) -> Float[Array, "64 n"]:
        """The gates, in units of `Contextual.gate_unit`, of products of queries and gate keys."""
        contextual = self.plan.contextual
        offset = math.log2(contextual.gate_unit)
        if self.gate_bias is not None:
            offset = offset - self.gate_bias
        exponent = dots * (-contextual.gate_scale * LOG2E) + offset
        denominator = contextual.gate_unit + jnp.exp2(exponent)
        paired, emulated = self.plan.blocks.paired, self.plan.emulated
        invert = paired_reciprocal if paired else instructions.reciprocal
        gates = invert(denominator, emulated=emulated)
        return gates if allowed is None else jnp.where(allowed, gates, 0.0)

    def places(
        self, gates: Float[Array, "64 n"], right: Float[Array, "64"]
    ) -> Float[Array, "64 n"]:
        """Counts less 1/2: sums of gates from the right on, beginning with `right`."""
        lower = self.operands["lower"]
        if self.size < lower.shape[0]:
            lower = lower.at[: self.size, : self.size]
        start = along_rows(right, self.shape)
        narrow = gates.astype(jnp.float16)
        return instructions.multiply_into(start, narrow, lower, emulated=self.plan.emulated)

    def left(self, places: Float[Array, "64 n"], start: int = 0) -> Float[Array, "64"]:
        """The place on the left of key `start`."""
        return instructions.column(places, start, emulated=self.plan.emulated)

    def logits(self, dots: Float[Array, "64 n"], values: Values | None) -> Float[Array, "64 n"]:
        """Products with all biases, in units of ln 2; `values` where there are counts."""
        factor = self.plan.scale * LOG2E
        if values is not None:
            dots, factor = dots * factor + values.bias, 1.0
        if not self.plan.relative:
            return dots if factor == 1.0 else dots * factor
        band, emulated = self.operands["bands"], self.plan.emulated
        return diagonals.add_band(band, dots, factor, emulated=emulated)

    def table_values(self, places: Float[Array, "64 n"]) -> Values:
        """Bias, slope and fraction; beyond the end of the table both are 0."""
        inside = jnp.minimum(places, self.plan.contextual.last)
        packed, emulated = self.plan.blocks.packed, self.plan.emulated
        tables = self.operands["tables"]
        return Values(*instructions.table_values(tables, inside, packed=packed, emulated=emulated))
