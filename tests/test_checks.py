"""The checks of arguments and settings: what they accept, and every word of what they say."""

import dataclasses
import math
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax import checks
from posjax.checks import Limits, above, at_least, between
from posjax.types import Array, Bool, Float, Int, Num

ACCEPTED = [
    (checks.integer, 3, {"low": 3, "high": 3}),
    (checks.integer, np.int64(3), {"low": 1}),
    (checks.integer, -(10**400), {}),
    (checks.integer, None, {"low": 1, "optional": True}),
    (checks.number, 3, {"above": 2, "below": 4}),
    (checks.number, np.float32(0.5), {"low": 0}),
    (checks.number, -1.5, {}),
    (checks.number, None, {"above": 0, "optional": True}),
    (checks.integers, (1, 2), {"low": 1, "count": 2}),
    (checks.integers, [np.int32(1)], {}),
    (checks.integers, range(3), {"low": 0, "high": 2}),
    (checks.integers, (), {"empty": True}),
    (checks.integers, None, {"optional": True}),
    (checks.numbers_of, (1, 2.5), {"above": 0}),
    (checks.choice, "a", {"allowed": ("a", "b")}),
    (checks.choice, 2, {"allowed": Literal[1, 2]}),
    (checks.choice, None, {"allowed": Literal["a"], "optional": True}),
    (checks.flag, False, {}),
    (checks.flag, np.True_, {}),
    (checks.text, "", {}),
    (checks.instance, 1, {"kinds": int}),
]

REFUSED = [
    (checks.integer, 0, {"low": 1}, "0; it must be at least 1."),
    (checks.integer, 5, {"low": 1, "high": 4}, "5; it must be from 1 to 4."),
    (checks.integer, 64.0, {"low": 1}, "64.0; it must be an integer, at least 1."),
    (checks.integer, True, {}, "True; it must be an integer."),
    (checks.integer, "64", {"optional": True}, "'64'; it must be an integer, or None."),
    (checks.integer, None, {}, "None; it must be an integer."),
    (checks.number, 0.5, {"above": 1}, "0.5; it must be above 1."),
    (checks.number, 1, {"low": 0, "below": 1}, "1; it must be at least 0 and below 1."),
    (checks.number, math.nan, {"low": 0}, "nan; it must be a finite number, at least 0."),
    (checks.number, math.inf, {}, "inf; it must be a finite number."),
    (checks.number, np.float32(math.nan), {}, "np.float32(nan); it must be a finite number."),
    (checks.number, True, {}, "True; it must be a finite number."),
    (checks.number, 1j, {}, "1j; it must be a finite number."),
    (checks.number, np.ones(1), {}, "array([1.]); it must be a finite number."),
    (checks.number, -1, {"above": 0, "optional": True}, "-1; it must be above 0, or None."),
    (checks.integers, (), {}, "(); it must be a tuple of one or more integers."),
    (checks.integers, 3, {"empty": True}, "3; it must be a tuple of integers."),
    (checks.integers, "12", {}, "'12'; it must be a tuple of one or more integers."),
    (
        checks.integers,
        (1, 0),
        {"low": 1, "optional": True},
        "(1, 0); it must be a tuple of one or more integers, each at least 1, or None.",
    ),
    (checks.integers, (1,), {"count": 2}, "(1,); it must be a tuple of 2 integers."),
    (checks.integers, (1, True), {}, "(1, True); it must be a tuple of one or more integers."),
    (checks.numbers_of, (math.nan,), {"count": 1}, "(nan,); it must be a tuple of 1 finite"),
    (checks.choice, "c", {"allowed": ("a", "b")}, '\'c\'; it must be "a" or "b".'),
    (checks.choice, 1.0, {"allowed": Literal[1, 2, 3]}, "1.0; it must be 1, 2 or 3."),
    (checks.choice, True, {"allowed": (1,)}, "True; it must be 1."),
    (checks.choice, [], {"allowed": ("a",), "optional": True}, '[]; it must be "a" or None.'),
    (checks.flag, 1, {}, "1; it must be True or False."),
    (checks.flag, "no", {}, "'no'; it must be True or False."),
    (checks.text, 1, {}, "1; it must be a string."),
    (checks.instance, 1, {"kinds": str}, "1; it must be an instance of str."),
]


