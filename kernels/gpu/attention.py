"""Attention on GPUs: the layout that the kernels need, and gradients.

output_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j        over the keys j that i sees
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from posjax.biases.contextual import ContextualBias
from posjax.kernels.blocks import GpuBlocks, gpu_sizes
from posjax.kernels.common import LN2, Attended
from posjax.kernels.derivatives import with_gradients
from posjax.kernels.gpu import relative
from posjax.kernels.gpu.arrays import Inputs, Outputs, QueryGradients, Residuals
from posjax.kernels.gpu.backward_keys import key_gradients
from posjax.kernels.gpu.backward_queries import query_gradients
from posjax.kernels.gpu.forward import forward
from posjax.kernels.gpu.gradients import gate_gradient_scale
from posjax.kernels.gpu.keys import KEYS
from posjax.kernels.gpu.plan import GROUPS, ROWS, TILE_KEYS, CopePlan, Plan
from posjax.kernels.gpu.support import SIZES
from posjax.kernels.gpu.tables import slot_words, table_gradients, tables
from posjax.kernels.host import (
    Prepared,
    attended,
    contextual,
    gate_bias_of_heads,
    same_heads,
    sides,
    table_of_differences,
)
from posjax.kernels.interpreters import gpu_interpreter
from posjax.masks import Ranges, walk_ranges
from posjax.problem import Problem
from posjax.types import Array
from posjax.varying import alike

__all__ = ["run"]


def run(problem: Problem, blocks: GpuBlocks | None = None) -> Attended:
    """Attention by the GPU kernels; a query that may attend to nothing gives 0.

    With a `RelativeBias` positions must be contiguous (`distances.positions_are_contiguous`).

    Args:
        blocks: None: those of `kernels.blocks`.
    """
    problem = alike(problem)
    query, value, cope = problem.query, problem.value, contextual(problem.bias)
    size = next(size for size in SIZES if size >= max(query.shape[3], value.shape[3]))
    if blocks is None:
        positions = 0 if cope is None else cope.num_positions
        blocks = gpu_sizes(size, positions, cope is not None and cope.gate_key is not None)
    prepared = Prepared.of(problem, ROWS * GROUPS, blocks.key)
    own = None if cope is None else CopePlan(**CopePlan.of(cope, problem.scale))
    plan = Plan(
        **prepared.settings(blocks, own),
        trains_relative=bool(jax.tree.leaves([part.params for part in prepared.relatives])),
        emulated=gpu_interpreter() is not None,
    )
    ranges = walk_ranges(prepared.mask, ROWS, blocks.key)
    of_keys = walk_ranges(prepared.mask, ROWS, KEYS, of_keys=True)
    arrays = same_heads(_arrays(prepared, size), axis=2)
    fixed = Fixed(ranges.flat, of_keys.flat, sides(plan, prepared.mask))
    output, lse = _attention((plan, ranges.batch), arrays, fixed)
    output, lse = output[..., : value.shape[3]], jnp.swapaxes(lse, 1, 2)
    return attended(problem, *(x[:, : query.shape[1]] for x in (output, lse)))


class Fixed(NamedTuple):
    """Arrays without gradients: ranges of blocks, and positions and segments by name."""

    ranges: Array
    key_ranges: Array
    sides: dict[str, Array]


def _arrays(prepared: Prepared, size: int) -> dict[str, Array]:
    """Arrays that receive gradients, padded."""
    problem, (queries, keys) = prepared.problem, prepared.padding
    arrays = {
        "query": _padded(problem.query, queries, size),
        "key": _padded(problem.key, keys, size),
        "value": _padded(problem.value, keys, size),
    }
    if prepared.cope is not None:
        arrays |= _of_cope(prepared, prepared.cope, size)
    if prepared.relatives:
        arrays["distance_bias"] = relative.distance_bias(
            prepared.relatives, problem.mask, *prepared.lengths
        )
    return arrays


def _padded(x: Array, amount: int, size: int) -> Array:
    """Zeros after the sequence and after each head's numbers."""
    return jnp.pad(x, ((0, 0), (0, amount), (0, 0), (0, size - x.shape[3])))


def _of_cope(prepared: Prepared, bias: ContextualBias, size: int) -> dict[str, Array]:
    """The queries' products with the table [B, N, T, P], in units of ln 2, and gates' arrays."""
    query, (queries, keys) = prepared.problem.query, prepared.padding
    heads, table = query.shape[2], table_of_differences(bias)
    table = jnp.broadcast_to(table, (heads, *table.shape[-2:]))
    query = jnp.pad(query, ((0, 0), (0, queries), (0, 0), (0, 0))).astype(jnp.float32)
    z = jnp.einsum("btnh,nph->bntp", query, table, precision=jax.lax.Precision.HIGHEST)
    arrays, gate_bias = {"z": z}, gate_bias_of_heads(bias, heads)
    if bias.gate_key is not None:
        gate_key = bias.gate_key.astype(prepared.problem.key.dtype)
        arrays["gate_key"] = _padded(gate_key, keys, size)
    return arrays if gate_bias is None else arrays | {"gate_bias": gate_bias}


