"""Attention in plain XLA with O(T) memory, for every backend and every described bias.

    output_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j        over the keys j that i sees

| loop                 | walks                                      | holds                      |
|----------------------|--------------------------------------------|----------------------------|
| blocks of queries    | 0, 1, ...                                  | output block, or dk and dv |
| blocks of keys: head | leftwards from the last visible one        | softmax, state of the bias |
| blocks of keys: tail | leftwards from where the bias has finished | softmax                    |

The backward pass recomputes: leftwards over the head for the running state at each block, then
rightwards over all blocks. `jax.vjp` of one tile gives every gradient; the cotangent of the running
state, handed from tile to tile, is the prefix sum that the gradients of gates need. Nothing is
atomic: the same bits every time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from posjax.biases.base import Bias
from posjax.kernels import blocks as sizes
from posjax.kernels.blocks import Blocks
from posjax.kernels.common import Softmax, dots, transposed_sum
from posjax.kernels.walk import (
    QueryBlock,
    Static,
    Walk,
    cut,
    join,
    merge_bias,
    query_blocks,
    split_bias,
)
from posjax.problem import Problem
from posjax.types import Array, Float, Num, PyTree

__all__ = ["refuses", "run"]


def refuses(problem: Problem) -> str | None:
    """The reason why there is no blockwise form; None if there is one."""
    return None if problem.bias is None else problem.bias.only_dense


def run(problem: Problem, blocks: Blocks | None = None) -> Num[Array, "B T N E"]:
    """Blockwise attention; a query that may attend to nothing gives 0.

    Args:
        blocks: None: those of `kernels.blocks`.
    """
    query, key, value = problem.query, problem.key, problem.value
    bias, mask = problem.bias, problem.mask
    if blocks is None:
        blocks = sizes.blockwise_sizes(query.shape[1], key.shape[1])
    length = query.shape[1]
    queries, keys = -length % blocks.query, -key.shape[1] % blocks.key
    if queries or keys:
        bias = None if bias is None else bias.pad(queries, keys)
        mask = mask.pad(queries, keys)
    query = _heads_first(query, queries)
    key, value = _heads_first(key, keys), _heads_first(value, keys)
    output = _attention(Static(problem.scale, blocks), query, key, value, *split_bias(bias), mask)
    return jnp.swapaxes(output, 1, 2)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, query, key, value, bias, fixed, mask):
    return _attention_fwd(static, query, key, value, bias, fixed, mask)[0]


def _attention_fwd(static: Static, query, key, value, bias, fixed, mask):
    def one_block(block: QueryBlock):
        walk = Walk.begin(static, block, key, bias, fixed, mask)
        state = Softmax.start((*block.query.shape[:3], value.shape[3]))
        index = block.last
        if walk.has_state:
            state, index = _forward_head(walk, value, state)
        if not walk.zero_once_finished:
            state = _forward_tail(walk, value, state, index)
        return state.result(walk.uses_softmax)

    output, lse = jax.lax.map(one_block, query_blocks(static, query, mask))
    output, lse = join(output), join(lse)
    # The residual stays float32: a rounded output would tilt the gradients of a whole row.
    return output.astype(query.dtype), (query, key, value, bias, fixed, mask, output, lse)


def _forward_head(walk: Walk, value: Array, state: Softmax) -> tuple[Softmax, Array]:
    """Leftwards until the bias has finished; also the block to go on with."""

    def step(loop):
        index, state, carry = loop
        inputs = walk.inputs(index, carry)
        logits, carry = walk.logits(index, inputs)
        weigh = walk.weighted(index, inputs, value)
        return index - 1, state.update(logits, walk.allowed(index), weigh), carry

    loop = (walk.block.last, state, walk.carry())
    index, state, _ = jax.lax.while_loop(lambda loop: walk.going_on(loop[0], loop[2]), step, loop)
    return state, index


def _forward_tail(walk: Walk, value: Array, state: Softmax, index: Array) -> Softmax:
    """The blocks from `index` leftwards, where the bias has no running state."""

    def step(loop):
        index, state = loop
        inputs = walk.inputs(index, None)
        logits, _ = walk.logits(index, inputs)
        weigh = walk.weighted(index, inputs, value)
        return index - 1, state.update(logits, walk.allowed(index), weigh)

    return jax.lax.while_loop(lambda loop: loop[0] >= walk.block.first, step, (index, state))[1]


class _Sums(NamedTuple):
    """Gradients that all blocks of queries add to, in float32."""

    key: Float[Array, "B K S H"]
    value: Float[Array, "B K S E"]
    bias: Bias | None


class _Local(NamedTuple):
    """Gradients of one block of queries, in float32."""

    query: Float[Array, "B N t H"]
    rows: PyTree


class _Given(NamedTuple):
    """The arrays that the backward pass has of one block of queries."""

    cotangent: Num[Array, "B N t E"]
    lse: Float[Array, "B N t"]
    delta: Float[Array, "B N t"]


def _attention_bwd(static: Static, residuals, cotangent):
    query, key, value, bias, fixed, mask, output, lse = residuals
    delta = jnp.sum(cotangent.astype(jnp.float32) * output, axis=-1)
    if bias is not None and not bias.uses_softmax:
        delta = jnp.zeros_like(delta)  # weights do not compete: no weight lowers another one
    given = _Given(*(cut(x, static.blocks.query) for x in (cotangent, lse, delta)))

    def one_block(sums: _Sums, inputs):
        block, given = inputs
        walk = Walk.begin(static, block, key, bias, fixed, mask)
        grads = sums, _Local(_zeros(block.query), _zeros(walk.rows))
        tail_end = block.last
        if walk.has_state:
            carries, tail_end = _saved_carries(walk)
        if not walk.zero_once_finished:
            grads = _backward_tail(walk, value, given, grads, tail_end)
        if walk.has_state:
            grads = _backward_head(walk, value, given, grads, tail_end, carries)
        return _finish_rows(walk, *grads)

    sums = _Sums(_zeros(key), _zeros(value), _zeros(bias))
    sums, dquery = jax.lax.scan(one_block, sums, (query_blocks(static, query, mask), given))
    grads = jax.tree.map(
        lambda x, d: d.astype(x.dtype), (query, key, value, bias), (join(dquery), *sums)
    )
    return *grads, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _saved_carries(walk: Walk) -> tuple[PyTree, Array]:
    """The running state before each block of the head, by block, and the last block of the tail."""

    def step(loop):
        index, carry, saved = loop
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
        saved = jax.tree.map(put, saved, carry)
        return index - 1, walk.logits(index, walk.inputs(index, carry))[1], saved

    carry = walk.carry()
    blocks = walk.key.shape[2] // walk.static.blocks.key
    if blocks == 1:  # The running state before the only block is known.
        return jax.tree.map(lambda x: x[None], carry), walk.block.first - 1
    saved = jax.tree.map(lambda x: jnp.zeros((blocks, *x.shape), x.dtype), carry)
    loop = (walk.block.last, carry, saved)
    index, _, saved = jax.lax.while_loop(lambda loop: walk.going_on(loop[0], loop[1]), step, loop)
    return saved, index


def _backward_tail(walk: Walk, value: Array, given: _Given, grads: tuple, end: Array) -> tuple:
    """Adds the gradients of blocks first, ..., end, where the bias has no running state."""

    def step(index, grads):
        return _backward_tile(walk, value, given, grads, index, None, None)[0]

    return jax.lax.fori_loop(walk.block.first, end + 1, step, grads)


def _backward_head(
    walk: Walk, value: Array, given: _Given, grads: tuple, end: Array, carries: PyTree
) -> tuple:
    """Adds the gradients of blocks end + 1, ..., last; hands the state's cotangent rightwards."""

    def step(index, loop):
        grads, dcarry = loop
        carry = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), carries
        )
        return _backward_tile(walk, value, given, grads, index, carry, dcarry)

    first = jnp.maximum(end + 1, walk.block.first)
    return jax.lax.fori_loop(first, walk.block.last + 1, step, (grads, _zeros(walk.carry())))[0]


