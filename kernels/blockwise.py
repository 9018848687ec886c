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
from posjax.kernels.common import Attended, Softmax, dots, transposed_sum
from posjax.kernels.derivatives import resolved, with_gradients
from posjax.kernels.walk import (
    Arrays,
    Fixed,
    Inputs,
    QueryBlock,
    Static,
    Walk,
    cut,
    join,
    merge_bias,
    query_blocks,
    split_bias,
)
from posjax.precision import wide, wide_type
from posjax.problem import Problem
from posjax.types import Array, Float, Length, Num, PyTree
from posjax.varying import alike, is_mapped_over_mesh, varying_axes, varying_over

__all__ = ["refuses", "run"]


def refuses(problem: Problem) -> str | None:
    """The reason why there is no blockwise form; None if there is one."""
    if problem.returns_weights:
        return "blockwise attention has no weights to give to a module"
    return None if problem.bias is None else problem.bias.only_dense


def run(problem: Problem, blocks: Blocks | None = None) -> Attended:
    """Blockwise attention; a query that may attend to nothing gives 0.

    Inside a `jax.shard_map` of the caller, the result varies over every axis over which some input
    does. float64 inputs are computed in float64.

    Args:
        blocks: None: those of `kernels.blocks`.
    """
    problem = alike(problem)
    query, key = problem.query, problem.key
    if blocks is None:
        blocks = sizes.blockwise_sizes(query.shape[1], key.shape[1])
    queries, keys = _padding(query.shape[1], blocks.query), _padding(key.shape[1], blocks.key)
    result = _attention(*_arguments(problem, blocks, queries, keys))
    output, log_sum_exp = (jnp.swapaxes(x, 1, 2)[:, : query.shape[1]] for x in result)
    return Attended(output, log_sum_exp)


def _padding(length: Length, size: int) -> Length:
    """Up to whole blocks; written so that JAX can divide symbolic lengths by the size."""
    return _blocks(length, size) * size - length


def _blocks(length: Length, size: int) -> Length:
    return (length + size - 1) // size


def _arguments(
    problem: Problem, blocks: Blocks, queries: Length, keys: Length
) -> tuple[Static, Arrays, Fixed]:
    """Those of `_attention`: padded to whole blocks, heads before lengths."""
    bias, mask, dropout, scale = problem.bias, problem.mask, problem.dropout, problem.scale
    if not (isinstance(queries, int) and isinstance(keys, int) and queries == keys == 0):
        bias, mask, dropout = (
            None if x is None else x.pad(queries, keys) for x in (bias, mask, dropout)
        )
    floating, others = split_bias(bias)
    is_known = isinstance(scale, float)
    arrays = Arrays(
        _heads_first(problem.query, queries),
        _heads_first(problem.key, keys),
        _heads_first(problem.value, keys),
        floating,
        None if is_known else scale,
    )
    known = scale if is_known else None
    static = Static(known, problem.soft_cap, blocks, stops_early=not is_mapped_over_mesh())
    return static, arrays, Fixed(others, mask, dropout)


class _Kept(NamedTuple):
    """The forward pass's results for the backward pass; the log-sum-exp of an empty row is inf."""

    output: Float[Array, "B N T E"]
    lse: Float[Array, "B N T"]


def _forward(
    static: Static, arrays: Arrays, fixed: Fixed
) -> tuple[tuple[Num[Array, "B N T E"], Float[Array, "B N T"]], _Kept]:
    def one_block(block: QueryBlock):
        walk = Walk.begin(static, block, arrays, fixed)
        shape, dtype = (*block.query.shape[:3], arrays.value.shape[3]), block.query.dtype
        state = walk.like_arrays(Softmax.start(shape, wide_type(dtype)))
        index = block.last
        if walk.has_state:
            state, index = _forward_head(walk, state)
        if not walk.zero_once_finished:
            state = _forward_tail(walk, state, index)
        return state.result(walk.uses_softmax)

    output, lse = jax.lax.map(one_block, query_blocks(static, arrays.query, fixed.mask))
    output, lse = join(output), join(lse)
    # `output` stays float32 there: a rounded one would tilt the gradients of a whole row.
    kept = _Kept(output, jnp.where(lse == -jnp.inf, jnp.inf, lse))
    return (output.astype(arrays.query.dtype), lse), kept


