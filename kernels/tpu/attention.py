"""Attention on TPUs: the layout that the kernels need, and gradients.

output_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j        over the keys j that i sees
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from posjax.biases.contextual import ContextualBias
from posjax.kernels.blocks import TpuBlocks, tpu_generation, tpu_sizes
from posjax.kernels.common import LOG2E
from posjax.kernels.padding import padded, same_heads
from posjax.kernels.parts import contextual, relatives
from posjax.kernels.ranges import Ranges, walk_ranges
from posjax.kernels.tpu import relative
from posjax.kernels.tpu.arrays import Gradients, Inputs, Outputs, Residuals
from posjax.kernels.tpu.backward import backward
from posjax.kernels.tpu.backward_step import gradient_scale
from posjax.kernels.tpu.forward import forward
from posjax.kernels.tpu.plan import LANES, CopePlan, Plan, interleave
from posjax.masks import Mask
from posjax.problem import Problem
from posjax.types import Array, Num

__all__ = ["run"]


def run(problem: Problem, blocks: TpuBlocks | None = None) -> Num[Array, "B T N E"]:
    """Attention by the TPU kernels; a query that may attend to nothing gives 0.

    With a `RelativeBias` positions must be contiguous (`distances.positions_are_contiguous`).

    Args:
        blocks: None: the fastest of the chip.

    Raises:
        ValueError: blocks that do not fit a relative bias.
    """
    query, key, value = problem.query, problem.key, problem.value
    mask, scale = problem.mask, problem.scale
    by_distance, bias = relatives(problem.bias), contextual(problem.bias)
    if blocks is None:
        blocks = tpu_sizes(query.shape[1], key.shape[1], relative=bool(by_distance))
    if by_distance and not relative.fits(blocks):
        raise ValueError(
            f"{blocks} do not fit a relative bias; query must be a multiple of key / {LANES}, and "
            "at most key."
        )
    length, keys = query.shape[1], key.shape[1]
    padding = -length % blocks.query, -keys % blocks.key
    if scale == 0 and bias is not None and bias.gate_scale and bias.gate_key is None:
        # Gates come from the scaled products of query and key, of which nothing is left here.
        bias = dataclasses.replace(bias, gate_key=key)
    positions, mask = mask, padded(mask, *padding)
    plan = Plan(
        scale=scale,
        blocks=blocks,
        queries=length,
        is_causal=mask.is_causal,
        window=mask.window,
        segments=mask.query.segment_ids is not None,
        cope=_cope_plan(query, bias, scale, blocks),
        relative=bool(by_distance),
    )
    ranges = walk_ranges(mask, blocks.query, blocks.key)
    arrays = same_heads(_heads_first(plan, padding, query, key, value, bias), axis=1)
    arrays |= {} if bias is None else _tables(plan, bias, query.shape[2])
    if by_distance:
        lengths = length + padding[0], keys + padding[1]
        arrays["strips"] = relative.strips(by_distance, positions, plan, *lengths)
    inputs = Inputs(**arrays, **_sides(plan, mask))
    output = _attention(plan, ranges.batch, inputs, ranges.flat)
    return jnp.swapaxes(output, 1, 2)[:, :length]


def _cope_plan(
    query: Array, bias: ContextualBias | None, scale: float, blocks: TpuBlocks
) -> CopePlan | None:
    if bias is None:
        return None
    narrow = query.dtype == jnp.bfloat16
    fits = bias.num_positions + blocks.key // LANES <= LANES
    return CopePlan(
        positions=bias.num_positions,
        gate_scale=scale if bias.gate_scale is None else bias.gate_scale,
        packed=fits and narrow,
        newton=narrow and tpu_generation() in (4, 5),
        own_gate_key=bias.gate_key is not None,
        has_gate_bias=bias.gate_bias is not None,
    )


def _heads_first(plan: Plan, padding, query, key, value, bias) -> dict[str, Array]:
    """[B, heads, padded length, size]; keys interleaved."""

    def turned(x: Array, amount: int) -> Array:
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, amount), (0, 0)))

    queries, keys = padding
    arrays = {"key": key, "value": value}
    if bias is not None and bias.gate_key is not None:
        same = bias.gate_key.dtype == query.dtype
        arrays["gate_key"] = bias.gate_key.astype(query.dtype if same else jnp.float32)
    arrays = {name: interleave(turned(x, keys), 2, plan) for name, x in arrays.items()}
    return {"query": turned(query, queries)} | arrays


def _tables(plan: Plan, bias: ContextualBias, heads: int) -> dict[str, Array]:
    """The table less its last row, in units of ln 2, [1 or N, width, H]; gate biases likewise."""
    table = bias.table.astype(jnp.float32)
    table = table if table.ndim == 3 else table[None]
    table = (table - table[:, -1:]) * (bias.bias_scale * LOG2E)
    width = plan.pieces * LANES
    arrays = {"table": jnp.pad(table, ((0, 0), (0, width - table.shape[1]), (0, 0)))}
    if bias.gate_bias is not None:
        gate_bias = jnp.broadcast_to(bias.gate_bias.astype(jnp.float32) * LOG2E, (heads,))
        arrays["gate_bias"] = jnp.broadcast_to(gate_bias[:, None, None], (heads, 1, LANES))
    return arrays


def _sides(plan: Plan, mask: Mask) -> dict[str, Array]:
    """Positions and segments as the kernels read them, [B or 1, 1, length]."""
    if not plan.restricted:
        return {}
    of_query = lambda x: x[:, None]  # noqa: E731
    of_key = lambda x: interleave(x, 1, plan)[:, None]  # noqa: E731
    sides = {
        "query_positions": of_query(mask.query.positions),
        "key_positions": of_key(mask.key.positions),
    }
    if plan.segments:
        sides["query_segments"] = of_query(mask.query.segment_ids)
        sides["key_segments"] = of_key(mask.key.segment_ids)
    return sides


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(plan: Plan, rows: int, inputs: Inputs, range_table: Array) -> Array:
    return _attention_fwd(plan, rows, inputs, range_table)[0]


def _attention_fwd(plan: Plan, rows: int, inputs: Inputs, range_table: Array):
    ranges = Ranges(range_table, rows, inputs.query.shape[2] // plan.blocks.query)
    outputs = forward(plan, ranges, inputs)
    return outputs.output, (inputs, range_table, outputs)


def _attention_bwd(plan: Plan, rows: int, kept: tuple[Inputs, Array, Outputs], cotangent: Array):
    inputs, range_table, outputs = kept
    ranges = Ranges(range_table, rows, cotangent.shape[2] // plan.blocks.query)
    output = outputs.output.astype(jnp.float32)
    if outputs.output_residual is not None:
        output += outputs.output_residual.astype(jnp.float32)
    delta = jnp.sum(cotangent.astype(jnp.float32) * output, axis=3)[:, :, None]
    residuals = Residuals(cotangent, outputs.lse, delta, outputs.carries)
    gradients = backward(plan, ranges, inputs, residuals)
    return _finished(inputs, gradients, gradient_scale(plan)), None


def _finished(inputs: Inputs, gradients: Gradients, scale: float) -> Inputs:
    """The gradients in the layouts and dtypes of the inputs, added up over what shares these."""
    swapped = lambda x: None if x is None else jnp.swapaxes(x, 2, 3)  # noqa: E731
    scaled = lambda x: None if x is None else x * scale  # noqa: E731
    summed = lambda x, axes: jnp.sum(x, axis=axes, keepdims=True)  # noqa: E731
    table, gate_bias, strips = gradients.table, gradients.gate_bias, gradients.strips
    if table is not None:
        table = jnp.sum(table, axis=0)
        table = summed(table, 0) if inputs.table.shape[0] == 1 else table
    if gate_bias is not None:
        gate_bias = jnp.sum(gate_bias, axis=0)
    if strips is not None:
        strips = summed(strips, tuple(axis for axis in (0, 1) if inputs.strips.shape[axis] == 1))
    finished = Inputs(
        query=scaled(gradients.query),
        key=scaled(swapped(gradients.key)),
        value=swapped(gradients.value),
        gate_key=scaled(swapped(gradients.gate_key)),
        table=table,
        gate_bias=gate_bias,
        strips=strips,
    )
    pairs = zip(finished, inputs, strict=True)
    return Inputs(*(x if x is None else x.astype(like.dtype) for x, like in pairs))


_attention.defvjp(_attention_fwd, _attention_bwd)
