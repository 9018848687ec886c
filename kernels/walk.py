"""The blocks of keys that a block of queries walks over, and the trees that go with them."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from posjax.biases.base import Bias, Tile
from posjax.dropout import Dropout
from posjax.kernels.blocks import Blocks
from posjax.kernels.common import capped, dots, weighted_sum, widened
from posjax.masks import Mask
from posjax.precision import wide_type
from posjax.types import Array, Bool, Float, Int, Num, PyTree
from posjax.varying import varying_axes, varying_over

__all__ = [
    "Arrays",
    "Fixed",
    "Inputs",
    "QueryBlock",
    "Static",
    "Walk",
    "cut",
    "join",
    "merge_bias",
    "query_blocks",
    "split_bias",
]


class Static(NamedTuple):
    """Everything that is known when the code is compiled; `scale` is None if it is not.

    `stops_early` is whether the walk of the head ends where the bias has finished. Under a
    `jax.vmap` over an Explicit axis of the mesh it cannot: all loops there are equally long.
    """

    scale: float | None
    soft_cap: float | None
    blocks: Blocks
    stops_early: bool = True


class Arrays(NamedTuple):
    """The arrays of a problem that receive gradients, heads first.

    `bias` is the description with only its floating-point arrays, `scale` an array or None.
    """

    query: Num[Array, "B N T H"]
    key: Num[Array, "B K S H"]
    value: Num[Array, "B K S E"]
    bias: Bias | None
    scale: Float[Array, ""] | None


class Fixed(NamedTuple):
    """The arrays of a problem without gradients; `bias` has those that `Arrays` has not."""

    bias: Bias | None
    mask: Mask
    dropout: Dropout | None


class QueryBlock(NamedTuple):
    """A block of queries and the blocks of keys it can see: first, ..., last."""

    start: Int[Array, ""]
    query: Num[Array, "B N t H"]
    first: Int[Array, ""]
    last: Int[Array, ""]


class Inputs(NamedTuple):
    """The differentiable inputs of one tile."""

    query: Num[Array, "B N t H"]
    key: Num[Array, "B K s H"]
    rows: PyTree
    bias: Bias | None
    scale: Float[Array, ""] | None
    carry: PyTree


@dataclasses.dataclass(frozen=True)
class Walk:
    """The blocks of keys that one block of queries walks over."""

    static: Static
    block: QueryBlock
    arrays: Arrays
    fixed: Fixed
    rows: PyTree
    varying: frozenset[str]  # axes of a caller's shard_map over which the arrays differ

    @classmethod
    def begin(cls, static: Static, block: QueryBlock, arrays: Arrays, fixed: Fixed) -> Self:
        """The walk of one block of queries, with the bias's rows."""
        rows = None
        if arrays.bias is not None:
            rows = merge_bias(arrays.bias, fixed.bias).rows(block.query)
        return cls(static, block, arrays, fixed, rows, varying_axes(block.query))

    @property
    def bias(self) -> Bias | None:
        """The description with its floating-point arrays."""
        return self.arrays.bias

    @property
    def mask(self) -> Mask:
        """Who sees whom."""
        return self.fixed.mask

    @property
    def has_state(self) -> bool:
        """Whether the bias has a running state."""
        return self.bias is not None and self.bias.has_state

    @property
    def uses_softmax(self) -> bool:
        """Whether the weights are a softmax."""
        return self.bias is None or self.bias.uses_softmax

    @property
    def zero_once_finished(self) -> bool:
        """Whether nothing on the left of the head has any weight."""
        return self.bias is not None and self.bias.zero_once_finished

    @property
    def has_values(self) -> bool:
        """Whether the bias adds to the weighted values."""
        return self.bias is not None and self.bias.has_values

    def carry(self) -> PyTree:
        """The running state before the last visible block."""
        valid = self.mask.query.block(self.block.start, self.static.blocks.query).valid
        carry = merge_bias(self.bias, self.fixed.bias).start(self.block.query.shape[:3], valid)
        dtype = wide_type(self.block.query.dtype)
        is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
        carry = jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, carry)
        return self.like_arrays(carry)

    def like_arrays(self, tree: PyTree) -> PyTree:
        """The tree, varying over the axes of a `shard_map` over which the arrays do."""
        return varying_over(self.varying, tree)

    def going_on(self, index: Array, carry: PyTree) -> Array:
        """Whether block `index` is visible and belongs to the head.

        Without `stops_early` the head is all.
        """
        is_visible = index >= self.block.first
        if not self.static.stops_early:
            return is_visible
        return is_visible & ~merge_bias(self.bias, self.fixed.bias).finished(carry)

    def keys(self, x: Num[Array, "B K S H"], index: Array) -> Num[Array, "B K s H"]:
        """Block `index` of keys or values."""
        size = self.static.blocks.key
        return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=2)

    def where(self, index: Array) -> tuple:
        """Start and size of the queries and of the keys of block `index`."""
        return (
            self.block.start,
            self.static.blocks.query,
            index * self.static.blocks.key,
            self.static.blocks.key,
        )

    def inputs(self, index: Array, carry: PyTree) -> Inputs:
        """The inputs of block `index`."""
        bias = None if self.bias is None else self.bias.block(*self.where(index))
        key = self.keys(self.arrays.key, index)
        return Inputs(self.block.query, key, self.rows, bias, self.arrays.scale, carry)

    def allowed(self, index: Array) -> Bool[Array, "#B #N t s"] | None:
        """The mask of block `index`; None where everything is visible everywhere."""
        return None if self.mask.is_trivial else self.mask.block(*self.where(index)).dense()

    def logits(self, index: Array, inputs: Inputs) -> tuple[Float[Array, "B N t s"], PyTree]:
        """Scaled logits with the bias, and the running state for the block on the left."""
        if inputs.bias is None:
            return self.scaled(inputs, dots(inputs.query, inputs.key)), None
        tile = self.tile(index, inputs)
        bias, carry = self.described(index, inputs).tile(inputs.rows, tile, inputs.carry)
        if inputs.carry is not None:
            carry = jax.tree.map(lambda new, old: new.astype(old.dtype), carry, inputs.carry)
        return self.scaled(inputs, tile.dots) + bias, carry

    def scaled(self, inputs: Inputs, product: Array) -> Float[Array, "B N t s"]:
        """Logits of products of query and key, without the bias."""
        return capped(self.scale(inputs) * product, self.static.soft_cap)

    def scale(self, inputs: Inputs) -> float | Array:
        """The factor of products, whether it is known or an input."""
        return inputs.scale if self.static.scale is None else self.static.scale

    def tile(self, index: Array, inputs: Inputs) -> Tile:
        """The inputs of the bias of block `index`."""
        block = self.mask.block(*self.where(index))
        positions = block.query.positions, block.key.positions
        product = dots(inputs.query, inputs.key)
        return Tile(inputs.query, product, block.dense(), *positions, self.scale(inputs))

    def described(self, index: Array, inputs: Inputs) -> Bias:
        """The whole description of block `index`."""
        return merge_bias(inputs.bias, self.fixed.bias.block(*self.where(index)))

    def kept(self, index: Array, weights: Float[Array, "B N t s"]) -> Float[Array, "B N t s"]:
        """The weights of block `index` after dropout; also of gradients of weights."""
        if self.fixed.dropout is None:
            return weights
        return weights * self.fixed.dropout.block(*self.where(index)).factors().astype(
            weights.dtype
        )

    def weigh(
        self, index: Array, inputs: Inputs, weights: Array, size: int
    ) -> Float[Array, "B N t E"]:
        """The addition of the bias to the weighted values of `size` channels."""
        added = self.described(index, inputs).weigh(inputs.rows, self.tile(index, inputs), weights)
        return widened(added, size)

    def weighted(self, index: Array, inputs: Inputs, value: Array) -> Callable[[Array], Array]:
        """The weighted sum of block `index` of `value`, as a function of the weights."""

        def weigh(weights: Array) -> Array:
            weights = self.kept(index, weights)
            total = weighted_sum(weights, self.keys(value, index))
            if not self.has_values:
                return total
            return total + self.weigh(index, inputs, weights, value.shape[3])

        return weigh


