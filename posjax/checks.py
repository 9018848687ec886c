"""Checks of arguments and settings, whose messages have one form.

    X is V; it must be W.

Every function raises ValueError that names the argument or setting and its value, for a wrong type,
too. Those that check one value return it. `fields` checks all settings of a dataclass (a Linen
module is one) by their annotations, with `Limits` for those that have a range:

    def __post_init__(self):
        checks.fields(self, base=above(1), width=at_least(1))
"""

import dataclasses
import math
import numbers
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import jax.numpy as jnp
import numpy as np

from posjax.types import Array, Shaped

__all__ = [
    "Limits",
    "above",
    "at_least",
    "between",
    "choice",
    "dtype",
    "fields",
    "flag",
    "instance",
    "integer",
    "integers",
    "number",
    "numbers_of",
    "require",
    "rows",
    "shape",
    "text",
]


class Limits(NamedTuple):
    """The range of a number; limits that are None do not hold.

    >>> str(Limits(above=0, high=1))
    'above 0 and at most 1'
    """

    low: float | None = None
    """The least number."""
    high: float | None = None
    """The greatest number."""
    above: float | None = None
    """Numbers are greater than this."""
    below: float | None = None
    """Numbers are less than this."""
    multiple_of: int | None = None
    """Numbers are divisible by this."""

    def hold(self, value: float) -> bool:
        """Whether a number is in the range."""
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )

    def __str__(self) -> str:
        words = {"above": "above", "low": "at least", "below": "below", "high": "at most"}
        if self.low is not None and self.high is not None:
            limits = [f"from {self.low} to {self.high}"]
        else:
            named = [(word, getattr(self, name)) for name, word in words.items()]
            limits = [f"{word} {limit}" for word, limit in named if limit is not None]
        if self.multiple_of not in (None, 1):
            limits.append("even" if self.multiple_of == 2 else f"a multiple of {self.multiple_of}")
        return " and ".join(limits)


def above(limit: float) -> Limits:
    """Numbers greater than `limit`."""
    return Limits(above=limit)


def at_least(limit: float) -> Limits:
    """Numbers from `limit` on."""
    return Limits(low=limit)


def between(low: float, high: float) -> Limits:
    """Numbers from `low` to `high`, both included."""
    return Limits(low=low, high=high)


def require(name: str, value: Any, holds: bool, wanted: str) -> None:
    """Raises `ValueError` unless `holds`, for what no other function here checks.

    >>> require("heads", 3, 8 % 3 == 0, "a divisor of width = 8")
    Traceback (most recent call last):
    ValueError: heads is 3; it must be a divisor of width = 8.
    """
    if not holds:
        raise ValueError(f"{name} is {value!r}; it must be {wanted}.")


def integer(name: str, value: Any, *, optional: bool = False, **limits: float | None) -> Any:
    """An integer (no bool) within limits.

    Args:
        optional: whether None is right, too.
        limits: those of `Limits`.

    >>> integer("width", 0, low=1)
    Traceback (most recent call last):
    ValueError: width is 0; it must be at least 1.
    """
    return _numeric(name, value, _is_integer(value), "an integer", optional, Limits(**limits))


def number(name: str, value: Any, *, optional: bool = False, **limits: float | None) -> Any:
    """A finite number (no bool, no array) within limits.

    Args:
        optional: whether None is right, too.
        limits: those of `Limits`.

    >>> number("base", float("nan"), above=1)
    Traceback (most recent call last):
    ValueError: base is nan; it must be a finite number, above 1.
    """
    return _numeric(name, value, _is_number(value), "a finite number", optional, Limits(**limits))


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
    within = Limits(**limits)
    return _sequence(name, value, _is_integer, "integers", count, empty, optional, within)


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
    within = Limits(**limits)
    return _sequence(name, value, _is_number, "finite numbers", count, empty, optional, within)


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
    quoted = [f'"{one}"' if isinstance(one, str) else str(one) for one in known]
    quoted += ["None"] if optional else []
    require(name, value, holds or _absent(value, optional), _either(quoted))
    return value


