"""Shared memory, barriers, and how the kernels are started."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.gpu.plan import GROUPS, ROWS
from posjax.kernels.interpreters import gpu_interpreter
from posjax.types import Array, Num
from posjax.varying import alike, varying_like

__all__ = [
    "Buffer",
    "fits",
    "launch",
    "matrix",
    "per_row",
    "present",
    "row_layout",
    "share_registers",
    "tiled",
]

_Outputs = TypeVar("_Outputs", bound=tuple)
# Bytes of shared memory of a Hopper SM that a block may take, less those of barriers and sums.
_AVAILABLE = (227 - 3) * 1024
# Arrays in it begin at multiples of it.
_ALIGNMENT = 1024


class Buffer(NamedTuple):
    """Shared memory with its barriers: types for `launch`, references in a kernel.

    `full` tells that a transfer has arrived; `free`, only in a ring, that all warpgroups are done.
    """

    array: Any
    free: Any
    full: Any

    @classmethod
    def own(cls, array: Any) -> "Buffer":
        """Each warpgroup has its own part, first axis, with its own barrier."""
        return cls(array, None, plgpu.Barrier(num_barriers=array.shape[0]))

    @classmethod
    def constant(cls, array: Any) -> "Buffer":
        """All warpgroups read it; it is filled once."""
        return cls(array, None, plgpu.Barrier(num_barriers=1))

    @classmethod
    def ring(cls, array: Any, readers: int) -> "Buffer":
        """Stages, first axis, each of which `readers` warpgroups read."""
        stages = array.shape[0]
        free = plgpu.Barrier(num_arrivals=readers, num_barriers=stages)
        return cls(array, free, plgpu.Barrier(num_barriers=stages))


def present(*optional: Any) -> tuple:
    """All that is not None."""
    return tuple(x for x in optional if x is not None)


def matrix(shape: tuple[int, ...], dtype: Any, swizzle: int = 128) -> Any:
    """Shared memory for operands of matrix instructions.

    Args:
        swizzle: bytes within which hardware shuffles it, so that the rows of a tile do not meet in
            a bank; no more than a tile has keys.
    """
    return plgpu.SMEM(shape, dtype, transforms=tiled(dtype, swizzle))


def tiled(dtype: Any, swizzle: int) -> tuple:
    """The transforms of `matrix`."""
    columns = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)


def row_layout():
    """Layout of a number for each query."""
    return plgpu.Layout.WGMMA.reduce(1)


def per_row(value: float | Array, dtype: Any = jnp.float32) -> Num[Array, "64"]:
    """The same number for each query."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, dtype), row_layout())


def fits(scratch: Any) -> bool:
    """Whether there is enough shared memory."""
    return _shared_bytes(scratch) <= _AVAILABLE


def _shared_bytes(scratch: Any) -> int:
    arrays = [x for x in jax.tree.leaves(scratch) if not isinstance(x, plgpu.Barrier)]
    sizes = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


def share_registers(groups: int, *, computes: bool) -> None:
    """Moves registers from the warpgroup that fetches to those that compute.

    A single one that computes has enough without: as many as an instruction can name.
    """
    if groups == GROUPS and computes:
        plgpu.set_max_registers(240, action="increase")
    elif groups == GROUPS:
        plgpu.set_max_registers(24, action="decrease")


def launch(
    kernel: Callable[..., None],
    inputs: tuple,
    outputs: _Outputs,
    *,
    grid: dict[str, int],
    scratch: Any,
    name: str,
    groups: int = GROUPS,
) -> _Outputs:
    """Runs `kernel(*inputs, outputs, scratch)` with the axis "group" for the warpgroups.

    The kernel gets references in the same types. Memory is laid out in the order of the fields.

    Args:
        inputs: named tuples of arrays.
        outputs: a named tuple of shapes and dtypes.
        scratch: a tree of types of memory and barriers.

    Raises:
        ValueError: more shared memory than there is.
    """
    if not fits(scratch):
        raise ValueError(
            f"{name} needs {_shared_bytes(scratch):,} bytes of shared memory of {_AVAILABLE:,}; "
            "take fewer keys or stages (kernels.blocks.GpuBlocks)."
        )
    arrays, inputs_tree = jax.tree.flatten(alike(inputs))
    shapes, outputs_tree = jax.tree.flatten(outputs)

    def body(*references):
        read = jax.tree.unflatten(inputs_tree, references[: len(arrays)])
        written = jax.tree.unflatten(outputs_tree, references[len(arrays) :])
        run = lambda scratch: kernel(*read, written, scratch)  # noqa: E731
        pl.run_scoped(run, scratch, collective_axes="group")

    run = plgpu.kernel(
        body,
        out_type=varying_like(arrays, shapes),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=gpu_interpreter(),
        kernel_name=name,
    )
    return jax.tree.unflatten(outputs_tree, run(*arrays))
