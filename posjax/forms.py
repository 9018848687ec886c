"""The forms in which callers give arrays to attention, brought to one: [B, length, heads, size].

`jax.nn.dot_product_attention` also takes inputs without a batch, masks and biases with fewer axes,
and lengths of sequences; Flax has any number of batch axes, and masks of 0.0 and 1.0.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.types import Array, Bool, Int, Num, Shaped

__all__ = [
    "NO_KEY",
    "NO_QUERY",
    "Shape",
    "array_of",
    "batched",
    "broadcastable",
    "known",
    "mask_of",
    "row_of",
    "with_lengths",
]

# Segments of tokens beyond the length of their sequence: no query has that of a key.
NO_QUERY, NO_KEY = -(2**31), -(2**31) + 1


class Shape(NamedTuple):
    """The axes of an attention call; `batch` are those before [length, heads, size]."""

    batch: tuple[int, ...]
    heads: int
    queries: int
    keys: int

    @property
    def sequences(self) -> int:
        """B, the product of the batch axes."""
        return math.prod(self.batch)


def array_of(name: str, x: Any) -> Shaped:
    """An array of what a caller may give for one; shapes and dtypes alone stay as they are."""
    if isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return x
    is_array = isinstance(x, np.ndarray | np.generic | list | tuple | int | float)
    checks.require(name, x, is_array, "an array")
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {x!r}; it must be an array.") from error


def known(x: Any) -> np.ndarray | None:
    """The values of what `array_of` takes; None while a function is traced, and on other machines.

    Numbers of Python and NumPy are known in a trace, too, but not the arrays made of them there.
    """
    absent = jax.core.Tracer | jax.ShapeDtypeStruct
    is_here = lambda part: getattr(part, "is_fully_addressable", True)  # noqa: E731
    if any(isinstance(part, absent) or not is_here(part) for part in jax.tree.leaves(x)):
        return None
    return np.asarray(x)


def batched(x: Num[Array, "*batch T N H"]) -> Num[Array, "B T N H"]:
    """The batch axes as one; one of length 1 if there is none."""
    return reshaped(x, (math.prod(x.shape[:-3]), *x.shape[-3:]))


def reshaped(x: Shaped, shape: tuple[int, ...]) -> Shaped:
    """`x` with another shape, also if there is only a shape."""
    if x.shape == shape:
        return x
    return (
        jax.ShapeDtypeStruct(shape, x.dtype)
        if isinstance(x, jax.ShapeDtypeStruct)
        else x.reshape(shape)
    )


def broadcastable(name: str, x: Array, shape: Shape) -> Num[Array, "#B #N #T #S"]:
    """A mask or bias that broadcasts to [*batch, N, T, S], with four axes.

    Raises:
        ValueError: it does not broadcast.
    """
    full = (*shape.batch, shape.heads, shape.queries, shape.keys)
    if not shape.batch:
        full = (1, *full)  # as in `jax.nn`: four axes for inputs without a batch
    sizes = (1,) * (len(full) - x.ndim) + tuple(x.shape)
    fits = x.ndim <= len(full) and all(a in (1, b) for a, b in zip(sizes, full, strict=True))
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must broadcast to {full} [batch, heads, "
            "queries, keys]."
        )
    batch, rest = sizes[:-3], sizes[-3:]
    if any(size != 1 for size in batch) and batch != full[:-3]:
        x = jnp.broadcast_to(x.reshape(sizes), (*full[:-3], *rest))
    return reshaped(x, (1 if x.size == math.prod(rest) else shape.sequences, *rest))


def mask_of(mask: Any, shape: Shape) -> tuple[Bool[Array, "#B #N #T #S"], Bool[Array, ""] | None]:
    """An explicit mask, and whether each of its numbers is 0 or 1; None if that is known.

    If it is not so, every query sees every key, so that a query of NaN gives NaN.

    Raises:
        ValueError: it does not broadcast to [batch, heads, queries, keys], or has other numbers
            than 0 and 1, as a mask to be added has: that is a bias.
    """
    array = broadcastable("mask", array_of("mask", mask), shape)
    if array.dtype == jnp.bool_:
        return array, None
    numbers = mask if isinstance(mask, np.ndarray) else array
    is_other = (numbers != 0) & (numbers != 1)
    found = known(is_other.any())
    if found:
        other = numbers.reshape(-1)[is_other.reshape(-1).argmax()]
        raise ValueError(
            f"mask holds {other}; it must be True or 1 where a query may attend to a key, and "
            "False or 0 elsewhere (what is added to logits is a bias)."
        )
    if found is not None:
        return array == 1, None
    holds = ~is_other.any()
    return (array == 1) | ~holds, holds


def row_of(name: str, x: Any, shape: Shape, length: int) -> Int[Array, "#B length"]:
    """An integer for each token: [length], [1, length] or [*batch, length].

    Raises:
        ValueError: another shape, or no integers.
    """
    x = array_of(name, x)
    if x.ndim > 2 and x.shape == (*shape.batch, length):
        x = x.reshape(shape.sequences, length)
    return checks.rows(name, x, shape.sequences, length)


def with_lengths(
    segments: tuple[Array | None, Array | None],
    lengths: tuple[Any, Any],
    shape: Shape,
) -> tuple[Array | None, Array | None]:
    """Segment ids of queries and keys that hide tokens beyond the lengths of their sequences.

    Args:
        segments: those that the caller gives.
        lengths: of queries and keys, one for each sequence; None: all are real.
    """
    if all(x is None for x in lengths):
        return segments
    names = ("query_seq_lengths", "key_value_seq_lengths")
    sizes, hidden = (shape.queries, shape.keys), (NO_QUERY, NO_KEY)
    rows = zip(names, segments, lengths, sizes, hidden, strict=True)
    return tuple(_hidden_beyond(*row, shape) for row in rows)


def _hidden_beyond(
    name: str, ids: Array | None, lengths: Any, size: int, hidden: int, shape: Shape
) -> Int[Array, "#B size"]:
    ids = jnp.zeros((1, size), jnp.int32) if ids is None else ids
    if lengths is None:
        return ids
    given, lengths = lengths, array_of(name, lengths)
    checks.shape(name, lengths, *{shape.batch, (shape.sequences,)})
    checks.dtype(name, lengths, jnp.integer)
    values = known(given)
    if values is not None:
        holds = values.size == 0 or (values.min() >= 0 and values.max() <= size)
        checks.require(name, values.tolist(), holds, f"from 0 to {size}, the number of tokens")
    is_real = jnp.arange(size, dtype=jnp.int32)[None] < lengths.reshape(-1, 1)
    return jnp.where(is_real, ids.astype(jnp.int32), hidden)
