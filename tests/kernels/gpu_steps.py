"""Single steps of the GPU kernels as separate kernels, to be run on a GPU."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.gpu import look_ups, products, reciprocals, registers, stores
from posjax.kernels.gpu.layout import Buffer, launch, matrix, per_row, row_layout
from posjax.types import Array, Float

ROWS, KEYS = 64, 128


class Output(NamedTuple):
    """The only output of a step."""

    array: Array


class Values(NamedTuple):
    """Values of a table."""

    bias: Float[Array, "64 128"]
    slope: Float[Array, "64 128"]
    fraction: Float[Array, "64 128"]


class Scratch(NamedTuple):
    """An operand in shared memory, and room for one that the warpgroup stores."""

    operand: Buffer | None = None
    stored: Any = None


def _one_warpgroup(step, inputs: tuple, outputs: tuple, scratch: Scratch) -> tuple:
    """Runs `step(*inputs, outputs, scratch)` in a warpgroup; a second one does nothing."""

    def kernel(*references):
        pl.when(jax.lax.axis_index("group") == 0)(functools.partial(step, *references))

    one = {"head": 1, "tile": 1, "batch": 1}
    return launch(kernel, inputs, outputs, grid=one, scratch=scratch, name="posjax_step", groups=1)


def _fetch(ref, buffer: Buffer) -> None:
    plgpu.copy_gmem_to_smem(ref, buffer.array, buffer.full.at[0])
    plgpu.barrier_wait(buffer.full.at[0])


def inverses(x, *, paired: bool, emulated: bool = False):
    """1 / x of [64, 128]."""
    invert = reciprocals.paired_reciprocal if paired else reciprocals.reciprocal

    def step(x, output, scratch):
        taken = registers.load(x, plgpu.Layout.WGMMA)
        output.array[...] = invert(taken, emulated=emulated)

    output = Output(jax.ShapeDtypeStruct((ROWS, KEYS), jnp.float32))
    return _one_warpgroup(step, (x,), output, Scratch()).array


def sums(gates, lower, start, *, emulated: bool = False):
    """start + gates @ lower in the matrix unit; gates [64, n] and lower [n, n] are float16."""

    def step(gates, lower, start, output, scratch):
        _fetch(lower, scratch.operand)
        narrow = registers.load(gates, plgpu.Layout.WGMMA).astype(jnp.float16)
        before = registers.load(start, plgpu.Layout.WGMMA)
        output.array[...] = products.multiply_into(
            before, narrow, scratch.operand.array, emulated=emulated
        )

    size = lower.shape[0]
    scratch = Scratch(Buffer.constant(matrix((size, size), jnp.float16)))
    output = Output(jax.ShapeDtypeStruct((ROWS, size), jnp.float32))
    return _one_warpgroup(step, (gates, lower, start), output, scratch).array


def looked_up(table, place, *, packed: bool, emulated: bool = False) -> Values:
    """Values at places [64, 128] of tables [64, words]."""

    def step(table, place, outputs, scratch):
        _fetch(table, scratch.operand)
        taken = registers.load(place, plgpu.Layout.WGMMA)
        values = look_ups.table_values(
            scratch.operand.array, taken, packed=packed, emulated=emulated
        )
        for output, value in zip(outputs, values, strict=True):
            output[...] = value

    scratch = Scratch(Buffer.constant(plgpu.SMEM(table.shape, jnp.float32)))
    outputs = Values(*[jax.ShapeDtypeStruct((ROWS, KEYS), jnp.float32)] * 3)
    return _one_warpgroup(step, (table, place), outputs, scratch)


def reached(x, least: float, *, emulated: bool = False):
    """[64] of 1 if all numbers of x [64] are at least `least`, and else of 0."""

    def step(x, output, scratch):
        taken = registers.load(x, row_layout())
        reaches = stores.all_reach(taken, least, emulated=emulated)
        answer = per_row(reaches.astype(jnp.float32))
        stores.store(output.array, answer, row_layout(), emulated=emulated)

    output = Output(jax.ShapeDtypeStruct((ROWS,), jnp.float32))
    return _one_warpgroup(step, (x,), output, Scratch()).array


def transposed_product(x, y, *, emulated: bool = False):
    """x^T @ y of [64, 64], x stored in halves of 32 columns as the kernel of keys does."""
    half = KEYS // 4

    def step(x, y, output, scratch):
        _fetch(y, scratch.operand)
        taken = registers.load(x, plgpu.Layout.WGMMA).astype(jnp.bfloat16)
        for start in (0, half):
            target = scratch.stored.at[:, start : start + half]
            part = taken[:, start : start + half]
            stores.store_matrix(target, part, swizzle=2 * half, emulated=emulated)
        plgpu.commit_smem()
        zero = plgpu.layout_cast(jnp.zeros((ROWS, ROWS), jnp.float32), plgpu.Layout.WGMMA)
        output.array[...] = products.multiply_transposed_into(
            zero, scratch.stored, scratch.operand.array, emulated=emulated
        )
        stores.warpgroup_barrier(emulated=emulated)

    memory = matrix((ROWS, ROWS), jnp.bfloat16, swizzle=2 * half)
    output = Output(jax.ShapeDtypeStruct((ROWS, ROWS), jnp.float32))
    scratch = Scratch(Buffer.constant(memory), memory)
    return _one_warpgroup(step, (x, y), output, scratch).array
