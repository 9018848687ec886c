"""Shapes and blocks of everything that goes into the kernels and comes out."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.kernels.blocks import tpu_vmem
from posjax.kernels.tpu.plan import LANES, Plan
from posjax.types import Array

__all__ = ["Indices", "Layout", "compiler_params"]


@dataclasses.dataclass(frozen=True)
class Indices:
    """What a place of the grid stands for, as functions of the grid's indices."""

    batch: Callable
    head: Callable
    query: Callable
    memory: Callable


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one call."""

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

    @classmethod
    def of(cls, plan: Plan, inputs: dict[str, Array]) -> "Layout":
        """The sizes of padded inputs."""
        query, key, value = (inputs[name] for name in ("query", "key", "value"))
        batch, heads, length, size = query.shape
        sizes = (batch, heads, key.shape[1], size, value.shape[3], length, key.shape[2])
        strips = inputs["strips"].shape[2:] if plan.relative else None
        return cls(plan, *sizes, strips, query.dtype)

    @property
    def groups(self) -> int:
        """G: query heads of each key/value head."""
        return self.heads // self.kv_heads

    @property
    def query_blocks(self) -> int:
        """Blocks of queries."""
        return self.query_length // self.plan.blocks.query

    @property
    def parts(self) -> int:
        """Parts of the keys that are in memory one after the other."""
        return -(-self.key_length // self.plan.blocks.memory)

    @property
    def part_blocks(self) -> int:
        """Blocks of keys in such a part."""
        return self.plan.blocks.memory // self.plan.blocks.key

    @property
    def key_blocks(self) -> int:
        """Blocks of keys, rounded up to whole registers of 8 rows."""
        return -(-self.key_length // self.plan.blocks.key // 8) * 8

    @property
    def carry_groups(self) -> int:
        """Registers side by side with one lane for each block of keys."""
        return -(-self.key_blocks // LANES)

    def input_specs(self, inputs: dict[str, Array], at: Indices) -> dict[str, pl.BlockSpec]:
        """One block specification for each input."""
        return {name: self._spec(name, x.shape, at) for name, x in inputs.items()}

    def _spec(self, name: str, whole: tuple[int, ...], at: Indices) -> pl.BlockSpec:
        rows, memory = self.plan.blocks.query, self.plan.blocks.memory
        own = lambda batch: (lambda *g: at.batch(*g)) if batch > 1 else (lambda *g: 0)  # noqa: E731
        kv_head = lambda *g: at.head(*g) // self.groups  # noqa: E731
        if name in ("query", "cotangent", "output", "rest"):
            shape, index = (None, None, rows, whole[3]), (at.batch, at.head, at.query, None)
        elif name in ("key", "value", "gate_key"):
            shape, index = (None, None, memory, whole[3]), (at.batch, kv_head, at.memory, None)
        elif name in ("lse", "delta"):
            shape, index = (None, None, 1, rows), (at.batch, at.head, None, at.query)
        elif name == "carries":
            shape, index = (None, None, whole[2], rows), (at.batch, at.head, None, at.query)
        elif name.startswith("query_"):
            shape, index = (None, 1, rows), (own(whole[0]), None, at.query)
        elif name.startswith("key_"):
            shape, index = (None, 1, memory), (own(whole[0]), None, at.memory)
        elif name == "strips":
            shape = (None, None, *whole[2:])
            index = own(whole[0]), at.head if whole[1] > 1 else None, None, None
        elif name in ("table", "gate_bias"):
            head = at.head if whole[0] > 1 else None
            shape, index = (None, *whole[1:]), (head, None, None)
        else:
            shape, index = whole, (None,) * len(whole)
        return pl.BlockSpec(shape, _index_map(index))

    def outputs(self, at: Indices) -> dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]:
        """What the forward kernel gives."""
        lead, length = (self.batch, self.heads), self.query_length
        shapes = {
            "output": jax.ShapeDtypeStruct((*lead, length, self.value_size), self.dtype),
            "lse": jax.ShapeDtypeStruct((*lead, 1, length), jnp.float32),
        }
        if self.plan.contextual is not None and self.dtype != jnp.float32:
            shapes["rest"] = shapes["output"]
        if self.plan.contextual is not None:
            carries = (*lead, self.key_blocks, length)
            shapes["carries"] = jax.ShapeDtypeStruct(carries, jnp.float32)
        return {name: (shape, self._spec(name, shape.shape, at)) for name, shape in shapes.items()}

    def gradients(self, at: Indices) -> dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]:
        """What the backward kernel gives, in float32; lengths last for keys and values.

        The query's gradient stays outside the blocks: the kernel fetches it for every part of the
        keys.
        """
        plan, memory = self.plan, self.plan.blocks.memory
        query = (self.batch, self.heads, self.query_length, self.size)
        outside = pl.BlockSpec(memory_space=pl.ANY)
        found = {"query": (jax.ShapeDtypeStruct(query, jnp.float32), outside)}

        def add(name: str, shape: tuple, block: tuple, *index) -> None:
            found[name] = (
                jax.ShapeDtypeStruct(shape, jnp.float32),
                pl.BlockSpec(block, _index_map(index)),
            )

        kv_head = lambda *g: at.head(*g) // self.groups  # noqa: E731
        sizes = {"key": self.size, "value": self.value_size}
        if plan.contextual is not None and plan.contextual.own_gate_key:
            sizes["gate_key"] = self.size
        for name, size in sizes.items():
            shape = (self.batch, self.kv_heads, size, self.key_length)
            add(name, shape, (None, None, size, memory), at.batch, kv_head, None, at.memory)
        heads = {"strips": self.strips} if plan.relative else {}
        if plan.contextual is not None:
            heads |= {"table": (plan.pieces * LANES, self.size)}
            heads |= {"gate_bias": (1, LANES)} if plan.contextual.gate_bias else {}
        for name, last in heads.items():
            shape, block = (self.batch, self.heads, *last), (None, self.groups, *last)
            add(name, shape, block, at.batch, kv_head, None, None)
        return found

    def cost(self, products: int) -> pl.CostEstimate:
        """`products` matrix products of all pairs, halved where attention is causal."""
        pairs = self.batch * self.heads * self.query_length * self.key_length
        pairs //= 2 if self.plan.is_causal else 1
        width = jnp.dtype(self.dtype).itemsize
        rows = self.batch * (self.heads * self.query_length + self.kv_heads * self.key_length)
        exponentials = 2 if self.plan.contextual is not None else 1
        return pl.CostEstimate(
            flops=products * pairs * (self.size + self.value_size),
            transcendentals=exponentials * pairs,
            bytes_accessed=rows * (self.size + self.value_size) * width,
        )


def _index_map(index: tuple) -> Callable:
    return lambda *grid: tuple(0 if i is None else i(*grid) for i in index)


def compiler_params(*semantics: str) -> pltpu.CompilerParams:
    """Which axes of the grid may be split over cores, and the memory to use."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=tpu_vmem())
