"""Stores without the barriers that Pallas puts before and after each one.

As `instructions`, each has a form that is `emulated` for the interpreter. Where a warpgroup reads
what it has stored, it is the caller who waits.
"""

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.gpu.layout import row_layout, tiled
from posjax.types import Array, Num

__all__ = ["meet", "store_matrix", "store_row"]


def store_row(ref, x: Num[Array, "64"], *, emulated: bool) -> None:
    """Writes a number for each query to global memory, where this kernel does not read it."""
    if emulated:
        ref[...] = x
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), row_layout()), return_type=None)
    def store(ctx, target, values):
        del ctx
        values.store_untiled(target, optimized=False)

    store(ref, x)


def store_matrix(ref, x: Num[Array, "m n"], *, swizzle: int, emulated: bool) -> None:
    """Writes an operand of matrix instructions to shared memory that `layout.matrix` made.

    The warpgroup has to `meet` before, if it may still read what was there, and to commit what it
    has written afterwards.
    """
    if emulated:
        ref[...] = x
        return
    kinds = (plgpu.RefType(tiled(x.dtype, swizzle)), plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=kinds, return_type=None)
    def store(ctx, target, values):
        del ctx
        values.store_tiled(target, swizzle=swizzle)

    store(ref, x)


def meet(*, emulated: bool) -> None:
    """Waits for all warps of the warpgroup."""
    if emulated:
        return

    @plgpu.inline_mgpu(arg_types=(), return_type=None)
    def wait(ctx):
        del ctx
        mgpu.warpgroup_barrier()

    wait()
