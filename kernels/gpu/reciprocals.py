"""One reciprocal for two neighbouring keys: 1 / a = b r and 1 / b = a r with r = 1 / (a b)."""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from posjax.kernels.gpu.mlir import element, with_element
from posjax.types import Array, Float

__all__ = ["paired_reciprocal"]

# Products of two are at most 2^126, whose reciprocal is the least normal number. Gates that are cut
# so are 2^-63 of a unit, and 0 in half precision either way.
_LARGEST = 2.0**63


def paired_reciprocal(x: Float[Array, "m n"], *, emulated: bool) -> Float[Array, "m n"]:
    """1 / x for x >= 1, at least 2^-63, of columns 2 j and 2 j + 1 together."""
    x = jnp.minimum(x, _LARGEST)
    if emulated:
        pairs = x.reshape(x.shape[0], -1, 2)
        once = 1.0 / (pairs[..., :1] * pairs[..., 1:])
        return (pairs[..., ::-1] * once).reshape(x.shape)
    return _machine_form(x.shape)(x)


def _machine_form(shape: tuple[int, int]):
    """A register of the layout holds two neighbours of a row."""
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def invert(ctx, x):
        del ctx
        found = np.empty_like(x.registers)
        for at in np.ndindex(x.registers.shape):
            found[at] = _of_pair(x.registers[at])
        return mgpu.FragmentedArray(_registers=found, _layout=x.layout, _is_signed=None)

    return invert


def _of_pair(pair: ir.Value) -> ir.Value:
    """Of a vector of two."""
    a, b = (element(pair, n) for n in range(2))
    once = llvm.inline_asm(a.type, [arith.mulf(a, b)], "rcp.approx.ftz.f32 $0, $1;", "=f,f")
    for n, other in enumerate((b, a)):
        pair = with_element(pair, arith.mulf(other, once), n)
    return pair
