"""Shared memory, barriers, and how the kernels are started."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.gpu.plan import GROUPS, ROWS
from posjax.kernels.platforms import gpu_interpreter
from posjax.types import Array, Num

__all__ = [
    "Barriers",
    "Refs",
    "fits",
    "launch",
    "matrix",
    "per_row",
    "row_layout",
    "share_registers",
    "tiled",
    "with_barriers",
]

# References by name.
Refs = dict
# Bytes of shared memory of a Hopper SM that a block may take, less what barriers and sums take.
_ROOM = (227 - 3) * 1024
# Where arrays in it begin.
_ALIGNMENT = 1024


@dataclasses.dataclass(frozen=True)
class Barriers:
    """`count` barriers, each passed after `arrivals`."""

    count: int
    arrivals: int = 1

    def make(self) -> Any:
        """As Pallas wants it."""
        return plgpu.Barrier(num_arrivals=self.arrivals, num_barriers=self.count)


def matrix(shape: tuple[int, ...], dtype: Any, swizzle: int = 128) -> Any:
    """Shared memory for operands of matrix instructions.

    Args:
        swizzle: bytes within which hardware shuffles it, so that the rows of a tile do not meet in
            a bank; no more than a tile has keys.
    """
    return plgpu.SMEM(shape, dtype, transforms=tiled(dtype, swizzle))


def tiled(dtype: Any, swizzle: int) -> tuple:
    """How `matrix` lies in memory."""
    columns = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)


def row_layout():
    """Layout of a number for each query."""
    return plgpu.Layout.WGMMA.reduce(1)


def per_row(value: float | Array, dtype: Any = jnp.float32) -> Num[Array, "64"]:
    """The same number for each query."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, dtype), row_layout())


def with_barriers(*, own: dict, constants: dict, passing: dict, groups: int = GROUPS) -> dict:
    """Shared memory, and the barriers that tell when it is full, and when it is free again.

    Args:
        own: each warpgroup's part, first axis.
        constants: what all share.
        passing: rings, first axis the stages.
    """
    shapes = own | constants | passing
    count = {name: 1 for name in constants} | {
        name: x.shape[0] for name, x in (own | passing).items()
    }
    full = {f"{name}_full": Barriers(count[name]) for name in shapes}
    free = {f"{name}_free": Barriers(count[name], arrivals=groups) for name in passing}
    return shapes | full | free


def fits(scratch: dict) -> bool:
    """Whether there is as much shared memory."""
    return _shared_bytes(scratch) <= _ROOM


def _shared_bytes(scratch: dict) -> int:
    arrays = [x for x in scratch.values() if not isinstance(x, Barriers)]
    sizes = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


def share_registers(groups: int, *, computes: bool) -> None:
    """Moves registers from the warpgroup that fetches to those that compute.

    With one of each there are as many for both as a thread can name.
    """
    if groups == GROUPS and computes:
        plgpu.set_max_registers(240, action="increase")
    elif groups == GROUPS:
        plgpu.set_max_registers(24, action="decrease")


def launch(
    kernel: Callable[[Refs, Refs], None],
    inputs: dict[str, Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    *,
    grid: dict[str, int],
    scratch: dict,
    name: str,
    groups: int = GROUPS,
) -> dict[str, Array]:
    """Runs `kernel(references, scratch)` with the axis "group" for the warpgroups.

    Raises:
        ValueError: more shared memory than there is.
    """
    if not fits(scratch):
        raise ValueError(
            f"{name} needs {_shared_bytes(scratch):,} bytes of shared memory of {_ROOM:,}; take "
            "fewer keys or stages (kernels.blocks.GpuBlocks)."
        )
    names = [*inputs, *outputs]
    made = {n: x.make() if isinstance(x, Barriers) else x for n, x in scratch.items()}

    def body(*refs):
        named = dict(zip(names, refs, strict=True))
        pl.run_scoped(lambda **scratch: kernel(named, scratch), collective_axes="group", **made)

    run = plgpu.kernel(
        body,
        out_type=list(outputs.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=gpu_interpreter(),
        kernel_name=name,
    )
    return dict(zip(outputs, run(*inputs.values()), strict=True))
