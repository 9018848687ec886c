"""Checks of the arguments of an encoding's hooks, for every subclass by the base's signature.

Arrays have the shapes and dtypes of their annotations, with one size for each axis letter across
all arguments of a call. Pytrees of what belongs to tokens begin with the axes of the tokens, of
which the first may be 1. Shapes may be symbols of `jax.export`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.checks.calls import kind_of
from posjax.types import Array, Num, PyTree

__all__ = ["Side", "Sizes", "guard_base", "guard_overrides"]


class Sizes(NamedTuple):
    """The sizes of an attention layer."""

    heads: int
    kv_heads: int
    head_size: int


class Side(NamedTuple):
    """The queries or the keys of an attention layer, as places 3 and 4 see them."""

    x: Num[Array, "B T N H"]  # projected queries or keys
    indices: PyTree  # of `positions`, [B, T, ...]
    memory: PyTree = None  # the result of `cache` for these tokens, [B, T, ...]
    value: Num[Array, "B S K H"] | None = None  # projected values, for keys only


# Size of each axis letter that is known so far.
_Letters = dict[str, Any]

# The axes with which the arrays of a pytree begin, by the name of the argument.
_TREES = {
    "carry": ("B",),
    "indices": ("B", "T"),
    "state": ("B", "T"),
    "inputs": ("B", "S"),
    "memory": ("B", "S"),
}
_GUARDS = "_guards_of_hooks"


def guard_base(cls: type, names: tuple[str, ...]) -> None:
    """Checks the arguments of the hooks `names` of a class, and of all that override them."""
    guards = {name: _guard_of(getattr(cls, name)) for name in names}
    setattr(cls, _GUARDS, getattr(cls, _GUARDS, {}) | guards)
    guard_overrides(cls)


def guard_overrides(cls: type) -> None:
    """Checks the arguments of the hooks that a class defines, after Linen has wrapped them."""
    for name, guard in getattr(cls, _GUARDS, {}).items():
        if inspect.isfunction(vars(cls).get(name)):
            setattr(cls, name, guard(vars(cls)[name]))


def _guard_of(hook: Callable) -> Callable[[Callable], Callable]:
    """A decorator that checks arguments by the signature of `hook`."""
    signature = inspect.signature(hook)
    tests = {
        name: _test_of(name, parameter.annotation)
        for name, parameter in signature.parameters.items()
        if name != "self"
    }

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def call(self, *arguments, **settings):
            known = {name: value for name, value in settings.items() if name in tests}
            try:
                given = signature.bind_partial(self, *arguments, **known).arguments
            except TypeError:  # an override with more arguments, or a call that Python refuses
                return method(self, *arguments, **settings)
            letters: _Letters = {}
            for name, value in given.items():
                if tests.get(name) is not None:
                    tests[name](value, letters)
            return method(self, *arguments, **settings)

        return call

    return decorate


def _test_of(name: str, annotation: Any) -> Callable[[Any, _Letters], None] | None:
    """The test of one argument; None for what only its encoding knows."""
    if annotation is Side:
        return functools.partial(_check_side, name)
    if annotation is Sizes:
        return functools.partial(_check_sizes, name)
    if annotation is PyTree:
        axes = _TREES.get(name)
        return (
            None if axes is None else lambda tree, letters: _check_tree(name, tree, axes, letters)
        )
    kind = kind_of(annotation)
    return lambda value, letters: kind.check(name, value, None, letters)


def _check_sizes(name: str, sizes: Any, letters: _Letters) -> None:
    checks.instance(name, sizes, Sizes)
    for field, size in zip(Sizes._fields, sizes, strict=True):
        checks.integer(f"{name}.{field}", size, low=1)
    divides = sizes.heads % sizes.kv_heads == 0
    wanted = f"a divisor of {name}.heads = {sizes.heads}"
    checks.require(f"{name}.kv_heads", sizes.kv_heads, divides, wanted)


def _check_side(name: str, side: Any, letters: _Letters) -> None:
    checks.instance(name, side, Side)
    is_query = name == "query"
    _KINDS[name].check(f"{name}.x", side.x, None, letters)
    axes = ("B", "T") if is_query else ("B", "S")
    _check_tree(f"{name}.indices", side.indices, axes, letters)
    _check_tree(f"{name}.memory", side.memory, axes, letters)
    if is_query:
        return
    _KINDS["value"].check(f"{name}.value", side.value, None, letters)
    heads, kv_heads = letters.get("N"), letters["K"]
    are_known = isinstance(heads, int) and isinstance(kv_heads, int)
    if are_known and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"key.x has {kv_heads} heads; it must have a divisor of query.x's {heads}."
        )


_KINDS = {
    "query": kind_of(Num[Array, "B T N H"]),
    "key": kind_of(Num[Array, "B S K H"]),
    "value": kind_of(Num[Array, "B S K E"] | None),
}


def _check_tree(name: str, tree: PyTree, axes: tuple[str, ...], letters: _Letters) -> None:
    """Arrays of a pytree begin with axes, of which the batch may be 1."""
    is_flags = getattr(tree, "dtype", None) == jnp.bool_
    if is_flags and name.endswith("indices"):
        raise ValueError(f"{name} has dtype bool; it must be an integer or a floating-point type.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        _check_leaf(name + jax.tree_util.keystr(path), leaf, axes, letters)


def _check_leaf(name: str, leaf: Any, axes: tuple[str, ...], letters: _Letters) -> None:
    wanted = [_wanted(axis, letters.get(axis, axis)) for axis in axes]
    words = ", ".join(" or ".join(map(str, sizes)) for sizes in wanted)
    checks.require(name, leaf, hasattr(leaf, "shape"), f"an array that begins with [{words}]")
    begin = tuple(leaf.shape[: len(axes)])
    fits = len(begin) == len(axes) and all(
        isinstance(sizes[-1], str) or size in sizes
        for size, sizes in zip(begin, wanted, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {tuple(leaf.shape)}; it must begin with [{words}].")
    for axis, size in zip(axes, begin, strict=True):
        if axis != "B" or size != 1:
            letters.setdefault(axis, size)


def _wanted(axis: str, size: Any) -> tuple[Any, ...]:
    """The sizes that an axis may have: a letter, if none is known."""
    return (1, size) if axis == "B" and size != 1 else (size,)
