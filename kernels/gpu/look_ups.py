"""Tables in shared memory: values at the places of a tile, and sums that go to slots.

As in `products`, each step has two forms: machine instructions, and `emulated` for the interpreter.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from posjax.kernels.bits import as_float, as_int
from posjax.kernels.gpu.registers import (
    address_of,
    constant,
    element,
    i32,
    per_element,
    register_places,
    shared_pointer,
    wrapped,
)
from posjax.types import Array, Float

__all__ = ["store_crossings", "table_values"]

# Adding it to a number of less than 2^22 leaves the nearest whole number in the last bits.
_MAGIC = 1.5 * 2.0**23
_MAGIC_BITS = 0x4B400000


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

    @per_element(place.shape, outputs=3, references=1)
    def look_up(rows, value, row):
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
    last_place: float,
    gate_quantum: float,
    emulated: bool,
) -> None:
    """Writes (total, moment) to the slot of each bin that has its last key here.

    The next key's place is less by the gate, exactly (see `CopePlan.gate_quantum`).

    Args:
        slots: [m, words] in shared memory, two words for each bin.
        tables: those of `table_values`; if their entries lie as the slots do, addresses are known
            already.
        last_place: greater ones are cut to it.
    """
    following = place - gate.astype(jnp.float16).astype(jnp.float32) * gate_quantum
    if emulated:
        slots[...] = _crossed(slots[...], place, following, total, moment, last_place)
        return
    known = tables if tables.shape == slots.shape else slots
    kinds = (*[plgpu.RefType()] * 2, *[plgpu.Layout.WGMMA] * 4)

    @plgpu.inline_mgpu(arg_types=kinds, return_type=None)
    def store(ctx, slots, known, *arrays):
        del ctx
        for (row, _), at in register_places(arrays[0]):
            registers = (array.registers[at] for array in arrays)
            _store_register(slots, known, row, *registers, last_place=last_place)

    store(slots, known, place, following, total, moment)


def _store_register(
    slots, known, row: ir.Value, places: ir.Value, followings: ir.Value, *sums: ir.Value,
    last_place: float,
) -> None:  # fmt: skip
    """Writes the sums of two neighbours of a row, each if the next key lies in a lower bin."""
    entries = [_entry(known, _least(element(places, n), last_place), row, 8) for n in range(2)]
    further = arith.subi(address_of(slots), address_of(known))
    # A key's right neighbour in the register is the one that follows; then comes another's.
    moved = arith.addf(element(followings, 1), arith.constant(ir.F32Type.get(), _MAGIC))
    next_bins = entries[1][1], arith.bitcast(i32(), moved)
    code = "{.reg .pred p; setp.lt.s32 p, $0, $1; @p st.shared.v2.f32 [$2], {$3, $4};}"
    for n, ((pointer, bin_, _), next_bin) in enumerate(zip(entries, next_bins, strict=True)):
        address = arith.addi(llvm.ptrtoint(i32(), pointer), further)
        operands = [next_bin, bin_, address, *(element(x, n) for x in sums)]
        llvm.inline_asm(None, operands, code, "r,r,r,f,f,~{memory}", has_side_effects=True)


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
    sums = jnp.stack([pick(total), pick(moment)], axis=-1).reshape(slots.shape)
    return jnp.where(jnp.repeat(written, 2, axis=1), sums, slots)


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
    """One place: its address from the bits of place + _MAGIC, one load, one or two fused sums."""
    size = 4 if packed else 8
    pointer, _, fraction = _entry(rows, place, row, size)
    f32, fma = ir.F32Type.get(), llvm.intr_fma
    if packed:
        word = llvm.load(f32, pointer)
        bits = arith.shli(arith.bitcast(i32(), word), constant(16))
        slope = arith.bitcast(f32, bits)
        return fma(fraction, slope, word), slope, fraction
    pair = llvm.load(ir.VectorType.get((2,), f32), pointer, alignment=8)
    offset, slope = (element(pair, n) for n in range(2))
    return fma(place, slope, offset), slope, fraction


def _entry(rows, place: ir.Value, row: ir.Value, size: int) -> tuple[ir.Value, ...]:
    """Pointer to the entry of a place, of `size` bytes; bits that tell the bin; the fraction."""
    stride = ir.MemRefType(rows.type).shape[-1] * 4
    start = arith.addi(address_of(rows), constant(wrapped(-size * _MAGIC_BITS)))
    start = arith.addi(start, arith.muli(arith.index_cast(i32(), row), constant(stride)))
    magic = arith.constant(ir.F32Type.get(), _MAGIC)
    moved = arith.addf(place, magic)
    bin_ = arith.bitcast(i32(), moved)
    address = arith.addi(start, arith.muli(bin_, constant(size)))
    fraction = arith.subf(place, arith.subf(moved, magic))
    return shared_pointer(address), bin_, fraction
