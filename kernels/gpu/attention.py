"""Attention on GPUs: the layout that the kernels need, and gradients.

output_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j        over the keys j that i sees
"""

import functools

import jax
import jax.numpy as jnp

from posjax.biases.contextual import ContextualBias
from posjax.kernels.blocks import GpuBlocks, gpu_sizes
from posjax.kernels.common import LN2, LOG2E
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
from posjax.kernels.padding import padded, same_heads
from posjax.kernels.parts import contextual, relatives
from posjax.kernels.platforms import gpu_interpreter
from posjax.kernels.ranges import Ranges, walk_ranges
from posjax.masks import Mask
from posjax.problem import Problem
from posjax.types import Array, Num

__all__ = ["run"]


def run(problem: Problem, blocks: GpuBlocks | None = None) -> Num[Array, "B T N E"]:
    """Attention by the GPU kernels; a query that may attend to nothing gives 0.

    With a `RelativeBias` positions must be contiguous (`distances.positions_are_contiguous`).

    Args:
        blocks: None: those of `kernels.blocks`.
    """
    query, key, value = problem.query, problem.key, problem.value
    mask, scale = problem.mask, problem.scale
    by_distance, bias = relatives(problem.bias), contextual(problem.bias)
    size = next(size for size in SIZES if size >= max(query.shape[3], value.shape[3]))
    if blocks is None:
        positions = 0 if bias is None else bias.num_positions
        blocks = gpu_sizes(size, positions, bias is not None and bias.gate_key is not None)
    length, keys = query.shape[1], key.shape[1]
    padding = -length % (ROWS * GROUPS), -keys % blocks.key
    positions, mask = mask, padded(mask, *padding)
    plan = Plan(
        scale=scale,
        blocks=blocks,
        queries=length,
        is_causal=mask.is_causal,
        window=mask.window,
        segments=mask.query.segment_ids is not None,
        cope=_cope_plan(bias, scale),
        relative=bool(by_distance),
        trains_relative=bool(jax.tree.leaves([part.params for part in by_distance])),
        emulated=gpu_interpreter() is not None,
    )
    ranges = walk_ranges(mask, ROWS, blocks.key)
    of_keys = walk_ranges(mask, ROWS, KEYS, of_keys=True)
    arrays = {
        "query": _padded(query, padding[0], size),
        "key": _padded(key, padding[1], size),
        "value": _padded(value, padding[1], size),
    }
    if bias is not None:
        arrays |= _of_bias(query, key, bias, padding, size, scale)
    if by_distance:
        lengths = length + padding[0], keys + padding[1]
        arrays["distance_bias"] = relative.distance_bias(by_distance, positions, *lengths)
    arrays = same_heads(arrays, axis=2)
    numbers = {"ranges": ranges.flat, "key_ranges": of_keys.flat}
    output = _attention(plan, ranges.batch, arrays, numbers, _sides(plan, mask))
    return output[:, :length, :, : value.shape[3]]


def _cope_plan(bias: ContextualBias | None, scale: float) -> CopePlan | None:
    if bias is None:
        return None
    return CopePlan(
        positions=bias.num_positions,
        gate_scale=scale if bias.gate_scale is None else bias.gate_scale,
        own_gate_key=bias.gate_key is not None,
        has_gate_bias=bias.gate_bias is not None,
    )


def _padded(x: Array, amount: int, size: int) -> Array:
    """Zeros after the sequence and after each head's numbers."""
    return jnp.pad(x, ((0, 0), (0, amount), (0, 0), (0, size - x.shape[3])))


def _of_bias(query, key, bias: ContextualBias, padding, size: int, scale: float) -> dict:
    """The queries' products with the table [B, N, T, P], in units of ln 2, and gates' arrays."""
    table = bias.table.astype(jnp.float32)
    table = (table - table[..., -1:, :]) * (bias.bias_scale * LOG2E)
    heads = query.shape[2]
    table = jnp.broadcast_to(table, (heads, *table.shape[-2:]))
    queries = jnp.pad(query, ((0, 0), (0, padding[0]), (0, 0), (0, 0))).astype(jnp.float32)
    z = jnp.einsum("btnh,nph->bntp", queries, table, precision=jax.lax.Precision.HIGHEST)
    arrays = {"z": z}
    if bias.gate_key is not None:
        arrays["gate_key"] = _padded(bias.gate_key.astype(key.dtype), padding[1], size)
    if bias.gate_bias is not None:
        gate_bias = bias.gate_bias.astype(jnp.float32) * LOG2E
        arrays["gate_bias"] = jnp.broadcast_to(gate_bias, (heads,))
    return arrays