@pytest.mark.parametrize(("check", "value", "settings"), ACCEPTED)
def test_right_values_are_returned(check, value, settings):
    settings = dict(settings)
    extra = [settings.pop(name) for name in ("allowed", "kinds") if name in settings]
    assert check("x", value, *extra, **settings) is value


@pytest.mark.parametrize(("check", "value", "settings", "words"), REFUSED)
def test_wrong_values_are_named(check, value, settings, words):
    settings = dict(settings)
    extra = [settings.pop(name) for name in ("allowed", "kinds") if name in settings]
    with pytest.raises(ValueError) as error:
        check("RoPE x", value, *extra, **settings)
    assert str(error.value).startswith(f"RoPE x is {words}")


@pytest.mark.parametrize(
    ("limits", "inside", "outside", "words"),
    [
        (above(1), [1.1, 9], [1, 0], "above 1"),
        (at_least(1), [1, 9], [0.9], "at least 1"),
        (between(0, 1), [0, 1], [-0.1, 1.1], "from 0 to 1"),
        (Limits(above=0, high=1), [0.1, 1], [0, 1.1], "above 0 and at most 1"),
        (Limits(low=0, below=1), [0, 0.9], [-1, 1], "at least 0 and below 1"),
        (Limits(low=2, multiple_of=2), [2, 4], [0, 3], "at least 2 and even"),
        (Limits(multiple_of=128), [0, 128], [64], "a multiple of 128"),
        (Limits(low=1, multiple_of=1), [1], [0], "at least 1"),
        (Limits(), [-math.inf, 5], [], ""),
    ],
)
def test_limits(limits, inside, outside, words):
    assert str(limits) == words
    assert all(map(limits.hold, inside))
    assert not any(map(limits.hold, outside))


@pytest.mark.parametrize(
    ("got", "patterns"),
    [
        ((2, 3), [(2, 3)]),
        ((1, 3), [((1, 2), "T")]),
        ((4, 4), [("n", "n")]),
        ((7, 8, 4, 4), [(..., "n", "n")]),
        ((), [(), (8,)]),
        ((0, 3), [("T", 3)]),
    ],
)
def test_shapes_that_fit(got, patterns):
    checks.shape("x", jax.ShapeDtypeStruct(got, jnp.float32), *patterns)


@pytest.mark.parametrize(
    ("got", "patterns", "settings", "words"),
    [
        ((2, 4), [(2, 3)], {}, "(2, 4); it must be [2, 3]."),
        ((3, 3), [((1, 2), "T")], {}, "(3, 3); it must be [1 or 2, T]."),
        ((4, 5), [(..., "n", "n")], {}, "(4, 5); it must be [..., n, n]."),
        ((4,), [(..., "n", "n")], {}, "(4,); it must be [..., n, n]."),
        ((3,), [(), (8,)], {}, "(3,); it must be [] or [8]."),
        ((0, 3), [("B", "T")], {"empty": False}, "(0, 3); it must be [B, T], no axis 0."),
    ],
)
def test_shapes_that_do_not_fit(got, patterns, settings, words):
    with pytest.raises(ValueError) as error:
        checks.shape("x", jax.ShapeDtypeStruct(got, jnp.float32), *patterns, **settings)
    assert str(error.value) == f"x has shape {words}"