def _forward_head(walk: Walk, state: Softmax) -> tuple[Softmax, Array]:
    """Leftwards until the bias has finished; also the block to go on with."""

    def step(loop):
        index, state, carry = loop
        state, carry = _forward_tile(walk, index, state, carry)
        return index - 1, state, carry

    loop = (walk.block.last, state, walk.carry())
    index, state, _ = jax.lax.while_loop(lambda loop: walk.going_on(loop[0], loop[2]), step, loop)
    return state, index


def _forward_tail(walk: Walk, state: Softmax, index: Array) -> Softmax:
    """The blocks from `index` leftwards, where the bias has no running state."""

    def step(loop):
        index, state = loop
        return index - 1, _forward_tile(walk, index, state, None)[0]

    return jax.lax.while_loop(lambda loop: loop[0] >= walk.block.first, step, (index, state))[1]


def _forward_tile(
    walk: Walk, index: Array, state: Softmax, carry: PyTree
) -> tuple[Softmax, PyTree]:
    """The states after one block."""

    def tile(inputs: Inputs, value: Array, state: Softmax) -> tuple[Softmax, PyTree]:
        logits, carry = walk.logits(index, inputs)
        weigh = walk.weighted(index, inputs, value)
        return state.update(logits, walk.allowed(index), weigh), carry

    return resolved(tile, walk.inputs(index, carry), walk.arrays.value, state)


class _Sums(NamedTuple):
    """Gradients that all blocks of queries add to, in float32."""

    key: Float[Array, "B K S H"]
    value: Float[Array, "B K S E"]
    bias: Bias | None
    scale: Float[Array, ""] | None


class _Local(NamedTuple):
    """Gradients of one block of queries, in float32."""

    query: Float[Array, "B N t H"]
    rows: PyTree


class _Given(NamedTuple):
    """The arrays that the backward pass has of one block of queries."""

    cotangent: Num[Array, "B N t E"]
    lse: Float[Array, "B N t"]
    delta: Float[Array, "B N t"]


def _backward(
    static: Static, arrays: Arrays, fixed: Fixed, kept: _Kept, cotangents: tuple[Array, Array]
) -> Arrays:
    cotangent, of_lse = cotangents
    delta = jnp.sum(wide(cotangent) * kept.output, axis=-1)
    bias = arrays.bias
    if bias is not None and not bias.uses_softmax:
        delta = jnp.zeros_like(delta)  # weights do not compete: no weight lowers another one
    # A larger log-sum-exp means larger logits, each by its weight.
    delta = delta - of_lse
    given = _Given(*(cut(x, static.blocks.query) for x in (cotangent, kept.lse, delta)))

    def one_block(sums: _Sums, inputs):
        block, given = inputs
        walk = Walk.begin(static, block, arrays, fixed)
        grads = sums, walk.like_arrays(_Local(_zeros(block.query), _zeros(walk.rows)))
        tail_end = block.last
        if walk.has_state:
            carries, tail_end = _saved_carries(walk)
        if not walk.zero_once_finished:
            grads = _backward_tail(walk, given, grads, tail_end)
        if walk.has_state:
            grads = _backward_head(walk, given, grads, tail_end, carries)
        return _finish_rows(walk, *grads)

    sums = _Sums(*map(_no_sums, (arrays.key, arrays.value, bias, arrays.scale)))
    sums = varying_over(varying_axes(arrays.query), sums)
    blocks = query_blocks(static, arrays.query, fixed.mask)
    sums, dquery = jax.lax.scan(one_block, sums, (blocks, given))
    grads = Arrays(join(dquery), sums.key, sums.value, sums.bias, sums.scale)
    return jax.tree.map(lambda x, d: d.astype(x.dtype).reshape(x.shape), arrays, grads)


_attention = with_gradients(_forward, _backward)


def _saved_carries(walk: Walk) -> tuple[PyTree, Array]:
    """The running state before each block of the head, by block, and the last block of the tail."""

    def step(loop):
        index, carry, saved = loop
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
        saved = jax.tree.map(put, saved, carry)
        logits = lambda inputs: walk.logits(index, inputs)  # noqa: E731
        return index - 1, resolved(logits, walk.inputs(index, carry))[1], saved

    carry = walk.carry()
    blocks = walk.arrays.key.shape[2] // walk.static.blocks.key
    if blocks == 1:  # The running state before the only block is known.
        return jax.tree.map(lambda x: x[None], carry), walk.block.first - 1
    saved = jax.tree.map(lambda x: jnp.zeros((blocks, *x.shape), x.dtype), carry)
    saved = walk.like_arrays(saved)
    loop = (walk.block.last, carry, saved)
    index, _, saved = jax.lax.while_loop(lambda loop: walk.going_on(loop[0], loop[1]), step, loop)
    return saved, index


