"""The blocks of keys that a block of queries walks over, and the trees that go with them."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from posjax.biases.base import Bias, Tile
from posjax.kernels.blocks import Blocks
from posjax.kernels.common import dots, weighted_sum, widened
from posjax.masks import Mask
from posjax.types import Array, Bool, Float, Int, Num, PyTree

__all__ = [
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
    """Everything that is known when the code is compiled."""

    scale: float
    blocks: Blocks


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
    carry: PyTree


@dataclasses.dataclass(frozen=True)
class Walk:
    """The blocks of keys that one block of queries walks over.

    `bias` holds what gets gradients, `fixed` the integer fields of the same description.
    """

    static: Static
    block: QueryBlock
    key: Num[Array, "B K S H"]
    bias: Bias | None
    fixed: Bias | None
    mask: Mask
    rows: PyTree

    @classmethod
    def begin(cls, static: Static, block: QueryBlock, key: Array, bias, fixed, mask: Mask) -> Self:
        """The walk of one block of queries, with the bias's rows."""
        rows = merge_bias(bias, fixed).rows(block.query) if bias is not None else None
        return cls(static, block, key, bias, fixed, mask, rows)

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
        return merge_bias(self.bias, self.fixed).start(self.block.query.shape[:3], valid)

    def going_on(self, index: Array, carry: PyTree) -> Array:
        """Whether block `index` is visible and belongs to the head."""
        return (index >= self.block.first) & ~merge_bias(self.bias, self.fixed).finished(carry)

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
        return Inputs(self.block.query, self.keys(self.key, index), self.rows, bias, carry)

    def allowed(self, index: Array) -> Bool[Array, "#B #N t s"] | None:
        """The mask of block `index`; None where everything is visible everywhere."""
        return None if self.mask.is_trivial else self.mask.block(*self.where(index)).dense()

    def logits(self, index: Array, inputs: Inputs) -> tuple[Float[Array, "B N t s"], PyTree]:
        """Scaled logits with the bias, and the running state for the block on the left."""
        if inputs.bias is None:
            return self.static.scale * dots(inputs.query, inputs.key), None
        tile = self.tile(index, inputs)
        bias, carry = self.described(index, inputs).tile(inputs.rows, tile, inputs.carry)
        return self.static.scale * tile.dots + bias, carry

    def tile(self, index: Array, inputs: Inputs) -> Tile:
        """The inputs of the bias of block `index`."""
        block = self.mask.block(*self.where(index))
        positions = block.query.positions, block.key.positions
        product = dots(inputs.query, inputs.key)
        return Tile(inputs.query, product, block.dense(), *positions, self.static.scale)

    def described(self, index: Array, inputs: Inputs) -> Bias:
        """The whole description of block `index`."""
        return merge_bias(inputs.bias, self.fixed.block(*self.where(index)))

    def weigh(
        self, index: Array, inputs: Inputs, weights: Array, size: int
    ) -> Float[Array, "B N t E"]:
        """The addition of the bias to the weighted values of `size` channels."""
        added = self.described(index, inputs).weigh(inputs.rows, self.tile(index, inputs), weights)
        return widened(added, size)

    def weighted(self, index: Array, inputs: Inputs, value: Array) -> Callable[[Array], Array]:
        """The weighted sum of block `index` of `value`, as a function of the weights."""

        def weigh(weights: Array) -> Array:
            total = weighted_sum(weights, self.keys(value, index))
            if not self.has_values:
                return total
            return total + self.weigh(index, inputs, weights, value.shape[3])

        return weigh


def query_blocks(static: Static, query: Array, mask: Mask) -> QueryBlock:
    """All blocks of queries, stacked along a leading axis."""
    first, last = mask.block_range(static.blocks.query, static.blocks.key)
    start = jnp.arange(first.shape[0], dtype=jnp.int32) * static.blocks.query
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
