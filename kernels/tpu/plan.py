"""Static settings of the kernels, and shapes and blocks of the arrays that they read and write."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.kernels.blocks import tpu_vmem
from posjax.kernels.host import CopeSettings, Settings
from posjax.kernels.tpu.arrays import Gradients, Inputs, Outputs, Residuals
from posjax.types import Array, Shaped

__all__ = ["LANES", "CopePlan", "GridIndices", "Layout", "Plan", "compiler_params", "interleave"]

# Lanes of a vector register.
LANES = 128


@dataclasses.dataclass(frozen=True)
class CopePlan(CopeSettings):
    """The static part of a contextual bias.

    Args:
        packed: the form of the tables, see `tables`.
        newton: the form of the gates, see `counting.gate`.
    """

    packed: bool
    newton: bool

    @property
    def last(self) -> float:
        """The count from which on the bias is 0."""
        return float(self.positions - 1)


class Plan(Settings):
    """Everything static about one call."""

    @property
    def row_groups(self) -> list[slice]:
        """Some queries at a time, so that what is computed for them stays in registers."""
        return self._groups(self.blocks.rows or self.blocks.query)

    @property
    def lane_groups(self) -> list[slice]:
        """Likewise for arrays in which 8 queries have one register, not one for each chunk."""
        return self._groups(self.blocks.lane_rows or self.blocks.query)

    def _groups(self, size: int) -> list[slice]:
        return [slice(start, start + size) for start in range(0, self.blocks.query, size)]

    @property
    def chunks(self) -> int:
        """C: vector registers side by side in a block of keys."""
        return self.blocks.key // LANES

    @property
    def pieces(self) -> int:
        """Vector registers side by side that hold a query's table: at least P + C entries."""
        return -(-(self.cope.positions + self.chunks) // LANES)


def interleave(x: Array, axis: int, plan: Plan) -> Array:
    """Keys in the kernels' order: in a block, lane l of chunk c holds key l * C + c.

    Neighbours in the sequence then lie in the same lane of different registers, and a running sum
    over them is an addition of registers. Attention does not mind the order of keys.

    >>> from posjax.kernels.blocks import TpuBlocks
    >>> plan = Plan(1.0, TpuBlocks(128, 256), 1, True, None, False, None)
    >>> interleave(jnp.arange(256), 0, plan)[jnp.array([0, 1, 128, 129])].tolist()
    [0, 2, 1, 3]
    """
    axis %= x.ndim
    shape = x.shape
    split = (*shape[:axis], -1, LANES, plan.chunks, *shape[axis + 1 :])
    return jnp.swapaxes(x.reshape(split), axis + 1, axis + 2).reshape(shape)


@dataclasses.dataclass(frozen=True)
class GridIndices:
    """Indices of batch, query head and blocks, as functions of a place of the grid."""

    batch: Callable
    head: Callable
    query: Callable
    memory: Callable


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one call.

    Args:
        groups: G, query heads of each key/value head.
        query_blocks: blocks of queries.
        parts: parts of the keys that are in memory one after the other.
        part_blocks: blocks of keys in such a part.
    """

    plan: Plan
    batch: int
    heads: int
    kv_heads: int
    size: int
    value_size: int
    query_length: int
    key_length: int
    strips: tuple[int, int] | None
    dtype: jnp.dtype
    groups: int
    query_blocks: int
    parts: int
    part_blocks: int

    @classmethod
    def of(cls, plan: Plan, inputs: Inputs) -> "Layout":
        """The sizes of padded inputs."""
        batch, heads, length, size = inputs.query.shape
        _, kv_heads, key_length, value_size = inputs.value.shape
        strips = inputs.strips.shape[2:] if plan.relative else None
        sizes = (batch, heads, kv_heads, size, value_size, length, key_length)
        blocks = plan.blocks
        return cls(
            plan,
            *sizes,
            strips,
            inputs.query.dtype,
            groups=heads // kv_heads,
            query_blocks=length // blocks.query,
            parts=-(-key_length // blocks.memory),
            part_blocks=blocks.memory // blocks.key,
        )

    @property
    def key_blocks(self) -> int:
        """Blocks of keys, rounded up to whole registers of 8 rows."""
        return -(-self.key_length // self.plan.blocks.key // 8) * 8

    @property
    def carry_groups(self) -> int:
        """Registers side by side with one lane for each block of keys."""
        return -(-self.key_blocks // LANES)

    def _spec(self, at: GridIndices, axes: str, array: Shaped | None) -> pl.BlockSpec | None:
        """The block of an array at a place of the grid.

        Args:
            axes: letters of `posjax.types`, in which KG are the query heads of one key/value head,
                and # marks an axis that may have size 1. Others are in the block as a whole.
        """
        if array is None:
            return None
        kv_head = lambda *grid: at.head(*grid) // self.groups  # noqa: E731
        known = {
            "B": (None, at.batch),
            "N": (None, at.head),
            "K": (None, kv_head),
            "KG": (self.groups, kv_head),
            "T": (self.plan.blocks.query, at.query),
            "S": (self.plan.blocks.memory, at.memory),
        }
        shape, indices = [], []
        for axis, size in zip(axes.split(), array.shape, strict=True):
            block, index = known.get(axis.lstrip("#"), (size, None))
            shape.append(block)
            indices.append(None if size == 1 and axis.startswith("#") else index)
        return pl.BlockSpec(
            tuple(shape), lambda *grid: tuple(0 if i is None else i(*grid) for i in indices)
        )

    def input_specs(self, inputs: Inputs, at: GridIndices) -> Inputs:
        """The block of each input."""
        spec = functools.partial(self._spec, at)
        return Inputs(
            query=spec("B N T H", inputs.query),
            key=spec("B K S H", inputs.key),
            value=spec("B K S E", inputs.value),
            gate_key=spec("B K S H", inputs.gate_key),
            table=spec("#N width H", inputs.table),
            gate_bias=spec("#N 1 lanes", inputs.gate_bias),
            strips=spec("#B #N C x", inputs.strips),
            query_positions=spec("#B 1 T", inputs.query_positions),
            key_positions=spec("#B 1 S", inputs.key_positions),
            query_segments=spec("#B 1 T", inputs.query_segments),
            key_segments=spec("#B 1 S", inputs.key_segments),
            lower_triangle=spec("lanes lanes", inputs.lower_triangle),
        )

    def residual_specs(self, residuals: Residuals, at: GridIndices) -> Residuals:
        """The block of each residual."""
        spec = functools.partial(self._spec, at)
        return Residuals(
            cotangent=spec("B N T E", residuals.cotangent),
            lse=spec("B N 1 T", residuals.lse),
            delta=spec("B N 1 T", residuals.delta),
            carries=spec("B N key_blocks T", residuals.carries),
            upper_triangle=spec("lanes lanes", residuals.upper_triangle),
        )

    def outputs(self) -> Outputs:
        """Shapes and dtypes of the outputs."""
        lead, length = (self.batch, self.heads), self.query_length
        output = jax.ShapeDtypeStruct((*lead, length, self.value_size), self.dtype)
        lse = jax.ShapeDtypeStruct((*lead, 1, length), jnp.float32)
        if self.plan.cope is None:
            return Outputs(output, lse)
        rounds = self.dtype != jnp.float32
        carries = jax.ShapeDtypeStruct((*lead, self.key_blocks, length), jnp.float32)
        return Outputs(output, lse, output if rounds else None, carries)

    def output_specs(self, outputs: Outputs, at: GridIndices) -> Outputs:
        """The block of each output."""
        spec = functools.partial(self._spec, at)
        return Outputs(
            output=spec("B N T E", outputs.output),
            lse=spec("B N 1 T", outputs.lse),
            output_residual=spec("B N T E", outputs.output_residual),
            carries=spec("B N key_blocks T", outputs.carries),
        )

    def gradients(self) -> Gradients:
        """Shapes and dtypes of the gradients."""
        plan, cope = self.plan, self.plan.cope

        def shape(heads: int, *last: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.batch, heads, *last), jnp.float32)

        key = shape(self.kv_heads, self.size, self.key_length)
        return Gradients(
            query=shape(self.heads, self.query_length, self.size),
            key=key,
            value=shape(self.kv_heads, self.value_size, self.key_length),
            gate_key=key if cope and cope.own_gate_key else None,
            table=shape(self.heads, plan.pieces * LANES, self.size) if cope else None,
            gate_bias=shape(self.heads, 1, LANES) if cope and cope.has_gate_bias else None,
            strips=shape(self.heads, *self.strips) if plan.relative else None,
        )

    def gradient_specs(self, gradients: Gradients, at: GridIndices) -> Gradients:
        """The block of each gradient.

        The query's has none: the kernel fetches what it needs for every part of the keys.
        """
        spec = functools.partial(self._spec, at)
        return Gradients(
            query=pl.BlockSpec(memory_space=pl.ANY),
            key=spec("B K H S", gradients.key),
            value=spec("B K E S", gradients.value),
            gate_key=spec("B K H S", gradients.gate_key),
            table=spec("B KG width H", gradients.table),
            gate_bias=spec("B KG 1 lanes", gradients.gate_bias),
            strips=spec("B KG C x", gradients.strips),
        )

    def cost(self, products: int) -> pl.CostEstimate:
        """`products` matrix products of all pairs, halved if attention is causal."""
        pairs = self.batch * self.heads * self.query_length * self.key_length
        pairs //= 2 if self.plan.is_causal else 1
        width = jnp.dtype(self.dtype).itemsize
        rows = self.batch * (self.heads * self.query_length + self.kv_heads * self.key_length)
        exponentials = 2 if self.plan.cope is not None else 1
        return pl.CostEstimate(
            flops=products * pairs * (self.size + self.value_size),
            transcendentals=exponentials * pairs,
            bytes_accessed=rows * (self.size + self.value_size) * width,
        )


def compiler_params(*semantics: str) -> pltpu.CompilerParams:
    """The compiler's settings: which axes of the grid it may split over cores, and the memory."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=tpu_vmem())