def _sides(plan: Plan, mask: Mask) -> dict[str, Array]:
    """Positions and segments, [B or 1, length]."""
    if not plan.restricted:
        return {}
    sides = {"query": mask.query, "key": mask.key}
    found = {f"{name}_positions": side.positions for name, side in sides.items()}
    if plan.segments:
        found |= {f"{name}_segments": side.segment_ids for name, side in sides.items()}
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(plan: Plan, rows: int, arrays: dict, numbers: dict, sides: dict) -> Array:
    return _attention_fwd(plan, rows, arrays, numbers, sides)[0]


def _attention_fwd(plan: Plan, rows: int, arrays: dict, numbers: dict, sides: dict):
    inputs = _inputs(plan, arrays, numbers, sides, plan.blocks.count)
    outputs = forward(plan, _ranges(rows, numbers["ranges"]), inputs)
    return outputs.output, (arrays, numbers, sides, outputs)


def _inputs(plan: Plan, arrays: dict, numbers: dict, sides: dict, size: int) -> Inputs:
    """The inputs of all kernels.

    Args:
        size: keys over which one product sums gates.
    """
    inputs = Inputs(arrays["query"], arrays["key"], arrays["value"], numbers["ranges"], **sides)
    optional = ("gate_key", "gate_bias", "distance_bias")
    inputs = inputs._replace(**{name: arrays[name] for name in optional if name in arrays})
    if plan.cope is None:
        return inputs
    triangle = jnp.tri(size, dtype=jnp.float16) * jnp.float16(plan.cope.gate_quantum)
    return inputs._replace(tables=tables(arrays["z"], plan.blocks.packed), lower_triangle=triangle)


def _ranges(rows: int, numbers: Array) -> Ranges:
    return Ranges(numbers, rows, numbers.size // (4 * rows))


def _attention_bwd(plan: Plan, rows: int, saved, cotangent):
    arrays, numbers, sides, outputs = saved
    inputs = _inputs(plan, arrays, numbers, sides, TILE_KEYS)
    residuals = _residuals(plan, outputs, cotangent)
    ranges, of_keys = (_ranges(rows, numbers[name]) for name in ("ranges", "key_ranges"))
    of_queries = query_gradients(plan, ranges, inputs, residuals)
    grads = {"query": of_queries.query}
    if plan.relative:
        grads["distance_bias"] = _distance_bias_gradient(
            plan, ranges, arrays["distance_bias"], of_queries
        )
    if plan.cope is not None:
        grads |= _gradients_of_counts(plan, of_queries)
    residuals = residuals._replace(prefixes=of_queries.prefixes, key_ranges=numbers["key_ranges"])
    keys = key_gradients(plan, ranges, of_keys, inputs, residuals, of_gates=False)
    grads |= {"key": keys.key, "value": keys.value}
    if inputs.gate_key is not None:
        gates = key_gradients(plan, ranges, of_keys, inputs, residuals, of_gates=True)
        grads["gate_key"] = gates.gate_key
    return {name: grads[name].astype(x.dtype) for name, x in arrays.items()}, None, None


def _residuals(plan: Plan, outputs: Outputs, cotangent: Array) -> Residuals:
    """Further inputs of the backward kernels."""
    output = outputs.output.astype(jnp.float32) + outputs.output_residual.astype(jnp.float32)
    delta = jnp.sum(cotangent.astype(jnp.float32) * output, axis=3)
    residuals = Residuals(
        cotangent=cotangent,
        lse=outputs.lse,
        delta=jnp.swapaxes(delta, 1, 2),
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


_attention.defvjp(_attention_fwd, _attention_bwd)
