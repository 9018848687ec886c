"""A tile of 64 queries and some keys: mathematics of forward and backward kernels."""

import dataclasses
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.common import LOG2E
from posjax.kernels.gpu.arrays import Inputs
from posjax.kernels.gpu.diagonals import add_diagonals
from posjax.kernels.gpu.layout import per_row, row_layout
from posjax.kernels.gpu.look_ups import table_values
from posjax.kernels.gpu.plan import ROWS, Plan
from posjax.kernels.gpu.products import multiply, multiply_into, multiply_shared_into
from posjax.kernels.gpu.reciprocals import paired_reciprocal, reciprocal
from posjax.kernels.gpu.registers import column, load
from posjax.kernels.gpu.stores import store
from posjax.types import Array, Bool, Float, Int, Num

__all__ = [
    "Operands",
    "Origin",
    "TableValues",
    "Tile",
    "along_rows",
    "first_place",
    "gate_bias_of",
]


def along_rows(x: Num[Array, "m"], shape: tuple[int, int]) -> Num[Array, "m n"]:
    """A number for each row, in every column."""
    return jax.lax.broadcast_in_dim(x, shape, [0])


def gate_bias_of(inputs: Inputs, head: Array) -> Float[Array, ""] | None:
    """The bias of a head's gates, in units of ln 2."""
    return None if inputs.gate_bias is None else inputs.gate_bias[head]


class Origin(NamedTuple):
    """The beginning of a tile: row of the batch, query head, first query, first key."""

    batch: Int[Array, ""]
    head: Int[Array, ""]
    query: Int[Array, ""]
    key: Int[Array, ""]

    def of_tokens(self, ref: Any) -> Any:
        """The part of [B, T, N, ...] for 64 queries."""
        return ref.at[self.batch, pl.ds(self.query, ROWS), self.head]

    def of_heads(self, ref: Any, *index: Array) -> Any:
        """The part of [B, N, (index,) T, ...] for 64 queries."""
        return ref.at[(self.batch, self.head, *index, pl.ds(self.query, ROWS))]


class Operands(NamedTuple):
    """A tile's parts of shared memory; None: not for this kernel."""

    query: Num[Array, "64 H"]
    key: Num[Array, "n H"]
    value: Num[Array, "n H"]
    gate_key: Num[Array, "n H"] | None = None
    cotangent: Num[Array, "64 H"] | None = None
    tables: Float[Array, "64 words"] | None = None
    distance_bias: Float[Array, "64+n"] | None = None
    lower_triangle: Float[Array, "m m"] | None = None
    upper_triangle: Float[Array, "m m"] | None = None


class TableValues(NamedTuple):
    """Values of the table at the places of a tile.

    `fraction` is the place less that of the middle of its bin.
    """

    bias: Float[Array, "64 n"]
    slope: Float[Array, "64 n"]
    fraction: Float[Array, "64 n"]


def first_place(plan: Plan, row: Int[Array, ""]) -> Float[Array, "64"]:
    """A count of 0; queries of padding have nothing to count, so that no loop waits for them."""
    rows = row + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=row_layout())
    return jnp.where(rows < plan.queries, per_row(-0.5), per_row(plan.cope.last_place))


