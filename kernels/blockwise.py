"""Attention in plain XLA with O(T) memory, for every backend and every described bias.

    output_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j      over the keys j that i may attend to

| loop                 | walks                                        | holds                                     |
|----------------------|----------------------------------------------|-------------------------------------------|
| blocks of queries    | 0, 1, ...                                    | an output block; dk and dv when backward  |
| blocks of keys: head | leftwards from the last visible one          | softmax, running state of the bias        |
| blocks of keys: tail | leftwards from where the bias has finished   | softmax                                   |

The backward pass recomputes: leftwards over the head for the running state at each block, then rightwards over all
blocks. `jax.vjp` of one tile gives every gradient; the cotangent of the running state, handed from tile to tile, is
the prefix sum that the gradients of gates need. Nothing is atomic: the same bits every time.
"""

import dataclasses
import functools
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from posjax.bias import Bias, Tile
from posjax.kernels.blocks import Blocks
from posjax.kernels.common import Softmax, dots, transposed_sum
from posjax.masks import Mask
from posjax.types import Array, Bool, Float, Int, Num, PyTree

__all__ = ["attention"]


def attention(
    query: Num[Array, "B T N H"],
    key: Num[Array, "B S K H"],
    value: Num[Array, "B S K H"],
    bias: Bias | None,
    mask: Mask,
    *,
    scale: float,
    blocks: Blocks,
) -> Num[Array, "B T N H"]:
    """Blockwise attention; a query that may attend to nothing gives 0."""
    length = query.shape[1]
    queries, keys = -length % blocks.query, -key.shape[1] % blocks.key
    if queries or keys:
        bias = None if bias is None else bias.pad(queries, keys)
        mask = mask.pad(queries, keys)
    query = _heads_first(query, queries)
    key, value = _heads_first(key, keys), _heads_first(value, keys)
    output = _attention(_Static(scale, blocks), query, key, value, *_split_bias(bias), mask)
    return jnp.swapaxes(output, 1, 2)[:, :length]


class _Static(NamedTuple):
    """What is known when the code is compiled."""

    scale: float
    blocks: Blocks


class _QueryBlock(NamedTuple):
    """A block of queries and the blocks of keys it can see: first, ..., last."""

    start: Int[Array, ""]
    query: Num[Array, "B N t H"]
    first: Int[Array, ""]
    last: Int[Array, ""]


class _Inputs(NamedTuple):
    """The differentiable inputs of one tile."""

    query: Num[Array, "B N t H"]
    key: Num[Array, "B K s H"]
    rows: PyTree
    bias: Bias | None
    carry: PyTree


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, query, key, value, bias, fixed, mask):
    return _attention_fwd(static, query, key, value, bias, fixed, mask)[0]


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The blocks of keys that one block of queries walks over.

    `bias` holds what gets gradients, `fixed` the integer fields of the same description.
    """

    static: _Static
    block: _QueryBlock
    key: Num[Array, "B K S H"]
    bias: Bias | None
    fixed: Bias | None
    mask: Mask
    rows: PyTree

    @classmethod
    def begin(cls, static: _Static, block: _QueryBlock, key: Array, bias, fixed, mask: Mask) -> Self:
        """The walk of one block of queries, with the bias's rows."""
        rows = _merge_bias(bias, fixed).rows(block.query) if bias is not None else None
        return cls(static, block, key, bias, fixed, mask, rows)

    @property
    def runs(self) -> bool:
        """Whether the bias has a running state."""
        return self.bias is not None and self.bias.runs

    def carry(self) -> PyTree:
        """The running state before the last visible block."""
        valid = self.mask.query.block(self.block.start, self.static.blocks.query).valid
        return _merge_bias(self.bias, self.fixed).start(self.block.query.shape[:3], valid)

    def going_on(self, index: Array, carry: PyTree) -> Array:
        """Whether block `index` is visible and belongs to the head."""
        return (index >= self.block.first) & ~_merge_bias(self.bias, self.fixed).finished(carry)

    def keys(self, x: Num[Array, "B K S H"], index: Array) -> Num[Array, "B K s H"]:
        """Block `index` of keys or values."""
        size = self.static.blocks.key
        return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=2)

    def where(self, index: Array) -> tuple:
        """Start and size of the queries and of the keys of block `index`."""
        return self.block.start, self.static.blocks.query, index * self.static.blocks.key, self.static.blocks.key

    def inputs(self, index: Array, carry: PyTree) -> _Inputs:
        """What block `index` depends on."""
        bias = None if self.bias is None else self.bias.block(*self.where(index))
        return _Inputs(self.block.query, self.keys(self.key, index), self.rows, bias, carry)

    def allowed(self, index: Array) -> Bool[Array, "#B #N t s"] | None:
        """The mask of block `index`; None where everything is visible everywhere."""
        return None if self.mask.is_trivial else self.mask.block(*self.where(index)).dense()

    def logits(self, index: Array, inputs: _Inputs) -> tuple[Float[Array, "B N t s"], PyTree]:
        """Scaled logits with the bias, and the running state for the block on the left."""
        product = dots(inputs.query, inputs.key)
        logits = self.static.scale * product
        if inputs.bias is None:
            return logits, None
        block = self.mask.block(*self.where(index))
        positions = block.query.positions, block.key.positions
        tile = Tile(inputs.query, product, block.dense(), *positions, self.static.scale)
        fixed = self.fixed.block(*self.where(index))
        bias, carry = _merge_bias(inputs.bias, fixed).tile(inputs.rows, tile, inputs.carry)
        return logits + bias, carry


