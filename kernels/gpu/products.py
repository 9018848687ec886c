"""Products in the matrix units.

Here and in `reciprocals`, `registers`, `look_ups`, `stores` and `diagonals`, steps of the kernels
that Pallas has no name for, or that its interpreter cannot run, have two forms: machine
instructions, and `emulated`, which the interpreter on a CPU runs. The first is checked by
compilers, and by the tests on a GPU; everything around by the interpreter.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.types import Array, Float, Num

__all__ = ["multiply", "multiply_into", "multiply_shared_into", "multiply_transposed_into"]


def multiply(a, b, shape: tuple[int, int]) -> Float[Array, "m n"]:
    """A @ b of two references in shared memory."""

    def compute(total):
        plgpu.wgmma(total, a, b)
        return total[...]

    return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))


def multiply_into(
    total: Float[Array, "m n"], a: Num[Array, "m k"], b, *, emulated: bool
) -> Float[Array, "m n"]:
    """Total + a @ b, with `a` in registers and `b` in shared memory."""
    if emulated:
        return total + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(total))


def multiply_shared_into(
    total: Float[Array, "m n"], a, b, *, emulated: bool
) -> Float[Array, "m n"]:
    """Total + a @ b, both in shared memory."""
    if emulated:
        return total + multiply(a, b, total.shape)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(total))


def multiply_transposed_into(
    total: Float[Array, "m n"], a, b, *, emulated: bool
) -> Float[Array, "m n"]:
    """Total + a^T @ b, both in shared memory."""
    if emulated:
        return total + jnp.dot(a[...].T, b[...], preferred_element_type=jnp.float32)
    multiply = lambda ref: plgpu.wgmma(ref, a.transpose((1, 0)), b)  # noqa: E731
    return pl.run_state(multiply)(plgpu.ACC.init(total))