def test_dtypes():
    half = jax.ShapeDtypeStruct((), jnp.bfloat16)
    checks.dtype("x", half, jnp.floating)
    checks.dtype("x", half, (jnp.float32, jnp.bfloat16))
    for wanted, words in [
        (jnp.integer, "an integer type"),
        (jnp.bool_, "bool"),
        ((jnp.float32, jnp.float16), "float32 or float16"),
    ]:
        with pytest.raises(ValueError, match=f"^x has dtype bfloat16; it must be {words}.$"):
            checks.dtype("x", half, wanted)


@pytest.mark.parametrize("got", [(3,), (1, 3), (2, 3)])
def test_rows_have_two_axes(got):
    array = checks.rows("x", np.zeros(got, np.int32), batch=2, length=3)
    assert array.shape == (got if len(got) == 2 else (1, 3))


@pytest.mark.parametrize("got", [(), (4,), (3, 3), (1, 2, 3)])
def test_rows_of_other_shapes(got):
    with pytest.raises(ValueError, match=r"it must be \[3\] or \[1 or 2, 3\]\."):
        checks.rows("x", np.zeros(got, np.int32), batch=2, length=3)


@pytest.mark.parametrize("array", [[0.0, 1.0], [True, False]])
def test_rows_of_other_dtypes(array):
    with pytest.raises(ValueError, match=r"^x has dtype .*; it must be an integer type\."):
        checks.rows("x", array, batch=1, length=2)


class Kind:
    """A class for annotations."""


@dataclasses.dataclass(frozen=True)
class Settings:
    base: float = 2.0
    width: int = 4
    layout: Literal["half", "whole"] = "half"
    trained: bool = False
    limit: int | None = None
    grid: tuple[int, ...] | None = None
    ends: tuple[float, float] = (1.0, 2.0)
    tokens: tuple[int, ...] = ()
    kind: Kind | None = None
    path: str = ""
    later: "Kind | None" = None
    anything: ClassVar = 3

    def __post_init__(self):
        ranges = {"base": above(1), "width": at_least(1), "grid": at_least(1)}
        checks.fields(self, empty=("tokens",), **ranges)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"base": 3, "width": np.int32(2), "layout": "whole", "trained": True, "limit": -1},
        {"grid": (2, 3), "ends": (3, 4), "tokens": (1,), "kind": Kind(), "path": "a", "later": 1},
    ],
)
def test_settings_that_are_right(settings):
    Settings(**settings)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("base", 1, "1; it must be above 1."),
        ("base", None, "None; it must be a finite number, above 1."),
        ("width", 1.0, "1.0; it must be an integer, at least 1."),
        ("layout", "Half", '\'Half\'; it must be "half" or "whole".'),
        ("trained", 0, "0; it must be True or False."),
        ("limit", 0.5, "0.5; it must be an integer, or None."),
        (
            "grid",
            (0,),
            "(0,); it must be a tuple of one or more integers, each at least 1, or None",
        ),
        ("grid", (), "(); it must be a tuple of one or more integers, each at least 1, or None."),
        ("ends", (1.0,), "(1.0,); it must be a tuple of 2 finite numbers."),
        ("tokens", ("a",), "('a',); it must be a tuple of integers."),
        ("kind", Kind, f"{Kind}; it must be an instance of Kind, or None."),
        ("path", None, "None; it must be a string."),
    ],
)
def test_settings_that_are_wrong(name, value, words):
    with pytest.raises(ValueError) as error:
        Settings(**{name: value})
    assert str(error.value).startswith(f"Settings {name} is {words}")


def test_fields_of_a_linen_module():
    class Layer(nn.Module):
        width: int = 1

        def __post_init__(self):
            checks.fields(self, "layer.", width=at_least(1))
            super().__post_init__()

    assert Layer(2, name="a").clone(width=3).width == 3
    with pytest.raises(ValueError, match=r"^layer\.width is 0; it must be at least 1\.$"):
        Layer(0)


