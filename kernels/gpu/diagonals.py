"""Tiles and their diagonals: a number of each added to the tile, and the sums along each.

As in `products`, each has two forms: machine instructions, and `emulated` for the interpreter.
Diagonal w of a tile of 64 queries holds the pairs of query r and key c with c - r + 63 = w.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from posjax.kernels.gpu.plan import ROWS
from posjax.kernels.gpu.registers import (
    address_of,
    constant,
    element,
    i32,
    shared_pointer,
    with_element,
)
from posjax.types import Array, Float, Int

__all__ = ["SUMS", "WIDTH", "add_diagonals", "collect"]

# Rows of partial sums: a thread's two rows of a tile are one, in each of four warps.
SUMS = 32
# Words of such a row: 128 diagonals, and some so that rows in step lie in different banks.
WIDTH = 136
# Diagonal 0 has the last query and the first key.
_LAST = ROWS - 1


def add_diagonals(
    numbers, x: Float[Array, "64 n"], factor: float, *, emulated: bool
) -> Float[Array, "64 n"]:
    """`x * factor`, and the number of its diagonal added to each pair.

    Args:
        numbers: [63 + n or more] in shared memory.
    """
    if emulated:
        return x * factor + numbers[...][_diagonal(x.shape)]
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout), return_type=result)
    def add(ctx, memory, tile):
        del ctx
        row, column = _first_pair(tile)
        words = arith.addi(arith.subi(column, row), constant(_LAST))
        start = arith.addi(address_of(memory), arith.muli(words, constant(4)))
        f32, registers = ir.F32Type.get(), np.empty_like(tile.registers)
        scale = arith.constant(f32, factor)
        for at, down, right in _registers(tile):
            register = tile.registers[at]
            for n in range(2):
                pointer = shared_pointer(arith.addi(start, constant(4 * (right + n - down))))
                value = llvm.intr_fma(element(register, n), scale, llvm.load(f32, pointer))
                register = with_element(register, value, n)
            registers[at] = register
        return mgpu.FragmentedArray(_registers=registers, _layout=tile.layout, _is_signed=None)

    return add(numbers, x)


def collect(sums, x: Float[Array, "64 n"], *, start: int, emulated: bool) -> None:
    """Leaves the sums along the diagonals of a tile in `sums`.

    Row by row they are partial sums, in fixed places, each written by one thread.

    Args:
        sums: [32, 136] in shared memory, 0 if no thread writes there.
        start: how many keys of the same 64 have been collected before this tile; if it is 0, the
            old sums are forgotten.
    """
    if emulated:
        sums[...] = _collected(sums[...], x, start)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA), return_type=None)
    def store(ctx, memory, tile):
        del ctx
        row, column = _first_pair(tile)
        target = arith.addi(
            arith.muli(arith.shrui(row, constant(4)), constant(8)),
            arith.andi(row, constant(7)),
        )
        words = arith.addi(arith.muli(target, constant(WIDTH)), arith.subi(column, row))
        base = arith.addi(address_of(memory), arith.muli(words, constant(4)))
        totals: dict[int, ir.Value] = {}
        for at, down, right in _registers(tile):
            for n in range(2):
                value, diagonal = element(tile.registers[at], n), right + n - down
                before = totals.get(diagonal)
                totals[diagonal] = value if before is None else arith.addf(before, value)
        for diagonal, total in totals.items():
            pointer = shared_pointer(arith.addi(base, constant(4 * (diagonal + start + _LAST))))
            if start and diagonal < 0:
                # The tile on the left has ended on this diagonal, in this thread.
                total = arith.addf(llvm.load(ir.F32Type.get(), pointer), total)
            llvm.store(total, pointer)

    store(sums, x)


def _diagonal(shape: tuple[int, int]) -> Int[Array, "m n"]:
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    return column - row + _LAST


def _collected(sums: Array, x: Array, start: int) -> Array:
    """The same in jnp; all in the first row."""
    row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, WIDTH), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (ROWS, WIDTH), 1) - _LAST - start + row
    inside = (column >= 0) & (column < x.shape[1])
    picked = jnp.take_along_axis(x, jnp.clip(column, 0, x.shape[1] - 1), axis=1)
    total = jnp.sum(jnp.where(inside, picked, 0.0), axis=0, keepdims=True)
    first = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 0) == 0
    return jnp.where(first, total, 0.0) + (sums if start else jnp.zeros_like(sums))


def _first_pair(tile) -> tuple[ir.Value, ir.Value]:
    """Row and column of the first number that this thread holds."""
    first = next(iter(tile.layout.thread_idxs(tile.shape)))
    return tuple(arith.index_cast(i32(), index) for index in first)


def _registers(tile) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Each register of two neighbours, and how far down and right of the first one it lies."""
    strides = tile.layout.tiling.tile_strides((tile.shape[1], 1))
    for at in np.ndindex(tile.registers.shape):
        steps = sum(index * stride for index, stride in zip(at, strides, strict=False))
        yield at, *divmod(steps, tile.shape[1])