def _backward_tile(
    walk, value, given: _Given, grads: tuple, index, carry, dcarry
) -> tuple[tuple, PyTree]:
    """Adds one tile's gradients; also the running state's cotangent for the next on the right."""
    sums, local = grads
    value_block, allowed = walk.keys(value, index), walk.allowed(index)
    inputs = walk.inputs(index, carry)
    (logits, _), pull_back = jax.vjp(lambda x: walk.logits(index, x), inputs)
    weights = jnp.exp(logits - given.lse[..., None])
    weights = weights if allowed is None else jnp.where(allowed, weights, 0.0)
    dweights = dots(given.cotangent, value_block)
    if walk.has_values:
        weigh = lambda x, weights: walk.weigh(index, x, weights, value.shape[3])  # noqa: E731
        of_values, more = jax.vjp(weigh, inputs, weights)[1](given.cotangent.astype(jnp.float32))
        dweights += more
    (d,) = pull_back((weights * (dweights - given.delta[..., None]), dcarry))
    if walk.has_values:
        d = jax.tree.map(jnp.add, d, of_values)
    dvalue = transposed_sum(weights, given.cotangent, value.shape[1])
    query_start, _, key_start, _ = walk.where(index)
    bias = None if d.bias is None else sums.bias.add_block(_float32(d.bias), query_start, key_start)
    sums = _Sums(
        _add_keys(sums.key, d.key, key_start), _add_keys(sums.value, dvalue, key_start), bias
    )
    local = jax.tree.map(jnp.add, local, _Local(_float32(d.query), d.rows))
    return (sums, local), d.carry


def _finish_rows(walk: Walk, sums: _Sums, local: _Local) -> tuple[_Sums, Array]:
    """Pulls the gradients of the bias's rows back to the queries and to the bias."""
    if walk.rows is None:
        return sums, local.query
    rows_of = lambda query, bias: merge_bias(bias, walk.fixed).rows(query)  # noqa: E731
    dquery, dbias = jax.vjp(rows_of, walk.block.query, walk.bias)[1](local.rows)
    total = jax.tree.map(jnp.add, sums.bias, _float32(dbias))
    return sums._replace(bias=total), local.query + _float32(dquery)


def _heads_first(x: Num[Array, "B T N H"], padding: int) -> Num[Array, "B N padded H"]:
    """Heads before lengths, with zeros appended to the length."""
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))


def _add_keys(
    total: Float[Array, "B K S H"], part: Num[Array, "B K s H"], start: Array
) -> Float[Array, "B K S H"]:
    """`total` with `part` added to the keys from `start` on."""
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part.astype(jnp.float32), start, axis=2)


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
