"""Arrays one register (128 lanes) wide, and matrix products."""

import functools
import operator

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from posjax.kernels.tpu.plan import LANES
from posjax.types import Array, Float, Int, Num

__all__ = [
    "NN",
    "NT",
    "TN",
    "broadcast_lanes",
    "chunks",
    "first_lane",
    "from_row",
    "join",
    "lane_gather",
    "last_lane",
    "matmul",
    "pack_words",
    "packed_shape",
    "reduce_lanes",
    "roll_lanes",
    "sum_chunks",
    "to_row",
    "unpack_words",
]

# Which axes a product sums over: a @ b, a @ b.T, a.T @ b.
NN, NT, TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


def matmul(a: Num[Array, "_ _"], b: Num[Array, "_ _"], how: tuple = NN) -> Float[Array, "_ _"]:
    """A product in float32; exact to float32 if the inputs are."""
    exact = a.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, how, precision=precision, preferred_element_type=jnp.float32)


def chunks(x: Num[Array, "t s"]) -> list[Num[Array, "t 128"]]:
    """A tile as registers side by side."""
    return [x[:, start : start + LANES] for start in range(0, x.shape[1], LANES)]


def join(parts: list[Num[Array, "t 128"]]) -> Num[Array, "t s"]:
    """The inverse of `chunks`."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def sum_chunks(parts: list[Float[Array, "t 128"]]) -> Float[Array, "t 128"]:
    """The sum of chunks, lane by lane."""
    return functools.reduce(operator.add, parts)


def broadcast_lanes(x: Float[Array, "t 128"], size: int) -> Float[Array, "t size"]:
    """Numbers that are equal in all lanes, in `size` lanes."""
    whole = join([x] * -(-size // LANES))
    return whole if whole.shape[1] == size else whole[:, :size]


def reduce_lanes(x: Float[Array, "t 128"], reduce) -> Float[Array, "t 128"]:
    """A reduction over the lanes, in every lane."""
    return jnp.broadcast_to(reduce(x, axis=1, keepdims=True), x.shape)


def to_row(x: Num[Array, "t 128"]) -> Num[Array, "1 t"]:
    """Numbers of rows, equal in all lanes, as one row."""
    return jnp.transpose(x)[:1]


def from_row(x: Num[Array, "1 t"]) -> Num[Array, "t 128"]:
    """The inverse of `to_row`."""
    return jnp.transpose(jnp.broadcast_to(x, (LANES, x.shape[1])))


def first_lane(x: Float[Array, "t 128"]) -> Float[Array, "t 128"]:
    """The first lane, in every lane."""
    return jnp.broadcast_to(x[:, :1], x.shape)


def last_lane(x: Float[Array, "t 128"]) -> Float[Array, "t 128"]:
    """The last lane, in every lane."""
    return jnp.broadcast_to(x[:, LANES - 1 :], x.shape)


def lane_gather(x: Num[Array, "t 128"], index: Int[Array, "t 128"]) -> Num[Array, "t 128"]:
    """As jnp.take_along_axis, which would spend operations on negative indices."""
    return jax.lax.gather(
        x,
        index[..., None],
        jax.lax.GatherDimensionNumbers(
            offset_dims=(),
            collapsed_slice_dims=(1,),
            start_index_map=(1,),
            operand_batching_dims=(0,),
            start_indices_batching_dims=(0,),
        ),
        slice_sizes=(1, 1),
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def packed_shape(rows: int, columns: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    """Shape and dtype of `pack_words` of an array."""
    if dtype == jnp.bfloat16:
        return jax.ShapeDtypeStruct((rows // 2, columns), jnp.int32)
    return jax.ShapeDtypeStruct((rows, columns), dtype)


def pack_words(x: Float[Array, "t s"], dtype: jnp.dtype) -> Num[Array, "rows s"]:
    """An array rounded to a dtype; two rows of bfloat16 in a word, as they lie in registers.

    In memory two registers of bfloat16 would lie half in half, and take two loads each.
    """
    x = x.astype(dtype)
    return pltpu.bitcast(x, jnp.int32) if dtype == jnp.bfloat16 else x


def unpack_words(x: Num[Array, "rows s"], dtype: jnp.dtype) -> Num[Array, "t s"]:
    """The inverse of `pack_words`."""
    return pltpu.bitcast(x, dtype) if dtype == jnp.bfloat16 else x


def roll_lanes(x: Num[Array, "t width"], shift: int | Int[Array, ""]) -> Num[Array, "t width"]:
    """Entries moved to `shift` lanes further, in a circle."""
    return pltpu.roll(x, shift, 1)