# --- forward -----------------------------------------------------------------------------------------------------


def _attention_fwd(static: _Static, query, key, value, bias, fixed, mask):
    def one_block(block: _QueryBlock):
        walk = _Walk.begin(static, block, key, bias, fixed, mask)
        state, index = Softmax.start(block.query.shape), block.last
        if walk.runs:
            state, index = _forward_head(walk, value, state)
        output, lse = _forward_tail(walk, value, state, index).result()
        return output.astype(query.dtype), lse

    output, lse = jax.lax.map(one_block, _query_blocks(static, query, mask))
    output, lse = _join(output), _join(lse)
    return output, (query, key, value, bias, fixed, mask, output, lse)


def _forward_head(walk: _Walk, value: Array, state: Softmax) -> tuple[Softmax, Array]:
    """From the last visible block leftwards until the bias has finished; and the block to go on with."""

    def step(loop):
        index, state, carry = loop
        logits, carry = walk.logits(index, walk.inputs(index, carry))
        return index - 1, state.update(logits, walk.allowed(index), walk.keys(value, index)), carry

    loop = (walk.block.last, state, walk.carry())
    index, state, _ = jax.lax.while_loop(lambda loop: walk.going_on(loop[0], loop[2]), step, loop)
    return state, index


def _forward_tail(walk: _Walk, value: Array, state: Softmax, index: Array) -> Softmax:
    """The blocks from `index` leftwards, where the bias has no running state."""

    def step(loop):
        index, state = loop
        logits, _ = walk.logits(index, walk.inputs(index, None))
        return index - 1, state.update(logits, walk.allowed(index), walk.keys(value, index))

    return jax.lax.while_loop(lambda loop: loop[0] >= walk.block.first, step, (index, state))[1]


# --- backward ----------------------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """Gradients that all blocks of queries add to, in float32."""

    key: Float[Array, "B K S H"]
    value: Float[Array, "B K S H"]
    bias: Bias | None


class _Local(NamedTuple):
    """Gradients of one block of queries, in float32."""

    query: Float[Array, "B N t H"]
    rows: PyTree


class _Given(NamedTuple):
    """What the backward pass knows of one block of queries."""

    cotangent: Num[Array, "B N t H"]
    lse: Float[Array, "B N t"]
    delta: Float[Array, "B N t"]


def _attention_bwd(static: _Static, residuals, cotangent):
    query, key, value, bias, fixed, mask, output, lse = residuals
    delta = jnp.sum(cotangent.astype(jnp.float32) * output.astype(jnp.float32), axis=-1)
    given = _Given(*(_cut(x, static.blocks.query) for x in (cotangent, lse, delta)))

    def one_block(sums: _Sums, inputs):
        block, given = inputs
        walk = _Walk.begin(static, block, key, bias, fixed, mask)
        grads = sums, _Local(_zeros(block.query), _zeros(walk.rows))
        tail_end = block.last
        if walk.runs:
            carries, tail_end = _saved_carries(walk)
        grads = _backward_tail(walk, value, given, grads, tail_end)
        if walk.runs:
            grads = _backward_head(walk, value, given, grads, tail_end, carries)
        return _finish_rows(walk, *grads)

    sums = _Sums(_zeros(key), _zeros(value), _zeros(bias))
    sums, dquery = jax.lax.scan(one_block, sums, (_query_blocks(static, query, mask), given))
    grads = jax.tree.map(lambda x, d: d.astype(x.dtype), (query, key, value, bias), (_join(dquery), *sums))
    return *grads, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _saved_carries(walk: _Walk) -> tuple[PyTree, Array]:
    """The running state before each block of the head, by block, and the last block of the tail."""

    def step(loop):
        index, carry, saved = loop
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
        saved = jax.tree.map(put, saved, carry)
        return index - 1, walk.logits(index, walk.inputs(index, carry))[1], saved

    carry = walk.carry()
    blocks = walk.key.shape[2] // walk.static.blocks.key
    saved = jax.tree.map(lambda x: jnp.zeros((blocks, *x.shape), x.dtype), carry)
    loop = (walk.block.last, carry, saved)
    index, _, saved = jax.lax.while_loop(lambda loop: walk.going_on(loop[0], loop[1]), step, loop)
    return saved, index


