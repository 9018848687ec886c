"""The families of biases; each encoding has its own file of tests."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import registry
from posjax.encodings.base import Side, Sizes
from posjax.encodings.distance import DistanceBias, OfDistance, TrainedBias

PLACES = jnp.array([[0, 1, 5, 30, 200]])
SIDE = Side(jnp.ones((1, 5, 4, 8)), PLACES)
SIZES = Sizes(4, 4, 8)
CLASSES = [cls for cls in registry.classes().values() if issubclass(cls, TrainedBias)]
SHARING = [cls for cls in CLASSES if "share_layers" in inspect.signature(cls).parameters]
OF_POSITIONS = [cls for cls in CLASSES if issubclass(cls, DistanceBias)]


@pytest.mark.parametrize("cls", SHARING)
def test_arrays_of_all_layers_are_made_once_and_handed_over(cls):
    encoding = cls(share_layers=True)
    shared, variables = encoding.init_with_output(jax.random.key(0), SIZES, method="shared")
    assert variables["params"]
    left = encoding.init(jax.random.key(0), SIDE, SIDE, shared, method="bias").get("params", {})
    assert not set(left) & set(variables["params"])
    with pytest.raises(ValueError, match=f"{cls.__name__} has share_layers=True, but shared is"):
        encoding.apply(variables, SIDE, SIDE, method="bias")


@pytest.mark.parametrize("cls", SHARING)
def test_arrays_of_each_layer_are_made_by_bias(cls):
    encoding = cls(share_layers=False)
    assert encoding.init_with_output(jax.random.key(0), SIZES, method="shared") == (None, {})
    assert encoding.init(jax.random.key(0), SIDE, SIDE, method="bias")["params"]


@pytest.mark.parametrize("cls", OF_POSITIONS)
def test_functions_are_equal_by_value_and_of_the_distance_if_they_say_so(cls):
    function = cls().function(4)
    assert function == cls().function(4)
    assert hash(function) == hash(cls().function(4))
    params = cls().init_with_output(jax.random.key(0), SIZES, method="parameters")[0]
    here, there = (function(params, x, x) for x in (PLACES, PLACES + 4096))
    assert (np.abs(here - there).max() == 0) == cls.distance_only


def test_distance_is_the_query_less_the_key():
    function = OfDistance(lambda params, distance: params * distance)
    got = function(2, jnp.array([[7, 1]]), jnp.array([[3, 4, 5]]))
    assert got.tolist() == [[[[8, 6, 4], [-4, -6, -8]]]]


def test_a_distance_bias_must_say_its_function():
    with pytest.raises(NotImplementedError, match="DistanceBias must define function"):
        DistanceBias().apply({}, SIDE, SIDE, method="bias")
