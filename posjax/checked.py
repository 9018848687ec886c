"""Checks of all arguments of a function by their annotations.

Array annotations give shape and dtype, with one size for each axis letter across all arguments of a
call. Other annotations are read as `checks.fields` reads those of a dataclass.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.checks import Limits

__all__ = ["WIDEST", "checked"]

# The largest number of channels or heads that a function builds a row of numbers for.
WIDEST = 2**20

_Function = TypeVar("_Function", bound=Callable[..., Any])


def checked(**limits: Limits) -> Callable[[_Function], _Function]:
    """A decorator: arguments have the types of their annotations, and keep to limits.

    Every refusal is a ValueError that names the argument, its value, and what it must be.

    Args:
        limits: ranges of numbers by the name of the argument.

    >>> from posjax.types import Array, Num
    >>> @checked(width=checks.at_least(1))
    ... def widened(x: Num[Array, "B T"], width: int):
    ...     return jnp.repeat(x, width, axis=1)
    >>> widened(jnp.ones((1, 2)), 0)
    Traceback (most recent call last):
    ValueError: width is 0; it must be at least 1.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        kinds = {name: _kind_of(p.annotation) for name, p in signature.parameters.items()}

        @functools.wraps(function)
        def call(*arguments, **named):
            bound = signature.bind(*arguments, **named)
            bound.apply_defaults()
            sizes: dict[str, Any] = {}
            for name, value in bound.arguments.items():
                kinds[name].check(name, value, limits.get(name), sizes)
            return function(*arguments, **named)

        return call

    return decorate


class _Kind(NamedTuple):
    """What an annotation asks for: an array, something else, either, or None, too."""

    array: Any
    other: Callable[[str, Any, Limits, bool], None] | None
    optional: bool

    def check(self, name: str, value: Any, limits: Limits | None, sizes: dict[str, Any]) -> None:
        """Checks one argument; adds the sizes of its axes to `sizes`."""
        if value is None and self.optional:
            return
        takes_arrays = self.array is not None
        if takes_arrays and (_is_array(value) or self.other is None):
            _check_array(name, value, self.array, sizes, self.optional)
        elif self.other is not None:
            # As in `checks.fields`: tuples with limits have at least one number.
            self.other(name, value, limits or Limits(), limits is None)


def _kind_of(annotation: Any) -> _Kind:
    several = get_origin(annotation) in (Union, types.UnionType)
    parts = get_args(annotation) if several else (annotation,)
    arrays = [part for part in parts if part is jax.Array or hasattr(part, "dim_str")]
    others = [part for part in parts if part not in arrays and part is not types.NoneType]
    optional = types.NoneType in parts
    other = others[0] | None if optional and others else others[0] if others else None
    checks_it = None if other is None else checks.check_of(other)
    return _Kind(arrays[0] if arrays else None, checks_it, optional)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _check_array(name: str, value: Any, kind: Any, sizes: dict[str, Any], optional: bool) -> None:
    if kind is jax.Array:
        _check_key(name, value)
        return
    if not _is_array(value):
        axes = ", ".join(axis.strip("*#") for axis in kind.dim_str.split())
        checks.require(name, value, False, f"an array [{axes}]" + ", or None" * optional)
    checks.shape(name, value, tuple(_axis(axis, sizes) for axis in kind.dim_str.split()))
    _check_dtype(name, value, kind.dtypes)
    _remember(value.shape, kind.dim_str.split(), sizes)


def _check_key(name: str, value: Any) -> None:
    """A random key of the new kind or of the old one."""
    dtype = getattr(value, "dtype", None)
    is_key = dtype is not None and (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == "uint32")
    checks.require(name, value, is_key, "a random key")


def _axis(axis: str, sizes: dict[str, Any]) -> Any:
    """An axis of an annotation as an axis of a pattern of `checks.shape`."""
    if axis.startswith("*"):
        return ...
    letter = axis.removeprefix("#")
    size = int(letter) if letter.isdigit() else sizes.get(letter)
    if size is None:
        return letter
    return (1, size) if axis != letter and size != 1 else size


def _check_dtype(name: str, value: Any, allowed: Any) -> None:
    names = [str(one) for one in allowed]
    kinds = {"float32": jnp.floating, "int32": jnp.integer, "bool": jnp.bool_}
    wanted = [kind for known, kind in kinds.items() if any(known == one for one in names)]
    if len(wanted) == 1:
        checks.dtype(name, value, wanted[0])
    elif not any(jnp.issubdtype(value.dtype, kind) for kind in wanted):
        words = "an integer or a floating-point type"
        raise ValueError(f"{name} has dtype {value.dtype}; it must be {words}.")


def _remember(shape: tuple[Any, ...], axes: list[str], sizes: dict[str, Any]) -> None:
    """Sizes by letter; an axis that may be 1 tells nothing where it is 1."""
    for axis, size in zip(reversed(axes), reversed(shape), strict=False):
        if axis.startswith("*"):
            return
        if not (axis.startswith("#") and size == 1):
            sizes.setdefault(axis.removeprefix("#"), size)