def _backward_tail(walk: _Walk, value: Array, given: _Given, grads: tuple, end: Array) -> tuple:
    """Adds the gradients of blocks first, ..., end, where the bias has no running state."""

    def step(index, grads):
        return _backward_tile(walk, value, given, grads, index, None, None)[0]

    return jax.lax.fori_loop(walk.block.first, end + 1, step, grads)


def _backward_head(walk: _Walk, value: Array, given: _Given, grads: tuple, end: Array, carries: PyTree) -> tuple:
    """Adds the gradients of blocks end + 1, ..., last, rightwards, handing on the running state's cotangent."""

    def step(index, loop):
        grads, dcarry = loop
        carry = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), carries)
        return _backward_tile(walk, value, given, grads, index, carry, dcarry)

    first = jnp.maximum(end + 1, walk.block.first)
    return jax.lax.fori_loop(first, walk.block.last + 1, step, (grads, _zeros(walk.carry())))[0]


def _backward_tile(walk, value, given: _Given, grads: tuple, index, carry, dcarry) -> tuple[tuple, PyTree]:
    """Adds one tile's gradients; also the cotangent of the running state for the block on the right."""
    sums, local = grads
    value_block, allowed = walk.keys(value, index), walk.allowed(index)
    (logits, _), pull_back = jax.vjp(lambda x: walk.logits(index, x), walk.inputs(index, carry))
    weights = jnp.exp(logits - given.lse[..., None])
    weights = weights if allowed is None else jnp.where(allowed, weights, 0.0)
    dlogits = weights * (dots(given.cotangent, value_block) - given.delta[..., None])
    (d,) = pull_back((dlogits, dcarry))
    dvalue = transposed_sum(weights, given.cotangent, value.shape[1])
    query_start, _, key_start, _ = walk.where(index)
    bias = None if d.bias is None else sums.bias.add_block(_float32(d.bias), query_start, key_start)
    sums = _Sums(_add_keys(sums.key, d.key, key_start), _add_keys(sums.value, dvalue, key_start), bias)
    local = jax.tree.map(jnp.add, local, _Local(_float32(d.query), d.rows))
    return (sums, local), d.carry


def _finish_rows(walk: _Walk, sums: _Sums, local: _Local) -> tuple[_Sums, Array]:
    """Pulls the gradients of the bias's rows back to the queries and to the bias."""
    if walk.rows is None:
        return sums, local.query
    rows_of = lambda query, bias: _merge_bias(bias, walk.fixed).rows(query)  # noqa: E731
    dquery, dbias = jax.vjp(rows_of, walk.block.query, walk.bias)[1](local.rows)
    total = jax.tree.map(jnp.add, sums.bias, _float32(dbias))
    return sums._replace(bias=total), local.query + _float32(dquery)


# --- blocks and trees --------------------------------------------------------------------------------------------


def _query_blocks(static: _Static, query: Array, mask: Mask) -> _QueryBlock:
    """All blocks of queries, stacked along a leading axis."""
    first, last = mask.block_range(static.blocks.query, static.blocks.key)
    start = jnp.arange(first.shape[0], dtype=jnp.int32) * static.blocks.query
    return _QueryBlock(start, _cut(query, static.blocks.query), first, last)


def _cut(x: Num[Array, "B N T *H"], size: int) -> Num[Array, "blocks B N t *H"]:
    """Blocks of `size` along the length, stacked."""
    batch, heads, length, *rest = x.shape
    return jnp.moveaxis(x.reshape(batch, heads, length // size, size, *rest), 2, 0)


def _join(x: Num[Array, "blocks B N t *H"]) -> Num[Array, "B N T *H"]:
    """The inverse of `_cut`."""
    blocks, batch, heads, size, *rest = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(batch, heads, blocks * size, *rest)


def _heads_first(x: Num[Array, "B T N H"], padding: int) -> Num[Array, "B N padded H"]:
    """Heads before lengths, with zeros appended to the length."""
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))


def _add_keys(total: Float[Array, "B K S H"], part: Num[Array, "B K s H"], start: Array) -> Float[Array, "B K S H"]:
    """`total` with `part` added to the keys from `start` on."""
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part.astype(jnp.float32), start, axis=2)


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _split_bias(bias: Bias | None) -> tuple[Bias | None, Bias | None]:
    """The description with only its floating-point arrays, and with only the others."""

    def keep(floating: bool):
        return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) == floating else None, bias)

    return keep(True), keep(False)


def _merge_bias(floating: Bias, others: Bias) -> Bias:
    """The inverse of `_split_bias`."""
    return jax.tree.map(lambda f, o: o if f is None else f, floating, others, is_leaf=lambda x: x is None)