def test_a_base_class_does_not_narrow_what_may_be_empty():
    @dataclasses.dataclass(frozen=True)
    class Base:
        def __post_init__(self):
            checks.fields(self)

    @dataclasses.dataclass(frozen=True)
    class Tokens(Base):
        tokens: tuple[int, ...] = ()

        def __post_init__(self):
            checks.fields(self, empty=("tokens",), tokens=at_least(0))
            super().__post_init__()

    assert Tokens().tokens == ()
    with pytest.raises(ValueError, match=r"it must be a tuple of integers, each at least 0\."):
        Tokens((-1,))


def test_limits_for_no_field_are_a_mistake_of_the_programmer():
    with pytest.raises(TypeError, match="Settings has no such number: widht"):
        checks.fields(Settings(), widht=at_least(1))


@checks.arguments(width=checks.size(2, multiple_of=2), scale=above(0))
def example(
    x: Num[Array, "B T D"],
    places: Int[Array, "#B T"],
    width: int = 2,
    scale: Float[Array, "D"] | float = 1.0,
    pair: tuple[Int[Array, "B"], Int[Array, "B"]] | None = None,
    rest: Num[Array, "*shape D"] | Bool[Array, "*shape D"] | None = None,
    again: Num[Array, "*shape"] | None = None,
    key: Array | None = None,
):
    return True


X, PLACES, ROW = np.ones((2, 3, 4)), np.ones((1, 3), int), np.ones(2, int)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"x": jax.ShapeDtypeStruct((2, 3, 4), jnp.bfloat16)},
        {"places": np.ones((2, 3), int)},
        {"scale": np.ones(4)},
        {"pair": (ROW, ROW)},
        {"rest": np.ones((5, 6, 4), bool), "again": np.ones((5, 6))},
        {"key": jax.random.PRNGKey(0)},
        {"key": jax.random.key(0)},
    ],
)
def test_arguments_that_are_right(change):
    assert example(**({"x": X, "places": PLACES} | change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": None}, "x is None; it must be an array [B, T, D]."),
        ({"x": X[0]}, "x has shape (3, 4); it must be [B, T, D]."),
        ({"x": X > 0}, "x has dtype bool; it must be an integer or a floating-point type."),
        ({"places": np.ones((3, 3), int)}, "places has shape (3, 3); it must be [1 or 2, 3]."),
        ({"places": np.ones((2, 4), int)}, "places has shape (2, 4); it must be [1 or 2, 3]."),
        ({"places": np.ones((1, 3))}, "places has dtype float64; it must be an integer type."),
        ({"width": 3}, "width is 3; it must be at least 2 and even."),
        ({"width": 10**9}, "width is 1000000000; it must be at most 1048576."),
        ({"scale": np.ones(3)}, "scale has shape (3,); it must be [4]."),
        ({"scale": 0.0}, "scale is 0.0; it must be above 0."),
        ({"pair": (ROW,)}, f"pair is {(ROW,)!r}; it must be a tuple of 2 arrays, or None."),
        ({"pair": (ROW, ROW[:1])}, "pair[1] has shape (1,); it must be [2]."),
        ({"rest": np.ones(4), "again": np.ones(5)}, "again has shape (5,); it must be []."),
        ({"rest": np.ones((5, 3))}, "rest has shape (5, 3); it must be [..., 4]."),
        ({"key": 3}, "key is 3; it must be a random key."),
        ({"key": jax.random.split(jax.random.key(0))}, "key has shape (2,); it must be []."),
    ],
)
def test_arguments_that_are_wrong(change, words):
    with pytest.raises(ValueError) as error:
        example(**({"x": X, "places": PLACES} | change))
    assert str(error.value) == words


def test_arguments_by_the_signature_of_another_function():
    @checks.arguments(example, width=at_least(1))
    def other(x, places, width=1):
        return width

    assert other(X, PLACES) == 1
    with pytest.raises(ValueError, match="width is 0"):
        other(X, PLACES, 0)
    with pytest.raises(ValueError, match="places has shape"):
        other(X, places=PLACES[:, :2])