def _backward_tail(walk: Walk, given: _Given, grads: tuple, end: Array) -> tuple:
    """Adds the gradients of blocks first, ..., end, where the bias has no running state."""

    def step(index, grads):
        return _backward_tile(walk, given, grads, index, None, None)[0]

    return jax.lax.fori_loop(walk.block.first, end + 1, step, grads)


def _backward_head(walk: Walk, given: _Given, grads: tuple, end: Array, carries: PyTree) -> tuple:
    """Adds the gradients of blocks end + 1, ..., last; hands the state's cotangent rightwards."""

    def step(index, loop):
        grads, dcarry = loop
        carry = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), carries
        )
        return _backward_tile(walk, given, grads, index, carry, dcarry)

    first = jnp.maximum(end + 1, walk.block.first)
    zeros = walk.like_arrays(_zeros(walk.carry()))
    return jax.lax.fori_loop(first, walk.block.last + 1, step, (grads, zeros))[0]


def _backward_tile(
    walk: Walk, given: _Given, grads: tuple, index: Array, carry: PyTree, dcarry: PyTree
) -> tuple[tuple, PyTree]:
    """Adds one tile's gradients; also the running state's cotangent for the next on the right."""
    sums, local = grads
    value, allowed = walk.arrays.value, walk.allowed(index)
    inputs = walk.inputs(index, carry)
    (logits, _), pull_back = jax.vjp(lambda x: walk.logits(index, x), inputs)
    weights = jnp.exp(logits - given.lse[..., None])
    weights = weights if allowed is None else jnp.where(allowed, weights, 0.0)
    kept = walk.kept(index, weights)
    dweights = resolved(dots, given.cotangent, walk.keys(value, index))
    if walk.has_values:
        weigh = lambda x, kept: walk.weigh(index, x, kept, value.shape[3])  # noqa: E731
        of_values, more = jax.vjp(weigh, inputs, kept)[1](wide(given.cotangent))
        dweights += more
    dweights = walk.kept(index, dweights)
    (d,) = pull_back((weights * (dweights - given.delta[..., None]), dcarry))
    if walk.has_values:
        d = jax.tree.map(jnp.add, d, of_values)
    dvalue = transposed_sum(kept, given.cotangent, value.shape[1])
    query_start, _, key_start, _ = walk.where(index)
    bias = None if d.bias is None else sums.bias.add_block(_wide(d.bias), query_start, key_start)
    sums = _Sums(
        _add_keys(sums.key, d.key, key_start),
        _add_keys(sums.value, dvalue, key_start),
        bias,
        None if d.scale is None else sums.scale + d.scale,
    )
    local = jax.tree.map(jnp.add, local, _Local(wide(d.query), d.rows))
    return (sums, local), d.carry


def _finish_rows(walk: Walk, sums: _Sums, local: _Local) -> tuple[_Sums, Array]:
    """Pulls the gradients of the bias's rows back to the queries and to the bias."""
    if walk.rows is None:
        return sums, local.query
    rows_of = lambda query, bias: merge_bias(bias, walk.fixed.bias).rows(query)  # noqa: E731
    dquery, dbias = jax.vjp(rows_of, walk.block.query, walk.bias)[1](local.rows)
    total = jax.tree.map(jnp.add, sums.bias, _wide(dbias))
    return sums._replace(bias=total), local.query + wide(dquery)


def _heads_first(x: Num[Array, "B T N H"], padding: Length) -> Num[Array, "B N padded H"]:
    """Heads before lengths, with zeros appended to the length."""
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))


def _add_keys(
    total: Float[Array, "B K S H"], part: Num[Array, "B K s H"], start: Array
) -> Float[Array, "B K S H"]:
    """`total` with `part` added to the keys from `start` on."""
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + wide(part), start, axis=2)


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, wide_type(x.dtype)), tree)


def _no_sums(tree: PyTree) -> PyTree:
    """Zeros; of scalars one, since JAX cannot map loops with scalars over an Explicit axis."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape or (1,), wide_type(x.dtype)), tree)


def _wide(tree: PyTree) -> PyTree:
    return jax.tree.map(wide, tree)
