"""Attention on TPUs: the layout that the kernels need, and gradients.

output_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j        over the keys j that i sees
"""

import dataclasses

import jax.numpy as jnp

from posjax.biases.contextual import ContextualBias
from posjax.kernels.blocks import TpuBlocks, tpu_generation, tpu_sizes
from posjax.kernels.common import LN2, Attended
from posjax.kernels.derivatives import with_gradients
from posjax.kernels.distances import positions_are_contiguous as holds
from posjax.kernels.host import (
    Prepared,
    attended,
    gate_bias_of_heads,
    relatives,
    same_heads,
    sides,
    table_of_differences,
    unsupported_by,
)
from posjax.kernels.tpu import relative
from posjax.kernels.tpu.arrays import Gradients, Inputs, Outputs, Residuals
from posjax.kernels.tpu.backward import backward
from posjax.kernels.tpu.backward_step import gradient_scale
from posjax.kernels.tpu.forward import forward
from posjax.kernels.tpu.plan import LANES, CopePlan, Plan, interleave
from posjax.masks import Mask, Ranges, walk_ranges
from posjax.problem import Problem
from posjax.types import Array
from posjax.varying import alike

__all__ = ["holds", "refuses", "run"]


def refuses(problem: Problem) -> str | None:
    """The reason why these kernels cannot solve a problem; None if they can."""
    dtype = problem.query.dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"query has dtype {dtype}; the TPU kernels take float32 and bfloat16"
    if problem.mask.array is not None:
        return "the TPU kernels do not support an explicit mask array"
    return unsupported_by(problem, "TPU")


def run(problem: Problem, blocks: TpuBlocks | None = None) -> Attended:
    """Attention by the TPU kernels; a query that may attend to nothing gives 0.

    With a `RelativeBias` positions must be contiguous (`distances.positions_are_contiguous`).

    Args:
        blocks: None: the fastest of the chip.

    Raises:
        ValueError: blocks that do not fit a relative bias.
    """
    problem = alike(problem)
    query, key = problem.query, problem.key
    by_distance = bool(relatives(problem.bias))
    if blocks is None:
        blocks = tpu_sizes(query.shape[1], key.shape[1], relative=by_distance)
    if by_distance and not relative.fits(blocks):
        raise ValueError(
            f"{blocks} do not fit a relative bias; query must be a multiple of key / {LANES}, and "
            "at most key."
        )
    prepared, cope = Prepared.of(problem, blocks.query, blocks.key), None
    if prepared.cope is not None:
        prepared = _with_gate_key(prepared)
        cope = _cope_plan(prepared, blocks)
    plan = Plan(**prepared.settings(blocks, cope))
    ranges = walk_ranges(prepared.mask, blocks.query, blocks.key)
    arrays = same_heads(_heads_first(plan, prepared), axis=1)
    if prepared.cope is not None:
        arrays |= _tables(plan, prepared.cope, query.shape[2])
    if by_distance:
        arrays["strips"] = relative.strips(
            prepared.relatives, problem.mask, plan, *prepared.lengths
        )
    inputs = Inputs(**arrays, **_sides(plan, prepared.mask))
    output, lse = _attention((plan, ranges.batch), inputs, ranges.flat)
    output, lse = (jnp.swapaxes(x, 1, 2)[:, : query.shape[1]] for x in (output, lse))
    return attended(problem, output, lse)


def _with_gate_key(prepared: Prepared) -> Prepared:
    """With a scale of 0, nothing is left of the scaled products that gates would come from."""
    problem, bias = prepared.problem, prepared.cope
    if problem.scale or not bias.gate_scale or bias.gate_key is not None:
        return prepared
    return prepared._replace(cope=dataclasses.replace(bias, gate_key=problem.key))


def _cope_plan(prepared: Prepared, blocks: TpuBlocks) -> CopePlan:
    problem, bias = prepared.problem, prepared.cope
    narrow = problem.query.dtype == jnp.bfloat16
    fits = bias.num_positions + blocks.key // LANES <= LANES
    return CopePlan(
        **CopePlan.of(bias, problem.scale),
        packed=fits and narrow,
        newton=narrow and tpu_generation() in (4, 5),
    )


def _heads_first(plan: Plan, prepared: Prepared) -> dict[str, Array]:
    """[B, heads, padded length, size]; keys interleaved."""

    def turned(x: Array, amount: int) -> Array:
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, amount), (0, 0)))

    (queries, keys), problem, bias = prepared.padding, prepared.problem, prepared.cope
    arrays = {"key": problem.key, "value": problem.value}
    if bias is not None and bias.gate_key is not None:
        dtype = problem.query.dtype if bias.gate_key.dtype == problem.query.dtype else jnp.float32
        arrays["gate_key"] = bias.gate_key.astype(dtype)
    arrays = {name: interleave(turned(x, keys), 2, plan) for name, x in arrays.items()}
    return {"query": turned(problem.query, queries)} | arrays


def _tables(plan: Plan, bias: ContextualBias, heads: int) -> dict[str, Array]:
    """The table, [1 or N, width, H], and the gates' bias, [N, 1, lanes]."""
    table, gate_bias = table_of_differences(bias), gate_bias_of_heads(bias, heads)
    width = plan.pieces * LANES
    arrays = {"table": jnp.pad(table, ((0, 0), (0, width - table.shape[1]), (0, 0)))}
    if gate_bias is not None:
        arrays["gate_bias"] = jnp.broadcast_to(gate_bias[:, None, None], (heads, 1, LANES))
    return arrays


def _sides(plan: Plan, mask: Mask) -> dict[str, Array]:
    """Positions and segments as the kernels read them, [B or 1, 1, length]."""
    found = sides(plan, mask)
    found |= {name: interleave(x, 1, plan) for name, x in found.items() if name.startswith("key")}
    return {name: x[:, None] for name, x in found.items()}


def _forward(
    static: tuple[Plan, int], inputs: Inputs, range_table: Array
) -> tuple[tuple[Array, Array], Outputs]:
    plan, rows = static
    ranges = Ranges(range_table, rows, inputs.query.shape[2] // plan.blocks.query)
    outputs = forward(plan, ranges, inputs)
    return (outputs.output, outputs.lse[:, :, 0] * LN2), outputs


def _backward(
    static: tuple[Plan, int],
    inputs: Inputs,
    range_table: Array,
    outputs: Outputs,
    cotangents: tuple[Array, Array],
) -> Inputs:
    plan, rows = static
    cotangent, of_lse = cotangents
    ranges = Ranges(range_table, rows, cotangent.shape[2] // plan.blocks.query)
    output = outputs.output.astype(jnp.float32)
    if outputs.output_residual is not None:
        output += outputs.output_residual.astype(jnp.float32)
    delta = (jnp.sum(cotangent.astype(jnp.float32) * output, axis=3) - of_lse)[:, :, None]
    residuals = Residuals(cotangent, outputs.lse, delta, outputs.carries)
    gradients = backward(plan, ranges, inputs, residuals)
    return _finished(inputs, gradients, gradient_scale(plan))


_attention = with_gradients(_forward, _backward, is_pallas=True)


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