def _forward(
    static: tuple[Plan, int], arrays: dict, fixed: Fixed
) -> tuple[tuple[Array, Array], Outputs]:
    plan, rows = static
    inputs = _inputs(plan, arrays, fixed, plan.blocks.count)
    outputs = forward(plan, _ranges(rows, fixed.ranges), inputs)
    return (outputs.output, outputs.lse * LN2), outputs


def _inputs(plan: Plan, arrays: dict, fixed: Fixed, size: int) -> Inputs:
    """The inputs of all kernels.

    Args:
        size: keys over which one product sums gates.
    """
    inputs = Inputs(arrays["query"], arrays["key"], arrays["value"], fixed.ranges, **fixed.sides)
    optional = ("gate_key", "gate_bias", "distance_bias")
    inputs = inputs._replace(**{name: arrays[name] for name in optional if name in arrays})
    if plan.cope is None:
        return inputs
    triangle = jnp.tri(size, dtype=jnp.float16) * jnp.float16(plan.cope.gate_quantum)
    return inputs._replace(tables=tables(arrays["z"], plan.blocks.packed), lower_triangle=triangle)


def _ranges(rows: int, numbers: Array) -> Ranges:
    return Ranges(numbers, rows, numbers.size // (4 * rows))


def _backward(
    static: tuple[Plan, int],
    arrays: dict,
    fixed: Fixed,
    outputs: Outputs,
    cotangents: tuple[Array, Array],
) -> dict[str, Array]:
    plan, rows = static
    inputs = _inputs(plan, arrays, fixed, TILE_KEYS)
    residuals = _residuals(plan, outputs, *cotangents)
    ranges, of_keys = _ranges(rows, fixed.ranges), _ranges(rows, fixed.key_ranges)
    of_queries = query_gradients(plan, ranges, inputs, residuals)
    grads = {"query": of_queries.query}
    if plan.relative:
        grads["distance_bias"] = _distance_bias_gradient(
            plan, ranges, arrays["distance_bias"], of_queries
        )
    if plan.cope is not None:
        grads |= _gradients_of_counts(plan, of_queries)
    residuals = residuals._replace(prefixes=of_queries.prefixes, key_ranges=fixed.key_ranges)
    keys = key_gradients(plan, ranges, of_keys, inputs, residuals, of_gates=False)
    grads |= {"key": keys.key, "value": keys.value}
    if inputs.gate_key is not None:
        gates = key_gradients(plan, ranges, of_keys, inputs, residuals, of_gates=True)
        grads["gate_key"] = gates.gate_key
    return {name: grads[name].astype(x.dtype) for name, x in arrays.items()}


def _residuals(plan: Plan, outputs: Outputs, cotangent: Array, of_lse: Array) -> Residuals:
    """Further inputs of the backward kernels."""
    output = outputs.output.astype(jnp.float32) + outputs.output_residual.astype(jnp.float32)
    delta = jnp.sum(cotangent.astype(jnp.float32) * output, axis=3)
    residuals = Residuals(
        cotangent=cotangent,
        lse=outputs.lse,
        delta=jnp.swapaxes(delta, 1, 2) - of_lse,
        carries=outputs.carries,
        last_plain=outputs.last_plain,
    )
    if plan.cope is None:
        return residuals
    words = slot_words(plan.cope.positions)
    return residuals._replace(
        upper_triangle=jnp.tri(TILE_KEYS, dtype=jnp.bfloat16).T,
        empty_slots=jnp.full((ROWS, words), jnp.nan, jnp.float32),
    )


def _distance_bias_gradient(
    plan: Plan, ranges: Ranges, array: Array, of_queries: QueryGradients
) -> Array:
    """Zeros if nothing trains."""
    if not plan.trains_relative:
        return jnp.zeros_like(array)
    gradient = relative.gradient(of_queries.distance_bias, ranges, plan)
    shared = tuple(axis for axis in (0, 1) if array.shape[axis] == 1)
    return jnp.sum(gradient, axis=shared, keepdims=True)


def _gradients_of_counts(plan: Plan, of_queries: QueryGradients) -> dict[str, Array]:
    """Gradients of the tables and of the gates' bias."""
    sums = of_queries.slots, of_queries.total, of_queries.moment
    grads = {"z": table_gradients(*sums, plan.cope.positions)}
    if plan.cope.has_gate_bias:
        scale = LN2 * gate_gradient_scale(plan)
        grads["gate_bias"] = jnp.sum(of_queries.gate_bias, axis=(0, 2)) * scale
    return grads


_attention = with_gradients(_forward, _backward, is_pallas=True)
