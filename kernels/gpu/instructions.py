"""Steps of the kernels that Pallas has no name for, and what its interpreter cannot run.

Each has two forms: machine instructions, and `emulated`, which the interpreter on a CPU runs. The
first is checked by compilers, and by the tests on a GPU; everything around by the interpreter.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from posjax.kernels.bits import as_float, as_int
from posjax.kernels.gpu.mlir import (
    address_of,
    element,
    i32,
    shared_pointer,
    whole,
    with_element,
    wrapped,
)
from posjax.types import Array, Float, Num

__all__ = [
    "MAGIC",
    "ROW_PADDING",
    "column",
    "load",
    "multiply_into",
    "multiply_transposed_into",
    "products",
    "products_into",
    "reciprocal",
    "store_crossings",
    "table_values",
]

# Adding it to a number of less than 2^22 leaves the nearest whole number in the last bits.
MAGIC = 1.5 * 2.0**23
_MAGIC_BITS = 0x4B400000
# Words between the rows of a table beyond its length: rows in step then lie in different banks.
ROW_PADDING = 4


def load(ref, layout) -> Array:
    """A whole reference, in registers of a layout."""
    if jax.__version_info__ < (0, 11):
        return plgpu.load(ref, (), layout=layout, optimized=False)
    return plgpu.load(ref, layout=layout, optimized=False)


def products(a, b, shape: tuple[int, int]) -> Float[Array, "m n"]:
    """A @ b of two references in shared memory."""

    def multiply(total):
        plgpu.wgmma(total, a, b)
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def multiply_into(
    total: Float[Array, "m n"], a: Num[Array, "m k"], b, *, emulated: bool
) -> Float[Array, "m n"]:
    """Total + a @ b, with `a` in registers and `b` in shared memory."""
    if emulated:
        return total + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(total))


def products_into(total: Float[Array, "m n"], a, b, *, emulated: bool) -> Float[Array, "m n"]:
    """Total + a @ b, both in shared memory."""
    if emulated:
        return total + products(a, b, total.shape)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(total))


def multiply_transposed_into(
    total: Float[Array, "m n"], a, b, *, emulated: bool
) -> Float[Array, "m n"]:
    """Total + a^T @ b, both in shared memory."""
    if emulated:
        return total + jnp.dot(a[...].T, b[...], preferred_element_type=jnp.float32)
    multiply = lambda ref: plgpu.wgmma(ref, a.transpose((1, 0)), b)  # noqa: E731
    return pl.run_state(multiply)(plgpu.ACC.init(total))


def reciprocal(x: Float[Array, "m n"], *, emulated: bool) -> Float[Array, "m n"]:
    """1 / x, good to the last bit but one."""
    if emulated:
        return 1.0 / x

    @_per_element(x.shape, arrays=1, outputs=1)
    def inverse(ctx, value, row):
        f32 = ir.F32Type.get()
        return (llvm.inline_asm(f32, [value], "rcp.approx.ftz.f32 $0, $1;", "=f,f"),)

    return inverse(x)[0]


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
        found = np.empty(target.registers_shape(tile.shape[:1]), dtype=object)
        # Eight columns lie in four threads, two in each.
        group, thread, place = index // 8, index % 8 // 2, index % 2
        registers = tile.registers[0, group].reshape(-1)
        for at, register in zip(np.ndindex(found.shape), registers, strict=True):
            value = _from_thread(element(register, place), thread)
            kind = ir.VectorType.get((1,), value.type)
            found[at] = with_element(llvm.mlir_undef(kind), value, 0)
        return mgpu.FragmentedArray(_registers=found, _layout=target, _is_signed=None)

    return pick(x)


def _from_thread(value: ir.Value, number: int) -> ir.Value:
    """The value that this thread's neighbour has, of the four that share rows."""
    code = f"shfl.sync.idx.b32 $0, $1, {number}, 0x1c1f, 0xffffffff;"
    return llvm.inline_asm(value.type, [value], code, "=f,f", has_side_effects=True)


