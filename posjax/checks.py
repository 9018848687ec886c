"""Checks of arguments and settings, whose messages have one form.

    X is V; it must be W.

Every function raises ValueError that names the argument or setting and its value, for a wrong type,
too. Those that check one value return it. `fields` checks all settings of a dataclass (a Linen
module is one) by their annotations, with `Limits` for those that have a range:

    def __post_init__(self):
        checks.fields(self, base=above(1), width=at_least(1))
"""

import dataclasses
import functools
import math
import numbers
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np

from posjax.types import Array, Shaped

__all__ = [
    "Limits",
    "above",
    "at_least",
    "between",
    "check_of",
    "choice",
    "dtype",
    "fields",
    "flag",
    "instance",
    "integer",
    "integers",
    "key",
    "number",
    "numbers_of",
    "require",
    "rows",
    "shape",
    "size",
    "text",
]

# The largest number of channels, heads or rows, and of tokens.
LARGEST, LONGEST = 2**20, 2**26


class Limits(NamedTuple):
    """The range of a number; limits that are None do not hold.

    `reasonable` is named only where it does not hold.

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
    reasonable: float | None = None
    """Greater numbers are mistakes, of which time and memory would run out."""

    def hold(self, value: float) -> bool:
        """Whether a number is in the range."""
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or value % self.multiple_of == 0)
            and not self.is_beyond_reason(value)
        )

    def is_beyond_reason(self, value: float) -> bool:
        """Whether a number is greater than any that makes sense."""
        return self.reasonable is not None and value > self.reasonable

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


def size(low: int = 1, multiple_of: int | None = None, reasonable: int = LARGEST) -> Limits:
    """A number of channels, heads or rows, for which as many numbers are made."""
    return Limits(low=low, multiple_of=multiple_of, reasonable=reasonable)


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
    return _within(name, value, _INTEGER, Limits(**limits), optional)


def number(name: str, value: Any, *, optional: bool = False, **limits: float | None) -> Any:
    """A finite number (no bool, no array) within limits.

    Args:
        optional: whether None is right, too.
        limits: those of `Limits`.

    >>> number("base", float("nan"), above=1)
    Traceback (most recent call last):
    ValueError: base is nan; it must be a finite number, above 1.
    """
    return _within(name, value, _NUMBER, Limits(**limits), optional)


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
    return _each_within(name, value, _INTEGER, Limits(**limits), optional, count, empty)


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
    return _each_within(name, value, _NUMBER, Limits(**limits), optional, count, empty)


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
    if holds or _absent(value, optional):
        return value
    quoted = [f'"{one}"' if isinstance(one, str) else str(one) for one in known]
    quoted += ["None"] if optional else []
    raise _refusal(name, value, _either(quoted))


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
    wanted = _either([f"[{', '.join(map(_axis, pattern))}]" for pattern in patterns])
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
        words = _either([jnp.dtype(one).name for one in wanted]) if several else _DTYPES[wanted]
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
    if kind in _KINDS:
        return lambda name, value, limits, empty: _within(
            name, value, _KINDS[kind], limits, optional
        )
    if origin is tuple and parts[0] in _KINDS:
        count = None if parts[-1] is Ellipsis else len(parts)
        return lambda name, value, limits, empty: _each_within(
            name, value, _KINDS[parts[0]], limits, optional, count, empty
        )
    if origin in (tuple, list, Sequence) and str in parts:
        return lambda name, value, limits, empty: _texts(name, value, optional)
    if origin is Callable:
        return lambda name, value, limits, empty: require(
            name, value, callable(value) or _absent(value, optional), "a function"
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


def _texts(name: str, value: Any, optional: bool) -> None:
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    holds = is_sequence and all(isinstance(one, str) for one in value)
    require(name, value, holds or _absent(value, optional), "a tuple of strings")


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


_ANY = Limits()
_INTEGER = _Kind(_is_integer, "an integer", "integers")
_NUMBER = _Kind(_is_number, "a finite number", "finite numbers")
_KINDS = {int: _INTEGER, float: _NUMBER}


def _within(name: str, value: Any, kind: _Kind, limits: Limits, optional: bool) -> Any:
    is_right = kind.holds(value)
    if (is_right and limits.hold(value)) or _absent(value, optional):
        return value
    # The kind is clear where only the limits do not hold.
    words = str(limits) if is_right else ", ".join(filter(None, (kind.one, str(limits))))
    if is_right and limits.is_beyond_reason(value):
        words = f"at most {limits.reasonable}"
    raise _refusal(name, value, words + _or_none(optional))


def _each_within(
    name: str,
    value: Any,
    kind: _Kind,
    limits: Limits,
    optional: bool,
    count: int | None,
    empty: bool,
) -> Any:
    holds = _has_length(value, count, empty) and all(map(kind.holds, value))
    if (holds and all(map(limits.hold, value))) or _absent(value, optional):
        return value
    number = f"{count} " if count is not None else "" if empty else "one or more "
    each = f", each {limits}" if str(limits) else ""
    raise _refusal(name, value, f"a tuple of {number}{kind.many}{each}{_or_none(optional)}")


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
