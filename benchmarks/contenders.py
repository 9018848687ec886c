"""The attention kernels whose schedules benchmarks/tpu_schedule.py compares."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

import posjax.problem
from posjax import ContextualBias, RelativeBias
from posjax.kernels.blocks import TpuBlocks, fastest_tpu_sizes
from posjax.kernels.tpu import attention
from posjax.types import Array

__all__ = ["BLOCKS", "CONTENDERS", "STEPS", "Contender", "Problem", "sizes_of", "split"]


class Problem(NamedTuple):
    """Head size H, and P of the table."""

    head_size: int
    positions: int


def _ours(problem: Problem, sizes: tuple[int, ...], bias: str):
    memory = sizes[2] if len(sizes) > 2 else 4 * sizes[1]
    length = math.lcm(sizes[0], memory) * (1 if sizes[0] > memory else 2)

    # A number that trains for each table's row or head.
    shape = {"cope": (problem.positions, problem.head_size), "alibi": (2,), "none": ()}[bias]
    trained = jax.ShapeDtypeStruct(shape, jnp.float32)

    def attend(query, key, value, trained):
        if bias == "cope":
            described = ContextualBias(trained)
        else:
            alibi = RelativeBias(_linear, trained, distance_only=True)
            described = alibi if bias == "alibi" else None
        scale = problem.head_size**-0.5
        groups = fastest_tpu_sizes().groups_of(sizes[0])  # of the chip that is traced for
        blocks = TpuBlocks(*sizes[:2], memory, **groups)
        call = posjax.problem.Problem.of(query, key, value, described, scale=scale, is_causal=True)
        return attention.run(call, blocks).output

    query, key = (
        jax.ShapeDtypeStruct((1, length, heads, problem.head_size), jnp.bfloat16)
        for heads in (2, 1)
    )
    return attend, (query, key, key, trained)


def _linear(slopes: Array, query_positions: Array, key_positions: Array) -> Array:
    """ALiBi with slopes that train."""
    distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
    return -slopes[None, :, None, None] * jnp.abs(distance).astype(jnp.float32)


def _theirs(problem: Problem, sizes: tuple[int, ...], make: Callable, causal: bool):
    query, key, step = sizes if len(sizes) > 2 else (*sizes, sizes[1])
    whole = max(query, key)
    shape = (1, 2, 4 * whole, problem.head_size)
    return make(query, key, step, whole, causal), (jax.ShapeDtypeStruct(shape, jnp.bfloat16),) * 3


def _flash(query: int, key: int, step: int, whole: int, causal: bool) -> Callable:
    sizes = flash.BlockSizes(
        block_q=query, block_k_major=key, block_k=step, block_b=1,
        block_q_major_dkv=query, block_k_major_dkv=key, block_k_dkv=step, block_q_dkv=query,
        block_k_major_dq=key, block_k_dq=step, block_q_dq=query,
    )  # fmt: skip
    return functools.partial(flash.flash_attention, causal=causal, block_sizes=sizes)


def _splash(query: int, key: int, step: int, whole: int, causal: bool) -> Callable:
    """Not causal is causal by whole blocks: no tile holds a mask, but some are left out."""
    sizes = splash.BlockSizes(
        block_q=query, block_kv=key, block_kv_compute=step,
        block_q_dkv=query, block_kv_dkv=key, block_kv_dkv_compute=step,
        block_q_dq=query, block_kv_dq=key,
    )  # fmt: skip
    mask = masks.CausalMask((4 * whole, 4 * whole))
    if not causal:
        mask = masks.NumpyMask(np.kron(np.tri(4, dtype=bool), np.ones((whole, whole), bool)))
    both_heads = masks.MultiHeadMask([mask, mask])
    return jax.vmap(splash.make_splash_mha_single_device(both_heads, block_sizes=sizes))


@dataclasses.dataclass(frozen=True)
class Contender:
    """How to compile a kernel, and how its programs are called.

    `build` takes a problem and sizes of blocks, and gives the function and the shapes of its
    arguments. `forward` and `backward` name the programs; the costs of several add up.

    `ours` have loops; JAX's are unrolled.
    """

    build: Callable
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    ours: bool


def _contender(forward: str, make: Callable, causal: bool) -> Contender:
    build = functools.partial(_theirs, make=make, causal=causal)
    return Contender(build, (forward,), ("_dq_", "_dkv_"), False)


_OURS = ("posjax_attention_forward",), ("posjax_attention_backward",), True
CONTENDERS = {
    "cope": Contender(functools.partial(_ours, bias="cope"), *_OURS),
    "alibi": Contender(functools.partial(_ours, bias="alibi"), *_OURS),
    "plain": Contender(functools.partial(_ours, bias="none"), *_OURS),
    "splash": _contender("splash_mha_fwd", _splash, False),
    "splash-causal": _contender("splash_mha_fwd", _splash, True),
    "flash": _contender("flash_attention", _flash, False),
    "flash-causal": _contender("flash_attention", _flash, True),
}
STEPS = ("forward", "backward")
_THEIRS = ("512x1024x512", "1024x1024x512", "1024x1024", "1024x2048x1024", "2048x2048x1024")
BLOCKS = {
    (True, "forward"): ("256x1024", "256x1536", "512x512", "512x768", "512x1024"),
    (True, "backward"): ("128x2048", "256x512", "256x1024", "512x512"),
    (False, "forward"): _THEIRS,
    (False, "backward"): _THEIRS,
}


def split(name: str) -> tuple[Contender, str]:
    """The contender and the step of "cope-forward"."""
    contender, _, step = name.rpartition("-")
    if contender not in CONTENDERS or step not in STEPS:
        known = ", ".join(f"{one}-{two}" for one in CONTENDERS for two in STEPS)
        raise SystemExit(f"unknown contender {name!r}; known are {known}")
    return CONTENDERS[contender], step


def sizes_of(blocks: str) -> tuple[int, ...]:
    """The numbers of "512x768"."""
    if not re.fullmatch(r"\d+x\d+(x\d+)?", blocks):
        raise SystemExit(f"blocks must look like 512x768 or 512x768x2048, not {blocks!r}")
    return tuple(int(number) for number in blocks.split("x"))
