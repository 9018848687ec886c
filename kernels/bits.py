"""Numbers as bits, and two numbers in one word."""

import jax
import jax.numpy as jnp

from posjax.types import Array, Float, Int

__all__ = ["as_float", "as_int", "bfloat16_bits", "packed_words"]

_HIGH = -(2**16)
_SIGN = -(2**31)


def as_int(x: Float[Array, "*n"]) -> Int[Array, "*n"]:
    """The bits of float32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def as_float(x: Int[Array, "*n"]) -> Float[Array, "*n"]:
    """The float32 of these bits."""
    return jax.lax.bitcast_convert_type(x, jnp.float32)


def packed_words(whole: Float[Array, "*n"], low: Float[Array, "*n"]) -> Int[Array, "*n"]:
    """Two numbers in one word: itself, read as a float32, and its low half, as a bfloat16."""
    bits, low = as_int(whole), bfloat16_bits(low)
    # The high half is what brings the word nearest to the first number.
    high = jnp.maximum((bits & ~_SIGN) - low + 2**15, 0) & _HIGH
    return (bits & _SIGN) | high | low


def bfloat16_bits(x: Float[Array, "*n"]) -> Int[Array, "*n"]:
    """The bits of the nearest bfloat16, in the low half."""
    return ((as_int(x) + 2**15) >> 16) & (2**16 - 1)