@dataclasses.dataclass(frozen=True)
class Tile:
    """64 queries and `size` keys."""

    plan: Plan
    inputs: Inputs
    operands: Operands
    origin: Origin
    size: int
    gate_bias: Float[Array, ""] | None

    @property
    def shape(self) -> tuple[int, int]:
        """Queries, keys."""
        return ROWS, self.size

    def dots(
        self, rows: Any, columns: Any, start: Float[Array, "64"] | None = None
    ) -> Float[Array, "64 n"]:
        """Products of two operands, added to a number of each query."""
        columns = columns.transpose((1, 0))
        if start is None:
            return multiply(rows, columns, self.shape)
        start = along_rows(start, self.shape)
        return multiply_shared_into(start, rows, columns, emulated=self.plan.emulated)

    def allowed(self) -> Bool[Array, "64 n"]:
        """Which query sees which key."""
        plan, inputs, rules = self.plan, self.inputs, []
        distance = self._of_queries(inputs.query_positions) - self._of_keys(inputs.key_positions)
        if plan.is_causal:
            rules.append(distance >= 0)
        if plan.window is not None:
            left, right = plan.window
            rules += [distance <= left, distance >= -right]
        if plan.segments:
            query, key = inputs.query_segments, inputs.key_segments
            rules.append(self._of_queries(query) == self._of_keys(key))
        return functools.reduce(operator.and_, rules)

    def _of_queries(self, side: Any) -> Int[Array, "64 n"]:
        """Positions or segments [#B, T] of the queries."""
        rows = side.at[self._batch(side), pl.ds(self.origin.query, ROWS)]
        return along_rows(load(rows, row_layout()), self.shape)

    def _of_keys(self, side: Any) -> Int[Array, "64 n"]:
        """Positions or segments [#B, S] of the keys."""
        columns = side.at[self._batch(side), pl.ds(self.origin.key, self.size)]
        columns = load(columns, plgpu.Layout.WGMMA.reduce(0))
        return jax.lax.broadcast_in_dim(columns, self.shape, [1])

    def _batch(self, side: Any) -> Array | int:
        return self.origin.batch if side.shape[0] > 1 else 0

    def per_query(self, ref: Any, *index: Array) -> Num[Array, "64"]:
        """A number for each query, of [B, N, (index,) T]."""
        return load(self.origin.of_heads(ref, *index), row_layout())

    def save(self, ref: Any, x: Num[Array, "64"], *index: Array) -> None:
        """Writes numbers that `per_query` reads."""
        target = self.origin.of_heads(ref, *index)
        store(target, x, row_layout(), emulated=self.plan.emulated)

    def gates(self, dots: Float[Array, "64 n"], allowed: Array | None) -> Float[Array, "64 n"]:
        """The gates, in units of `gate_quantum`, of products of queries and gate keys."""
        cope = self.plan.cope
        offset = math.log2(cope.gate_quantum)
        if self.gate_bias is not None:
            offset = offset - self.gate_bias
        exponent = dots * (-cope.gate_scale * LOG2E) + offset
        denominator = cope.gate_quantum + jnp.exp2(exponent)
        invert = paired_reciprocal if self.plan.blocks.paired else reciprocal
        gates = invert(denominator, emulated=self.plan.emulated)
        return gates if allowed is None else jnp.where(allowed, gates, 0.0)

    def places(
        self, gates: Float[Array, "64 n"], right: Float[Array, "64"]
    ) -> Float[Array, "64 n"]:
        """Counts less 1/2: sums of gates from the right on, beginning with `right`."""
        lower = self.operands.lower_triangle
        if self.size < lower.shape[0]:
            lower = lower.at[: self.size, : self.size]
        start = along_rows(right, self.shape)
        narrow = gates.astype(jnp.float16)
        return multiply_into(start, narrow, lower, emulated=self.plan.emulated)

    def left(self, places: Float[Array, "64 n"], start: int = 0) -> Float[Array, "64"]:
        """The place on the left of key `start`."""
        return column(places, start, emulated=self.plan.emulated)

    def logits(
        self, dots: Float[Array, "64 n"], values: TableValues | None
    ) -> Float[Array, "64 n"]:
        """Products with all biases, in units of ln 2; `values` if there are counts."""
        factor = self.plan.scale * LOG2E
        if values is not None:
            dots, factor = dots * factor + values.bias, 1.0
        if not self.plan.relative:
            return dots if factor == 1.0 else dots * factor
        bias, emulated = self.operands.distance_bias, self.plan.emulated
        return add_diagonals(bias, dots, factor, emulated=emulated)

    def table_values(self, places: Float[Array, "64 n"]) -> TableValues:
        """Bias, slope and fraction; beyond the end of the table bias and slope are 0."""
        inside = jnp.minimum(places, self.plan.cope.last_place)
        packed, emulated = self.plan.blocks.packed, self.plan.emulated
        tables = self.operands.tables
        return TableValues(*table_values(tables, inside, packed=packed, emulated=emulated))
