"""Reciprocals: of one number, and of two neighbouring keys with one instruction.

1 / a = b r and 1 / b = a r with r = 1 / (a b).
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from posjax.kernels.gpu.registers import element, per_element, with_element
from posjax.types import Array, Float

__all__ = ["paired_reciprocal", "reciprocal"]

# Products of two are at most 2^126, whose reciprocal is the least normal number. Gates that are cut
# so are 2^-63 of U, and 0 in half precision either way.
_LARGEST = 2.0**63


def reciprocal(x: Float[Array, "m n"], *, emulated: bool) -> Float[Array, "m n"]:
    """1 / x, good to the last bit but one."""
    if emulated:
        return 1.0 / x
    return per_element(x.shape, outputs=1)(lambda value, row: (_approximate(value),))(x)[0]


def paired_reciprocal(x: Float[Array, "m n"], *, emulated: bool) -> Float[Array, "m n"]:
    """1 / x for x >= 1, at least 2^-63, of columns 2 j and 2 j + 1 together."""
    x = jnp.minimum(x, _LARGEST)
    if emulated:
        pairs = x.reshape(x.shape[0], -1, 2)
        once = 1.0 / (pairs[..., :1] * pairs[..., 1:])
        return (pairs[..., ::-1] * once).reshape(x.shape)
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def invert(ctx, tile):
        del ctx
        registers = np.empty_like(tile.registers)
        for at in np.ndindex(tile.registers.shape):
            registers[at] = _of_pair(tile.registers[at])
        return mgpu.FragmentedArray(_registers=registers, _layout=tile.layout, _is_signed=None)

    return invert(x)


def _of_pair(pair: ir.Value) -> ir.Value:
    """The reciprocals of a register's two neighbours of a row."""
    a, b = (element(pair, n) for n in range(2))
    once = _approximate(arith.mulf(a, b))
    for n, other in enumerate((b, a)):
        pair = with_element(pair, arith.mulf(other, once), n)
    return pair


def _approximate(value: ir.Value) -> ir.Value:
    return llvm.inline_asm(value.type, [value], "rcp.approx.ftz.f32 $0, $1;", "=f,f")
