"""Arrays in registers; numbers, registers and addresses in MLIR."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from posjax.types import Array, Float

__all__ = [
    "address_of",
    "column",
    "constant",
    "element",
    "i32",
    "load",
    "per_element",
    "register_places",
    "shared_pointer",
    "with_element",
    "wrapped",
]

# MLIR's number for shared memory.
_SHARED = 3


def i32() -> ir.Type:
    """The type of whole numbers of 32 bits."""
    return ir.IntegerType.get_signless(32)


def constant(n: int) -> ir.Value:
    """A constant of 32 bits."""
    return arith.constant(i32(), n)


def wrapped(n: int) -> int:
    """The signed number with the same 32 bits."""
    return (n + 2**31) % 2**32 - 2**31


def address_of(rows) -> ir.Value:
    """The address of a reference in shared memory."""
    return llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(rows))


def shared_pointer(address: ir.Value) -> ir.Value:
    """A pointer into shared memory."""
    return llvm.inttoptr(llvm.PointerType.get(_SHARED), address)


def element(x: ir.Value, n: int) -> ir.Value:
    """Number `n` of a register."""
    return vector.extract(x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([n]))


def with_element(x: ir.Value, value: ir.Value, n: int) -> ir.Value:
    """A register with another number `n`."""
    place = ir.DenseI64ArrayAttr.get([n])
    return vector.insert(value, x, dynamic_position=[], static_position=place)


def load(ref, layout) -> Array:
    """A whole reference, in registers of a layout."""
    if jax.__version_info__ < (0, 11):
        return plgpu.load(ref, (), layout=layout, optimized=False)
    return plgpu.load(ref, layout=layout, optimized=False)


def column(x: Float[Array, "64 n"], index: int, *, emulated: bool) -> Float[Array, "64"]:
    """One column, for every thread that has a part of a row."""
    if emulated:
        return x[:, index]
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(x.shape[:1], jnp.float32, layout=layout.reduce(1))

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def pick(ctx, tile):
        del ctx
        target = result.layout.to_mgpu()
        registers = np.empty(target.registers_shape(tile.shape[:1]), dtype=object)
        # Eight columns lie in four threads, two in each.
        group, thread, place = index // 8, index % 8 // 2, index % 2
        taken = tile.registers[0, group].reshape(-1)
        for at, register in zip(np.ndindex(registers.shape), taken, strict=True):
            value = _from_thread(element(register, place), thread)
            kind = ir.VectorType.get((1,), value.type)
            registers[at] = with_element(llvm.mlir_undef(kind), value, 0)
        return mgpu.FragmentedArray(_registers=registers, _layout=target, _is_signed=None)

    return pick(x)


def _from_thread(value: ir.Value, number: int) -> ir.Value:
    """The value that this thread's neighbour has, of the four that share rows."""
    code = f"shfl.sync.idx.b32 $0, $1, {number}, 0x1c1f, 0xffffffff;"
    return llvm.inline_asm(value.type, [value], code, "=f,f", has_side_effects=True)


def per_element(
    shape: tuple[int, int], *, outputs: int, references: int = 0
) -> Callable[..., Callable[..., tuple[Array, ...]]]:
    """A decorator: a function of references, a number and its row becomes one of an array.

    Args:
        outputs: how many numbers the function gives.
    """
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)

    def decorate(function):
        @plgpu.inline_mgpu(
            arg_types=(*[plgpu.RefType()] * references, layout), return_type=(result,) * outputs
        )
        def run(ctx, *operands):
            del ctx
            *known, array = operands
            return tuple(_map_registers(functools.partial(function, *known), array, outputs))

        return run

    return decorate


def register_places(array: mgpu.FragmentedArray) -> zip:
    """Row and column of each register's first number, and the register's index."""
    places = array.layout.thread_idxs(array.shape)
    return zip(places, np.ndindex(array.registers.shape), strict=True)


def _map_registers(function, array, outputs: int) -> list[mgpu.FragmentedArray]:
    """Applies the function to every number that this thread holds."""
    results = [np.empty_like(array.registers) for _ in range(outputs)]
    for (row, _), at in register_places(array):
        register = array.registers[at]
        made = [llvm.mlir_undef(register.type) for _ in range(outputs)]
        for n in range(ir.VectorType(register.type).shape[0]):
            values = function(element(register, n), row)
            made = [with_element(old, value, n) for value, old in zip(values, made, strict=True)]
        for result, one in zip(results, made, strict=True):
            result[at] = one
    make = functools.partial(mgpu.FragmentedArray, _layout=array.layout, _is_signed=None)
    return [make(_registers=registers) for registers in results]
