"""Wrong values for an argument, by its annotation."""

import collections.abc
import math
import typing
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.fuzzing.targets import is_array, without_none

NAN = float("nan")


def bad_values(annotation: Any, right: Any, default: Any) -> Iterator[tuple[str, Any]]:
    """Wrong values for an argument, each with its kind."""
    kind, optional = without_none(annotation)
    yield "object", object()
    if not (optional or default is None or kind is Any):
        yield "none", None
    if is_array(kind):
        kinds = typing.get_args(annotation)
        takes_bools = any("bool" in getattr(one, "dtypes", ()) for one in kinds)
        yield from _bad_arrays(kind, right, takes_bools)
        return
    if kind is bool:
        yield from (("text", "False"), ("0", 0), ("1", 1), ("nan", NAN))
        return
    origin = typing.get_origin(kind)
    if kind in (int, float):
        yield from (("text", "abc"), ("nan", NAN), ("inf", math.inf), ("bool", True))
        yield from (("0", 0), ("-1", -1), ("huge", 10**9), ("array", np.ones((2, 3))))
        if kind is int:
            yield "fraction", 1.5
    elif origin is tuple or isinstance(right, tuple | list):
        yield from (("number", 5), ("text", "abc"), ("nan inside", (NAN,)))
        yield from (("bool inside", (True,)), ("none inside", (None,)), ("empty", ()))
        if typing.get_args(kind)[:1] == (int,):
            yield from (("0 inside", (0,)), ("-1 inside", (-1,)), ("huge inside", (10**9,)))
    elif origin is typing.Literal:
        yield from (("text", "abc"), ("bool", True), ("fraction", 1.5), ("nan", NAN))
    elif kind is str:
        yield from (("number", 3), ("bool", True), ("nan", NAN))
    elif origin is collections.abc.Callable or isinstance(kind, type):
        yield from (("text", "abc"), ("number", 3), ("bool", True))


def _bad_arrays(kind: Any, right: Any, takes_bools: bool) -> Iterator[tuple[str, Any]]:
    yield from (("text", "abc"), ("nan", NAN))
    if not hasattr(right, "shape") or not hasattr(kind, "dim_str"):
        return
    axes = kind.dim_str.split()
    if not any(axis.startswith("*") for axis in axes):
        yield "rank + 1", jnp.stack([right] * 3)
        if right.ndim:
            yield "rank - 1", right[0]
    if right.ndim:
        yield "size", jnp.concatenate([right] * 3, axis=-1)[..., :-1]
        yield "first size", jnp.concatenate([right] * 3, axis=0)
    if right.dtype == bool:
        yield from (("floats", right.astype(jnp.float32)), ("integers", right.astype(jnp.int32)))
        return
    if not takes_bools:
        yield "bools", right.astype(bool)
    yield "complex", right.astype(jnp.complex64)
    if jnp.issubdtype(right.dtype, jnp.integer) and "float32" not in str(kind.dtypes):
        yield "floats", right.astype(jnp.float32) + 0.5
    if jnp.issubdtype(right.dtype, jnp.floating):
        yield "nans", jnp.full_like(right, NAN)
