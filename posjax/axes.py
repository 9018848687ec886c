"""Dataclasses of arrays whose axes are known by letter, so that one map serves them all.

A field says its letters once, in its annotation (`Float[Array, "B S N H"]`); `posjax.types` has the
table of letters. Padding, blocks, shardings and parts of the heads are then functions of an array
and its letters, mapped over all fields.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self, get_args

import jax
import jax.numpy as jnp

from posjax.types import Array, PyTree

__all__ = ["HEADS", "Lettered", "added_at", "block_of", "padded"]

# Letters that stand for heads of some kind.
HEADS = frozenset("NKMF")


class Lettered:
    """A frozen dataclass of arrays; those whose annotation names axes have letters."""

    def map_arrays(self, function: Callable[..., Any], *others: Self) -> Self:
        """A copy with `function(letters, array, *arrays of others)` in the place of every array.

        `letters` has one letter for each axis of the array ("1" for those of length 1 that
        broadcast, "#T"), and is "" for arrays in a field whose annotation names no axes (the
        parameters of a function). Parts that are `Lettered` themselves, and tuples of them, are
        mapped too; None stays.
        """
        changed = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not field.metadata.get("static"):
                own = (getattr(other, field.name) for other in others)
                changed[field.name] = self._map_field(field.name, function, value, *own)
        return dataclasses.replace(self, **changed)

    def letters(self, name: str, ndim: int) -> str:
        """The letters of an array of `ndim` axes in the field `name`."""
        return _fitted(_annotated(type(self)).get(name), ndim)

    def map_parts(self, function: Callable[[Any], Any]) -> Self:
        """A copy with `function(part)` in the place of every part that is `Lettered`."""
        changed = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if _is_part(value):
                changed[field.name] = function(value)
            elif _are_parts(value):
                changed[field.name] = tuple(map(function, value))
        return dataclasses.replace(self, **changed)

    def letters_of(self, name: str, shape: tuple[int, ...]) -> str:
        """The letters of an array; axes of length 1 that broadcast (#) have "1" for a letter."""
        marks = _parts_of(_annotated(type(self)).get(name), len(shape))
        rows = zip(self.letters(name, len(shape)), marks, shape, strict=True)
        return "".join("1" if "#" in mark and size == 1 else own for own, mark, size in rows)

    def _map_field(self, name: str, function: Callable, value: Any, *others: Any) -> Any:
        if _is_part(value):
            return value.map_arrays(function, *others)
        if _are_parts(value):
            rows = zip(value, *others, strict=True)
            return tuple(part.map_arrays(function, *rest) for part, *rest in rows)
        if name in _annotated(type(self)):
            return function(self.letters_of(name, jnp.shape(value)), value, *others)
        return jax.tree.map(functools.partial(function, ""), value, *others)


def padded(letters: str, x: Array, amounts: dict[str, int]) -> Array:
    """`x` with zeros appended along the axes named in `amounts`.

    >>> padded("BS", jnp.ones((1, 2)), {"S": 1}).tolist()
    [[1.0, 1.0, 0.0]]
    """
    if amounts.keys().isdisjoint(letters):
        return x
    return jnp.pad(x, [(0, amounts.get(letter, 0)) for letter in letters])


def block_of(letters: str, x: Array, where: dict[str, tuple[Any, int]]) -> Array:
    """`size` entries from `start` on, along the axes named in `where` {letter: (start, size)}.

    >>> block_of("BS", jnp.arange(4)[None], {"S": (1, 2)}).tolist()
    [[1, 2]]
    """
    for axis, letter in enumerate(letters):
        if letter in where:
            x = jax.lax.dynamic_slice_in_dim(x, *where[letter], axis)
    return x


def added_at(letters: str, total: Array, part: Array, starts: dict[str, Any]) -> Array:
    """`total` with `part` added from `starts` {letter: start} on; as a whole without such axes."""
    if starts.keys().isdisjoint(letters):
        return total + part
    where = [jnp.asarray(starts.get(letter, 0), jnp.int32) for letter in letters]
    old = jax.lax.dynamic_slice(total, where, part.shape)
    return jax.lax.dynamic_update_slice(total, old + part, where)


def _is_part(value: PyTree) -> bool:
    return isinstance(value, Lettered)


def _are_parts(value: PyTree) -> bool:
    return isinstance(value, tuple) and bool(value) and all(map(_is_part, value))


@functools.cache
def _annotated(cls: type) -> dict[str, str]:
    """Field -> the axes in its annotation, such as "*N P H"."""
    found = {}
    for field in dataclasses.fields(cls):
        kinds = (field.type, *get_args(field.type))
        axes = [kind.dim_str for kind in kinds if hasattr(kind, "dim_str")]
        if axes:
            found[field.name] = axes[0]
    return found


def _fitted(axes: str | None, ndim: int) -> str:
    """One letter for each of `ndim` axes.

    >>> _fitted("*N P H", 2), _fitted("*N P H", 3), _fitted("#B T", 2), _fitted("*N", 0)
    ('PH', 'NPH', 'BT', '')
    """
    return "".join(part.lstrip("#*") for part in _parts_of(axes, ndim))


def _parts_of(axes: str | None, ndim: int) -> list[str]:
    """Each axis as it is annotated; those marked * are left out first if there are fewer."""
    parts = [] if axes is None else axes.split()
    missing = len(parts) - ndim
    for part in list(parts):
        if missing > 0 and part.startswith("*"):
            parts.remove(part)
            missing -= 1
    return parts