def table_values(
    table, place: Float[Array, "m n"], *, packed: bool, emulated: bool
) -> tuple[Float[Array, "m n"], Float[Array, "m n"], Float[Array, "m n"]]:
    """The bias at each place, its slope, and the place less that of the middle of its bin.

    Args:
        table: [m, words] in shared memory, as `tables` makes them.
        place: counts less 1/2, within the table.
        packed: see `tables`.
    """
    if emulated:
        return _read(table[...], place, packed)

    @_per_element(place.shape, arrays=1, outputs=3, reference=True)
    def look_up(ctx, rows, value, row):
        del ctx
        return _look_up(rows, value, row, packed)

    return look_up(table, place)


def store_crossings(
    slots,
    tables,
    place: Float[Array, "m n"],
    gate: Float[Array, "m n"],
    total: Float[Array, "m n"],
    moment: Float[Array, "m n"],
    *,
    last: float,
    gate_unit: float,
    emulated: bool,
) -> None:
    """Writes (total, moment) to the slot of each bin that has its last key here.

    The next key's place is less by the gate, exactly (see `Contextual.gate_unit`).

    Args:
        slots: [m, words] in shared memory, two words for each bin.
        tables: those of `table_values`; where their entries lie as the slots do, addresses are at
            hand.
        last: the place that greater ones are cut at.
    """
    following = place - gate.astype(jnp.float16).astype(jnp.float32) * gate_unit
    if emulated:
        slots[...] = _crossed(slots[...], place, following, total, moment, last)
        return

    @_per_register(place.shape, references=2, arrays=4)
    def store(slots, known, row, places, followings, *sums):
        entries = [_entry(known, _least(element(places, n), last), row, 8) for n in range(2)]
        further = arith.subi(address_of(slots), address_of(known))
        # A key's right neighbour in the register is the one that follows; then comes another's.
        moved = arith.addf(element(followings, 1), arith.constant(ir.F32Type.get(), MAGIC))
        next_bins = entries[1][1], arith.bitcast(i32(), moved)
        code = "{.reg .pred p; setp.lt.s32 p, $0, $1; @p st.shared.v2.f32 [$2], {$3, $4};}"
        for n, ((pointer, bin_, _), next_bin) in enumerate(zip(entries, next_bins, strict=True)):
            address = arith.addi(llvm.ptrtoint(i32(), pointer), further)
            operands = [next_bin, bin_, address, *(element(x, n) for x in sums)]
            llvm.inline_asm(None, operands, code, "r,r,r,f,f,~{memory}", has_side_effects=True)

    store(slots, tables if tables.shape == slots.shape else slots, place, following, total, moment)


def _least(x: ir.Value, most: float) -> ir.Value:
    return arith.minimumf(x, arith.constant(ir.F32Type.get(), most))