def query_blocks(static: Static, query: Array, mask: Mask) -> QueryBlock:
    """All blocks of queries, stacked along a leading axis."""
    first, last = mask.block_range(static.blocks.query, static.blocks.key)
    start = jnp.arange(first.shape[0], dtype=jnp.int32) * static.blocks.query
    start, first, last = varying_over(varying_axes(query), (start, first, last))
    return QueryBlock(start, cut(query, static.blocks.query), first, last)


def cut(x: Num[Array, "B N T *H"], size: int) -> Num[Array, "blocks B N t *H"]:
    """Blocks of `size` along the length, stacked."""
    batch, heads, length, *rest = x.shape
    return jnp.moveaxis(x.reshape(batch, heads, length // size, size, *rest), 2, 0)


def join(x: Num[Array, "blocks B N t *H"]) -> Num[Array, "B N T *H"]:
    """The inverse of `cut`."""
    blocks, batch, heads, size, *rest = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(batch, heads, blocks * size, *rest)


def split_bias(bias: Bias | None) -> tuple[Bias | None, Bias | None]:
    """The description with only its floating-point arrays, and with only the others."""

    def keep(floating: bool):
        return jax.tree.map(
            lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) == floating else None, bias
        )

    return keep(True), keep(False)


def merge_bias(floating: Bias, others: Bias) -> Bias:
    """The inverse of `split_bias`."""
    return jax.tree.map(
        lambda f, o: o if f is None else f, floating, others, is_leaf=lambda x: x is None
    )
