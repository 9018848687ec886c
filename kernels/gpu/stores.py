"""Stores without the barriers that Pallas puts before and after each one, and the barriers alone.

As in `products`, each has a form that is `emulated` for the interpreter. If a warpgroup reads what
it has stored, it is the caller who waits.
"""

import functools

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from posjax.kernels.gpu.layout import row_layout, tiled
from posjax.kernels.gpu.registers import constant, element, i32
from posjax.types import Array, Bool, Float, Num

__all__ = ["all_reach", "store", "store_matrix", "warpgroup_barrier"]


def store(ref, x: Num[Array, "..."], layout, *, emulated: bool) -> None:
    """Writes registers of a layout to memory without a swizzle."""
    if emulated:
        ref[...] = x
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout), return_type=None)
    def write(ctx, target, values):
        del ctx
        values.store_untiled(target, optimized=False)

    write(ref, x)


def store_matrix(ref, x: Num[Array, "m n"], *, swizzle: int, emulated: bool) -> None:
    """Writes an operand of matrix instructions to shared memory that `layout.matrix` made.

    Before, the warpgroup needs a `warpgroup_barrier` if it may still read the old contents;
    afterwards it has to commit.
    """
    if emulated:
        ref[...] = x
        return
    kinds = (plgpu.RefType(tiled(x.dtype, swizzle)), plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=kinds, return_type=None)
    def write(ctx, target, values):
        del ctx
        values.store_tiled(target, swizzle=swizzle)

    write(ref, x)


def warpgroup_barrier(*, emulated: bool) -> None:
    """Waits for all warps of the warpgroup."""
    if emulated:
        return

    @plgpu.inline_mgpu(arg_types=(), return_type=None)
    def wait(ctx):
        del ctx
        mgpu.warpgroup_barrier()

    wait()


def all_reach(x: Float[Array, "64"], least: float, *, emulated: bool) -> Bool[Array, ""]:
    """Whether every query's number is at least `least`: one barrier that asks all threads."""
    if emulated:
        return jnp.min(x) >= least
    result = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(row_layout(),), return_type=result)
    def ask(ctx, numbers):
        del ctx
        registers = [element(register, 0) for register in numbers.registers.flat]
        lowest = functools.reduce(arith.minimumf, registers)
        limit = arith.constant(ir.F32Type.get(), least)
        # Barriers 1 and 2 are those of the warpgroups, as in `mgpu.warpgroup_barrier`.
        barrier = arith.addi(mgpu.utils.warpgroup_idx(sync=False), constant(1))
        # From the shuffle ptxas learns that a warp has one answer, and copies no accumulators.
        code = (
            "{.reg .pred p, q; .reg .s32 own; setp.ge.f32 p, $1, $2; "
            "barrier.cta.red.and.aligned.pred q, $3, 128, p; selp.s32 own, 1, 0, q; "
            "shfl.sync.idx.b32 $0, own, 0, 0x1f, 0xffffffff;}"
        )
        operands = [lowest, limit, barrier]
        answer = llvm.inline_asm(i32(), operands, code, "=r,f,f,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(answer, (), is_signed=True)

    return ask(x) != 0
