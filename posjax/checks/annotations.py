"""Checks that annotations ask for, and those of all fields of a dataclass."""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from posjax.checks.limits import Limits
from posjax.checks.values import (
    NUMBERS,
    choice,
    each_within,
    flag,
    instance,
    is_absent,
    require,
    text,
    within,
)

__all__ = ["check_of", "fields"]

_ANY = Limits()


def fields(
    owner: Any, prefix: str | None = None, *, empty: tuple[str, ...] = (), **limits: Limits
) -> None:
    """Every setting of a dataclass has the type of its annotation, and keeps to its limits.

    Annotations that say nothing checkable here, strings among them, are passed over.

    Args:
        owner: an instance of a dataclass, such as a Linen module.
        prefix: what names in messages begin with; None: the class and a space.
        empty: tuples with limits that may be empty; those without limits may.
        limits: ranges of settings by name; in a tuple of numbers, for each of them.

    >>> from posjax.checks import at_least
    >>> @dataclasses.dataclass
    ... class Grid:
    ...     width: int
    >>> fields(Grid(0), width=at_least(1))
    Traceback (most recent call last):
    ValueError: Grid width is 0; it must be at least 1.
    """
    cls = type(owner)
    prefix = f"{cls.__name__} " if prefix is None else prefix
    if unknown := limits.keys() - _checked(cls).keys():
        raise TypeError(f"{cls.__name__} has no such number: {min(unknown)}.")
    for name, check in _checked(cls).items():
        may_be_empty = name in empty or name not in limits
        check(prefix + name, getattr(owner, name), limits.get(name, _ANY), may_be_empty)


@functools.cache
def _checked(cls: type) -> dict[str, Callable[[str, Any, Limits, bool], None]]:
    """A check for each field whose annotation asks for one."""
    found = {field.name: check_of(field.type) for field in dataclasses.fields(cls)}
    return {name: check for name, check in found.items() if check is not None}


def check_of(kind: Any, optional: bool = False) -> Callable[[str, Any, Limits, bool], None] | None:
    """The check that an annotation asks for; it is called with name, value, limits and `empty`."""
    parts, origin = get_args(kind), get_origin(kind)
    if origin in (Union, types.UnionType):
        others = [part for part in parts if part is not types.NoneType]
        return check_of(others[0], len(parts) > 1) if len(others) == 1 else None
    if kind in NUMBERS:
        return lambda name, value, limits, empty: within(
            name, value, NUMBERS[kind], limits, optional
        )
    if origin is tuple and parts[0] in NUMBERS:
        count = None if parts[-1] is Ellipsis else len(parts)
        return lambda name, value, limits, empty: each_within(
            name, value, NUMBERS[parts[0]], limits, optional, count, empty
        )
    if origin in (tuple, list, Sequence) and str in parts:
        return lambda name, value, limits, empty: _texts(name, value, optional)
    if origin is tuple and parts[-1] is Ellipsis and isinstance(parts[0], type):
        return lambda name, value, limits, empty: _instances(name, value, parts[0], optional)
    if origin is Callable:
        return lambda name, value, limits, empty: require(
            name, value, callable(value) or is_absent(value, optional), "a function"
        )
    if origin is Literal:
        return lambda name, value, limits, empty: choice(name, value, parts, optional=optional)
    if kind is bool:
        return lambda name, value, limits, empty: flag(name, value)
    if kind is str:
        return lambda name, value, limits, empty: text(name, value, optional=optional)
    if origin in (dict, Mapping):
        return lambda name, value, limits, empty: instance(
            name, value, Mapping, "a dictionary", optional=optional
        )
    if isinstance(kind, type) and kind is not Any and not getattr(kind, "_is_protocol", False):
        return lambda name, value, limits, empty: instance(name, value, kind, optional=optional)
    return None


def _instances(name: str, value: Any, kind: type, optional: bool) -> None:
    holds = isinstance(value, tuple | list) and all(isinstance(one, kind) for one in value)
    wanted = f"a tuple of instances of {kind.__name__}"
    require(name, value, holds or is_absent(value, optional), wanted)


def _texts(name: str, value: Any, optional: bool) -> None:
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    holds = is_sequence and all(isinstance(one, str) for one in value)
    require(name, value, holds or is_absent(value, optional), "a tuple of strings")
