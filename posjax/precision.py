"""The precision that is computed in: float32, or float64 for float64 inputs."""

import jax.numpy as jnp

from posjax.types import Array, Float, Num

__all__ = ["wide", "wide_type"]


def wide_type(*dtypes: jnp.dtype) -> jnp.dtype:
    """float64 if one of the dtypes is; else float32.

    >>> wide_type(jnp.bfloat16, jnp.int32).name
    'float32'
    """
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)


def wide(x: Num[Array, "*any"]) -> Float[Array, "*any"]:
    """`x` in float32, or as it is if it is float64."""
    return x.astype(wide_type(x.dtype))
