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
from posjax.kernels.tpu import counting, relative
from posjax.kernels.tpu.backward import backward
from posjax.kernels.tpu.forward import forward
from posjax.kernels.tpu.gradients import unit
from posjax.kernels.tpu.plan import LANES, Contextual, Plan, interleave
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
        contextual=_contextual(query, bias, scale, blocks),
        relative=bool(by_distance),
    )
    numbers = walk_ranges(mask, blocks.query, blocks.key)
    arrays = same_heads(_heads_first(plan, padding, query, key, value, bias), axis=1)
    arrays |= {} if bias is None else _tables(plan, bias, query.shape[2])
    if by_distance:
        lengths = length + padding[0], keys + padding[1]
        arrays["strips"] = relative.strips(by_distance, positions, plan, *lengths)
    output = _attention(plan, numbers.batch, arrays, numbers.flat, _sides(plan, mask))
    return jnp.swapaxes(output, 1, 2)[:, :length]


def _contextual(
    query: Array, bias: ContextualBias | None, scale: float, blocks: TpuBlocks
) -> Contextual | None:
    if bias is None:
        return None
    narrow = query.dtype == jnp.bfloat16
    fits = bias.num_positions + blocks.key // LANES <= LANES
    return Contextual(
        positions=bias.num_positions,
        gate_scale=scale if bias.gate_scale is None else bias.gate_scale,
        packed=fits and narrow,
        newton=narrow and tpu_generation() in (4, 5),
        own_gate_key=bias.gate_key is not None,
        gate_bias=bias.gate_bias is not None,
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
    fields = {"positions": mask.query.positions, "segments": mask.query.segment_ids}
    of_keys = {"positions": mask.key.positions, "segments": mask.key.segment_ids}
    wanted = [name for name in fields if name == "positions" or plan.segments]
    wanted = wanted if plan.restricted else []
    sides = {f"query_{name}": fields[name][:, None] for name in wanted}
    return sides | {f"key_{name}": interleave(of_keys[name], 1, plan)[:, None] for name in wanted}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(plan: Plan, rows: int, arrays: dict, numbers: Array, sides: dict) -> Array:
    return _attention_fwd(plan, rows, arrays, numbers, sides)[0]


def _attention_fwd(plan: Plan, rows: int, arrays: dict, numbers: Array, sides: dict):
    ranges = Ranges(numbers, rows, arrays["query"].shape[2] // plan.blocks.query)
    inputs = arrays | sides
    if plan.contextual is not None:
        inputs["lower"] = counting.triangle()
    found = forward(plan, ranges, inputs)
    return found["output"], (arrays, numbers, sides, found)


def _attention_bwd(plan: Plan, rows: int, residuals, cotangent):
    arrays, numbers, sides, found = residuals
    ranges = Ranges(numbers, rows, cotangent.shape[2] // plan.blocks.query)
    output = found["output"].astype(jnp.float32)
    if "rest" in found:
        output += found["rest"].astype(jnp.float32)
    products = cotangent.astype(jnp.float32) * output
    inputs = arrays | sides | {"cotangent": cotangent, "lse": found["lse"]}
    inputs["delta"] = jnp.sum(products, axis=3)[:, :, None]
    if plan.contextual is not None:
        lower = counting.triangle()
        inputs |= {
            "carries": found["carries"],
            "lower": lower,
            "upper": counting.triangle(ahead=True),
        }
    grads = backward(plan, ranges, inputs)
    for name in ("key", "value", "gate_key"):
        if name in grads:
            grads[name] = jnp.swapaxes(grads[name], 2, 3)
    for name in ("query", "key", "gate_key"):
        if name in grads:
            grads[name] *= unit(plan)
    return {name: _like(x, name, grads[name]) for name, x in arrays.items()}, None, None


def _like(x: Array, name: str, gradient: Array) -> Array:
    """A gradient added up over what the array was shared by."""
    if name in ("table", "gate_bias"):
        gradient = jnp.sum(gradient, axis=0)
    if name == "table" and x.shape[0] == 1:
        gradient = jnp.sum(gradient, axis=0, keepdims=True)
    if name == "strips":
        shared = tuple(axis for axis in (0, 1) if x.shape[axis] == 1)
        gradient = jnp.sum(gradient, axis=shared, keepdims=True)
    return gradient.astype(x.dtype)


_attention.defvjp(_attention_fwd, _attention_bwd)
