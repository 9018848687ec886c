"""Numbers, registers and addresses as MLIR writes them."""

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

__all__ = [
    "address_of",
    "element",
    "i32",
    "shared_pointer",
    "whole",
    "with_element",
    "wrapped",
]

# Its number for shared memory.
_SHARED = 3


def i32() -> ir.Type:
    """Whole numbers of 32 bits."""
    return ir.IntegerType.get_signless(32)


def whole(n: int) -> ir.Value:
    """A constant."""
    return arith.constant(i32(), n)


def wrapped(n: int) -> int:
    """As a signed number of 32 bits."""
    return (n + 2**31) % 2**32 - 2**31


def address_of(rows) -> ir.Value:
    """Where a reference begins in shared memory."""
    return llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(rows))


def shared_pointer(address: ir.Value) -> ir.Value:
    """Into shared memory, from its address."""
    return llvm.inttoptr(llvm.PointerType.get(_SHARED), address)


def element(x: ir.Value, n: int) -> ir.Value:
    """Number `n` of a register."""
    return vector.extract(x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([n]))


def with_element(x: ir.Value, value: ir.Value, n: int) -> ir.Value:
    """A register with another number `n`."""
    place = ir.DenseI64ArrayAttr.get([n])
    return vector.insert(value, x, dynamic_position=[], static_position=place)
