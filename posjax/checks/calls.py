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

from posjax.checks.annotations import check_of
from posjax.checks.arrays import dtype, key, shape
from posjax.checks.limits import Limits
from posjax.checks.values import require

__all__ = ["annotated", "arguments", "kind_of"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def arguments(
    like: Callable[..., Any] | None = None, /, **limits: Limits
) -> Callable[[_Function], _Function]:
    """A decorator: arguments have the types of their annotations, and keep to limits.

    Every refusal is a ValueError that names the argument, its value, and what it must be.

    Args:
        like: a function whose signature says the types, such as a method of a base class; None: the
            function itself.
        limits: ranges of numbers by the name of the argument.

    >>> from posjax.checks import size
    >>> from posjax.types import Array, Num
    >>> @arguments(width=size())
    ... def widened(x: Num[Array, "B T"], width: int):
    ...     return jnp.repeat(x, width, axis=1)
    >>> widened(jnp.ones((1, 2)), 0)
    Traceback (most recent call last):
    ValueError: width is 0; it must be at least 1.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function if like is None else like)
        annotated = {n: p.annotation for n, p in signature.parameters.items()}
        kinds = {n: kind_of(a) for n, a in annotated.items() if a is not inspect.Parameter.empty}

        @functools.wraps(function)
        def call(*arguments, **named):
            bound = signature.bind(*arguments, **named)
            bound.apply_defaults()
            sizes: dict[str, Any] = {}
            for name, kind in kinds.items():
                kind.check(name, bound.arguments[name], limits.get(name), sizes)
            return function(*arguments, **named)

        return call

    return decorate


def annotated(name: str, value: Any, annotation: Any) -> None:
    """A value has the type, and an array the kind of dtype, of an annotation; of any shape.

    >>> from posjax.types import Array, Float
    >>> annotated("factor", "2", Float[Array, "N"] | None)
    Traceback (most recent call last):
    ValueError: factor is '2'; it must be an array [N], or None.
    """
    kind = kind_of(annotation)
    if not kind.arrays:
        if kind.other is not None:
            kind.other(name, value, Limits(), True)
    elif not (value is None and kind.optional):
        _check_is_array(name, value, kind.arrays, kind.optional)
        _check_dtype(name, value, kind.arrays)


class _Kind(NamedTuple):
    """The demand of an annotation: an array, something else, either, or None, too.

    Or a tuple, each of whose `members` has a kind.
    """

    arrays: tuple[Any, ...]
    other: Callable[[str, Any, Limits, bool], None] | None
    optional: bool
    members: tuple["_Kind", ...] = ()

    def check(self, name: str, value: Any, limits: Limits | None, sizes: dict[str, Any]) -> None:
        """Checks one argument; adds the sizes of its axes to `sizes`."""
        if value is None and self.optional:
            return
        if self.members:
            holds = isinstance(value, tuple) and len(value) == len(self.members)
            wanted = f"a tuple of {len(self.members)} arrays" + ", or None" * self.optional
            require(name, value, holds, wanted)
            for index, (kind, member) in enumerate(zip(self.members, value, strict=True)):
                kind.check(f"{name}[{index}]", member, None, sizes)
            return
        if self.arrays and (_is_array(value) or self.other is None):
            _check_array(name, value, self.arrays, sizes, self.optional)
        elif self.other is not None:
            # As in `checks.fields`: tuples with limits have at least one number.
            self.other(name, value, limits or Limits(), limits is None)


def kind_of(annotation: Any) -> _Kind:
    """The demand of an annotation, to check many values by."""
    several = get_origin(annotation) in (Union, types.UnionType)
    parts = get_args(annotation) if several else (annotation,)
    tuples = [part for part in parts if get_origin(part) is tuple and _holds_arrays(part)]
    if tuples:
        members = tuple(map(kind_of, get_args(tuples[0])))
        return _Kind((), None, types.NoneType in parts, members)
    arrays = tuple(part for part in parts if part is jax.Array or hasattr(part, "dim_str"))
    others = [part for part in parts if part not in arrays and part is not types.NoneType]
    optional = types.NoneType in parts
    # One of several other kinds is for the function to check.
    checks_it = check_of(others[0], optional) if len(others) == 1 else None
    return _Kind(arrays, checks_it, optional)


def _holds_arrays(annotation: Any) -> bool:
    return all(hasattr(part, "dim_str") for part in get_args(annotation))


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _check_array(
    name: str, value: Any, kinds: tuple[Any, ...], sizes: dict[str, Any], optional: bool
) -> None:
    """An array of one of several annotations; adds its sizes to `sizes`."""
    if jax.Array in kinds:
        key(name, value)
        return
    _check_is_array(name, value, kinds, optional)
    patterns = list(dict.fromkeys(kind.dim_str for kind in kinds))
    shape(name, value, *(_sizes_of(pattern, sizes) for pattern in patterns))
    _check_dtype(name, value, kinds)
    if len(patterns) == 1:
        _remember(value.shape, patterns[0].split(), sizes)


def _check_is_array(name: str, value: Any, kinds: tuple[Any, ...], optional: bool) -> None:
    axes = ", ".join(axis.strip("*#") for axis in kinds[0].dim_str.split())
    wanted = f"an array [{axes}]" + ", or None" * optional
    require(name, value, _is_array(value), wanted)


def _sizes_of(pattern: str, sizes: dict[str, Any]) -> tuple[Any, ...]:
    """Axes of an annotation as a pattern of `checks.shape`."""
    first, *rest = pattern.split() or [""]
    if not first.startswith("*"):
        return tuple(_axis(axis, sizes) for axis in pattern.split())
    return (*sizes.get(first, (...,)), *(_axis(axis, sizes) for axis in rest))


def _axis(axis: str, sizes: dict[str, Any]) -> Any:
    letter = axis.removeprefix("#")
    size = int(letter) if letter.isdigit() else sizes.get(letter)
    if size is None:
        return letter
    return (1, size) if axis != letter and size != 1 else size


def _check_dtype(name: str, value: Any, kinds: tuple[Any, ...]) -> None:
    allowed = [str(one) for kind in kinds for one in kind.dtypes]
    wanted = [kind for known, kind in _KINDS.items() if known in allowed]
    if len(wanted) == 1:
        dtype(name, value, wanted[0])
    elif not any(jnp.issubdtype(value.dtype, kind) for kind in wanted):
        words = "an integer or a floating-point type" + ", or bool" * (jnp.bool_ in wanted)
        raise ValueError(f"{name} has dtype {value.dtype}; it must be {words}.")


# Kinds of dtypes by one that each has.
_KINDS = {"float32": jnp.floating, "int32": jnp.integer, "bool": jnp.bool_}


def _remember(shape: tuple[Any, ...], axes: list[str], sizes: dict[str, Any]) -> None:
    """Sizes by letter; an axis that may be 1 tells nothing where it is 1."""
    if axes and axes[0].startswith("*"):
        before = len(shape) - len(axes) + 1
        sizes.setdefault(axes[0], tuple(shape[:before]))
        axes, shape = axes[1:], shape[before:]
    for axis, size in zip(axes, shape, strict=True):
        if not (axis.startswith("#") and size == 1):
            sizes.setdefault(axis.removeprefix("#"), size)
