"""Checks of numbers, flags, texts and instances."""

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np

from posjax.checks.limits import Limits

__all__ = [
    "NUMBERS",
    "choice",
    "each_within",
    "either",
    "flag",
    "instance",
    "integer",
    "integers",
    "is_absent",
    "number",
    "numbers_of",
    "require",
    "text",
    "within",
]


def require(name: str, value: Any, holds: bool, wanted: str) -> None:
    """Raises `ValueError` unless `holds`, for what no other function here checks.

    >>> require("heads", 3, 8 % 3 == 0, "a divisor of width = 8")
    Traceback (most recent call last):
    ValueError: heads is 3; it must be a divisor of width = 8.
    """
    if not holds:
        raise _refusal(name, value, wanted)


def _refusal(name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"{name} is {value!r}; it must be {wanted}.")


def integer(name: str, value: Any, *, optional: bool = False, **limits: float | None) -> Any:
    """An integer (no bool) within limits.

    Args:
        optional: whether None is right, too.
        limits: those of `Limits`.

    >>> integer("width", 0, low=1)
    Traceback (most recent call last):
    ValueError: width is 0; it must be at least 1.
    """
    return within(name, value, _INTEGER, Limits(**limits), optional)


def number(name: str, value: Any, *, optional: bool = False, **limits: float | None) -> Any:
    """A finite number (no bool, no array) within limits.

    Args:
        optional: whether None is right, too.
        limits: those of `Limits`.

    >>> number("base", float("nan"), above=1)
    Traceback (most recent call last):
    ValueError: base is nan; it must be a finite number, above 1.
    """
    return within(name, value, _NUMBER, Limits(**limits), optional)


def integers(
    name: str,
    value: Any,
    *,
    count: int | None = None,
    empty: bool = False,
    optional: bool = False,
    **limits: float | None,
) -> Any:
    """A sequence of integers within limits, such as the shape of a grid or token ids.

    Args:
        count: how many there must be; None: any number.
        empty: whether there may be none.
        optional: whether None is right, too.
        limits: those of `Limits`, for each integer.

    >>> integers("grid", (2, 0), low=1)
    Traceback (most recent call last):
    ValueError: grid is (2, 0); it must be a tuple of one or more integers, each at least 1.
    """
    return each_within(name, value, _INTEGER, Limits(**limits), optional, count, empty)


def numbers_of(
    name: str,
    value: Any,
    *,
    count: int | None = None,
    empty: bool = False,
    optional: bool = False,
    **limits: float | None,
) -> Any:
    """A sequence of finite numbers within limits.

    Args:
        count: how many there must be; None: any number.
        empty: whether there may be none.
        optional: whether None is right, too.
        limits: those of `Limits`, for each number.
    """
    return each_within(name, value, _NUMBER, Limits(**limits), optional, count, empty)


def choice(name: str, value: Any, allowed: Any, *, optional: bool = False) -> Any:
    """One of some strings or integers.

    Args:
        allowed: a `Literal`, or an iterable of them.
        optional: whether None is right, too.

    >>> choice("layout", "Half", ("half", "interleaved"))
    Traceback (most recent call last):
    ValueError: layout is 'Half'; it must be "half" or "interleaved".
    """
    known = get_args(allowed) if get_origin(allowed) is Literal else tuple(allowed)
    exact = not isinstance(value, bool)
    holds = exact and any(isinstance(value, type(one)) and value == one for one in known)
    if holds or is_absent(value, optional):
        return value
    quoted = [f'"{one}"' if isinstance(one, str) else str(one) for one in known]
    quoted += ["None"] if optional else []
    raise _refusal(name, value, either(quoted))


def flag(name: str, value: Any) -> bool:
    """True or False, and nothing that is merely equal to one of them."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is {value!r}; it must be True or False.")
    return value


def text(name: str, value: Any, *, optional: bool = False) -> Any:
    """A string."""
    return instance(name, value, str, "a string", optional=optional)


def instance(
    name: str, value: Any, kinds: Any, wanted: str | None = None, *, optional: bool = False
) -> Any:
    """An instance of a class, or of one of several.

    Args:
        kinds: as for `isinstance`.
        wanted: words for the message; None: the name of the class.
        optional: whether None is right, too.

    >>> instance("scaling", 4.0, str, optional=True)
    Traceback (most recent call last):
    ValueError: scaling is 4.0; it must be an instance of str, or None.
    """
    wanted = f"an instance of {kinds.__name__}" if wanted is None else wanted
    holds = isinstance(value, kinds) or is_absent(value, optional)
    require(name, value, holds, wanted + _or_none(optional))
    return value


class _Kind(NamedTuple):
    """A kind of number: what belongs to it, and its name for one and for many."""

    holds: Callable[[Any], bool]
    one: str
    many: str


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and -math.inf < value < math.inf


_INTEGER = _Kind(_is_integer, "an integer", "integers")
_NUMBER = _Kind(_is_number, "a finite number", "finite numbers")
NUMBERS = {int: _INTEGER, float: _NUMBER}


def within(name: str, value: Any, kind: _Kind, limits: Limits, optional: bool) -> Any:
    """A number of a kind within limits."""
    is_right = kind.holds(value)
    if (is_right and limits.hold(value)) or is_absent(value, optional):
        return value
    # The kind is clear where only the limits do not hold.
    words = str(limits) if is_right else ", ".join(filter(None, (kind.one, str(limits))))
    if is_right and limits.is_beyond_reason(value):
        words = f"at most {limits.reasonable}"
    raise _refusal(name, value, words + _or_none(optional))


def each_within(
    name: str,
    value: Any,
    kind: _Kind,
    limits: Limits,
    optional: bool,
    count: int | None,
    empty: bool,
) -> Any:
    """A sequence of numbers of a kind within limits."""
    holds = _has_length(value, count, empty) and all(map(kind.holds, value))
    if (holds and all(map(limits.hold, value))) or is_absent(value, optional):
        return value
    number = f"{count} " if count is not None else "" if empty else "one or more "
    each = f", each {limits}" if str(limits) else ""
    raise _refusal(name, value, f"a tuple of {number}{kind.many}{each}{_or_none(optional)}")


def _has_length(value: Any, count: int | None, empty: bool) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return False
    return len(value) == count if count is not None else empty or len(value) > 0


def either(words: Iterable[str]) -> str:
    """Words as "a, b or c"."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _or_none(optional: bool) -> str:
    return ", or None" if optional else ""


def is_absent(value: Any, optional: bool) -> bool:
    """Whether a value is left out, and may be."""
    return optional and value is None