def flag(name: str, value: Any) -> bool:
    """True or False, and nothing that is merely equal to one of them."""
    require(name, value, isinstance(value, bool | np.bool_), "True or False")
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
    holds = isinstance(value, kinds) or _absent(value, optional)
    require(name, value, holds, wanted + _or_none(optional))
    return value


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
    got = tuple(array.shape)
    if not any(_fits(got, pattern) for pattern in patterns) or (not empty and 0 in got):
        wanted = _either([f"[{', '.join(map(_axis, pattern))}]" for pattern in patterns])
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
    if isinstance(wanted, tuple):
        holds, words = array.dtype in wanted, _either([jnp.dtype(one).name for one in wanted])
    else:
        holds, words = jnp.issubdtype(array.dtype, wanted), _KINDS[wanted]
    if not holds:
        raise ValueError(f"{name} has dtype {array.dtype}; it must be {words}.")


_KINDS = {
    jnp.integer: "an integer type",
    jnp.floating: "a floating-point type",
    jnp.bool_: "bool",
}


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


def fields(
    owner: Any, prefix: str | None = None, *, empty: tuple[str, ...] = (), **limits: Limits
) -> None:
    """Every setting of a dataclass has the type of its annotation, and keeps to its limits.

    Annotations that say nothing checkable here, strings among them, are passed over.

    Args:
        owner: an instance of a dataclass, such as a Linen module.
        prefix: what names in messages begin with; None: the class and a space.
        empty: tuples that may be empty.
        limits: ranges of settings by name; in a tuple of numbers, for each of them.

    >>> @dataclasses.dataclass
    ... class Grid:
    ...     width: int
    >>> fields(Grid(0), width=at_least(1))
    Traceback (most recent call last):
    ValueError: Grid width is 0; it must be at least 1.
    """
    prefix = f"{type(owner).__name__} " if prefix is None else prefix
    known = {field.name: field.type for field in dataclasses.fields(owner)}
    if unknown := limits.keys() - known.keys():
        raise TypeError(f"{type(owner).__name__} has no field {min(unknown)}.")
    for name, kind in known.items():
        settings = limits.get(name, Limits())._asdict() | ({"empty": True} if name in empty else {})
        _typed(prefix + name, getattr(owner, name), kind, settings, optional=False)


def _typed(name: str, value: Any, kind: Any, limits: dict[str, Any], optional: bool) -> None:
    """The check that an annotation asks for."""
    parts, origin = get_args(kind), get_origin(kind)
    if origin in (Union, types.UnionType):
        others = [part for part in parts if part is not types.NoneType]
        if len(others) == 1:
            _typed(name, value, others[0], limits, optional=len(parts) > 1)
    elif origin is Literal:
        choice(name, value, kind, optional=optional)
    elif origin is tuple and parts[0] in _SEQUENCES:
        count = None if parts[-1] is Ellipsis else len(parts)
        _SEQUENCES[parts[0]](name, value, count=count, optional=optional, **limits)
    elif kind is bool:
        flag(name, value)
    elif kind in _NUMBERS:
        _NUMBERS[kind](name, value, optional=optional, **limits)
    elif kind is str:
        text(name, value, optional=optional)
    elif isinstance(kind, type) and kind is not Any and not getattr(kind, "_is_protocol", False):
        instance(name, value, kind, optional=optional)


_NUMBERS = {int: integer, float: number}
_SEQUENCES = {int: integers, float: numbers_of}


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and -math.inf < value < math.inf


def _numeric(
    name: str, value: Any, is_right: bool, kind: str, optional: bool, limits: Limits
) -> Any:
    if not _absent(value, optional):
        # The kind is clear where only the limits do not hold.
        words = str(limits) if is_right else ", ".join(filter(None, (kind, str(limits))))
        require(name, value, is_right and limits.hold(value), words + _or_none(optional))
    return value


def _sequence(
    name: str,
    value: Any,
    is_right: Callable[[Any], bool],
    kind: str,
    count: int | None,
    empty: bool,
    optional: bool,
    limits: Limits,
) -> Any:
    if not _absent(value, optional):
        some = f"a tuple of {count or ('' if empty else 'one or more')} {kind}".replace("  ", " ")
        each = f", each {limits}" if str(limits) else ""
        holds = _has_length(value, count, empty) and all(map(is_right, value))
        holds = holds and all(map(limits.hold, value))
        require(name, value, holds, some + each + _or_none(optional))
    return value


def _has_length(value: Any, count: int | None, empty: bool) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return False
    return len(value) == count if count is not None else empty or len(value) > 0


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
    return _either(map(str, axis)) if isinstance(axis, tuple) else str(axis)


def _either(words: Iterable[str]) -> str:
    """Words as "a, b or c"."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _or_none(optional: bool) -> str:
    return ", or None" if optional else ""


def _absent(value: Any, optional: bool) -> bool:
    return optional and value is None
