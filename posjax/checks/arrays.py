"""Checks of the shapes and dtypes of arrays."""

from typing import Any

import jax
import jax.numpy as jnp

from posjax.checks.values import either, require
from posjax.types import Array, Shaped

__all__ = ["dtype", "key", "rows", "shape"]


def shape(name: str, array: Shaped, *patterns: tuple[Any, ...], empty: bool = True) -> None:
    """The shape of an array fits one of some patterns.

    Args:
        patterns: an axis is a size, a tuple of sizes of which it must have one, or a name, which is
            any size, but the same wherever it stands in the pattern. `...` at the start is any axes
            before the rest.
        empty: whether axes may be 0.

    >>> shape("mask", jnp.ones((3, 4)), ((1, 2), "keys"))
    Traceback (most recent call last):
    ValueError: mask has shape (3, 4); it must be [1 or 2, keys].
    """
    wanted = either([f"[{', '.join(map(_axis, pattern))}]" for pattern in patterns])
    require(name, array, hasattr(array, "shape"), f"an array {wanted}")
    got = tuple(array.shape)
    if not any(_fits(got, pattern) for pattern in patterns) or (not empty and 0 in got):
        nonzero = "" if empty else ", no axis 0"
        raise ValueError(f"{name} has shape {got}; it must be {wanted}{nonzero}.")


def dtype(name: str, array: Shaped, wanted: Any) -> None:
    """The dtype of an array is of a kind, or one of some.

    Args:
        wanted: `jnp.integer`, `jnp.floating` or `jnp.bool_`, or a tuple of dtypes.

    >>> dtype("positions", jnp.ones(3), jnp.integer)
    Traceback (most recent call last):
    ValueError: positions has dtype float32; it must be an integer type.
    """
    require(name, array, hasattr(array, "dtype"), "an array")
    several = isinstance(wanted, tuple)
    holds = array.dtype in wanted if several else jnp.issubdtype(array.dtype, wanted)
    if not holds:
        words = either([jnp.dtype(one).name for one in wanted]) if several else _DTYPES[wanted]
        raise ValueError(f"{name} has dtype {array.dtype}; it must be {words}.")


_DTYPES = {
    jnp.integer: "an integer type",
    jnp.floating: "a floating-point type",
    jnp.bool_: "bool",
}


def key(name: str, value: Any, wanted: str = "a random key") -> Array:
    """A typed random key of a typed or a raw one."""
    value_dtype = getattr(value, "dtype", None)
    if value_dtype is not None and jnp.issubdtype(value_dtype, jax.dtypes.prng_key):
        shape(name, value, ())
        return value
    raw = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    require(name, value, value_dtype == raw.dtype and value.shape == raw.shape, wanted)
    return jax.random.wrap_key_data(jnp.asarray(value))


def rows(name: str, array: Any, batch: int, length: int) -> Array:
    """An integer for each token, such as its position: [length], [1, length] or [batch, length].

    Returns:
        An array of two axes, the first of them 1 or `batch`.

    >>> rows("positions", [0, 1, 2], batch=2, length=3).shape
    (1, 3)
    """
    array = jnp.asarray(array)
    shape(name, array, (length,), ((1, batch) if batch != 1 else 1, length))
    dtype(name, array, jnp.integer)
    return array[None] if array.ndim == 1 else array


def _fits(got: tuple[int, ...], pattern: tuple[Any, ...]) -> bool:
    if pattern[:1] == (...,):
        pattern = pattern[1:]
        got = got[max(len(got) - len(pattern), 0) :]
    if len(got) != len(pattern):
        return False
    sizes = {}
    for size, axis in zip(got, pattern, strict=True):
        wanted = sizes.setdefault(axis, size) if isinstance(axis, str) else axis
        if size not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            return False
    return True


def _axis(axis: Any) -> str:
    if axis is ...:
        return "..."
    return either(map(str, axis)) if isinstance(axis, tuple) else str(axis)