def _crossed(
    slots: Array, place: Array, following: Array, total: Array, moment: Array, last: float
) -> Array:
    """The same in jnp."""
    bin_ = jnp.round(jnp.minimum(place, last))
    bins = jax.lax.broadcasted_iota(jnp.float32, (1, 1, slots.shape[1] // 2), 2)
    here = (jnp.round(following) < bin_)[:, :, None] & (bin_[:, :, None] == bins)
    written = jnp.any(here, axis=1)
    pick = lambda x: jnp.sum(jnp.where(here, x[:, :, None], 0.0), axis=1)  # noqa: E731
    found = jnp.stack([pick(total), pick(moment)], axis=-1).reshape(slots.shape)
    return jnp.where(jnp.repeat(written, 2, axis=1), found, slots)


def _read(table: Array, place: Array, packed: bool) -> tuple[Array, Array, Array]:
    """The same in jnp."""
    whole = jnp.round(place)
    bin_, fraction = whole.astype(jnp.int32), place - whole
    if packed:
        word = jnp.take_along_axis(table, bin_, axis=1)
        slope = as_float(as_int(word) << 16)
        return word + fraction * slope, slope, fraction
    offset = jnp.take_along_axis(table, 2 * bin_, axis=1)
    slope = jnp.take_along_axis(table, 2 * bin_ + 1, axis=1)
    return offset + place * slope, slope, fraction


def _look_up(rows, place: ir.Value, row: ir.Value, packed: bool) -> tuple[ir.Value, ...]:
    """One place: its address from the bits of place + MAGIC, one load, one or two fused sums."""
    size = 4 if packed else 8
    pointer, _, fraction = _entry(rows, place, row, size)
    f32, fma = ir.F32Type.get(), llvm.intr_fma
    if packed:
        word = llvm.load(f32, pointer)
        bits = arith.shli(arith.bitcast(i32(), word), whole(16))
        slope = arith.bitcast(f32, bits)
        return fma(fraction, slope, word), slope, fraction
    pair = llvm.load(ir.VectorType.get((2,), f32), pointer, alignment=8)
    offset, slope = (element(pair, n) for n in range(2))
    return fma(place, slope, offset), slope, fraction


def _entry(rows, place: ir.Value, row: ir.Value, size: int) -> tuple[ir.Value, ...]:
    """Where the entry of a place is, of `size` bytes; its bin in bits; where in it the place is."""
    stride = ir.MemRefType(rows.type).shape[-1] * 4
    start = arith.addi(address_of(rows), whole(wrapped(-size * _MAGIC_BITS)))
    start = arith.addi(start, arith.muli(arith.index_cast(i32(), row), whole(stride)))
    magic = arith.constant(ir.F32Type.get(), MAGIC)
    moved = arith.addf(place, magic)
    bin_ = arith.bitcast(i32(), moved)
    address = arith.addi(start, arith.muli(bin_, whole(size)))
    fraction = arith.subf(place, arith.subf(moved, magic))
    return shared_pointer(address), bin_, fraction


def _per_element(
    shape: tuple[int, int], *, arrays: int, outputs: int, reference: bool = False
) -> Callable[..., Callable[..., tuple[Array, ...]]]:
    """A decorator: a function of one number (of each array) and its row becomes one of arrays."""
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)

    def decorate(function):
        @plgpu.inline_mgpu(
            arg_types=(*[plgpu.RefType()] * reference, *[layout] * arrays),
            return_type=(result,) * outputs if outputs else None,
        )
        def run(ctx, *operands):
            taken = functools.partial(function, ctx, *operands[:reference])
            found = tuple(_map_registers(taken, operands[reference:], outputs))
            return found or None

        return run

    return decorate


def _per_register(
    shape: tuple[int, int], *, references: int, arrays: int
) -> Callable[..., Callable[..., None]]:
    """A decorator: a function of references, a row and its registers becomes one of arrays."""
    layout = plgpu.Layout.WGMMA
    kinds = (*[plgpu.RefType()] * references, *[layout] * arrays)

    def decorate(function):
        @plgpu.inline_mgpu(arg_types=kinds, return_type=None)
        def run(ctx, *operands):
            del ctx
            known, taken = operands[:references], operands[references:]
            for (row, _), at in _places(taken[0]):
                function(*known, row, *(x.registers[at] for x in taken))

        return run

    return decorate


def _places(array) -> zip:
    """Row and column of each register's first number, and its index."""
    places = array.layout.thread_idxs(array.shape)
    return zip(places, np.ndindex(array.registers.shape), strict=True)


def _map_registers(function, arrays, outputs: int) -> list:
    """The function on every number that this thread holds."""
    first = arrays[0]
    found = [np.empty_like(first.registers) for _ in range(outputs)]
    for (row, _), at in _places(first):
        kind = first.registers[at].type
        results = [llvm.mlir_undef(kind) for _ in range(outputs)]
        for n in range(ir.VectorType(kind).shape[0]):
            values = function(*(element(x.registers[at], n) for x in arrays), row)
            results = [
                with_element(old, value, n) for value, old in zip(values, results, strict=True)
            ]
        for target, result in zip(found, results, strict=True):
            target[at] = result
    make = functools.partial(mgpu.FragmentedArray, _layout=first.layout, _is_signed=None)
    return [make(_registers=registers) for registers in found]
