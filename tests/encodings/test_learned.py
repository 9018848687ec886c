import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import LearnedAbsolute
from posjax.encodings.learned import lookup
from posjax.positions import LengthError

TABLE = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
VARIABLES = {"params": {"table": TABLE}}


def embed(positions, dtype=jnp.float32):
    x = jnp.full((*positions.shape, 2), 10.0, dtype)
    return LearnedAbsolute(max_length=3).apply(VARIABLES, x, positions, method="embed")


def test_adds_the_rows_of_the_positions():
    out = embed(jnp.array([[0, 2], [1, 1]]))
    assert out.tolist() == [[[11, 12], [15, 16]], [[13, 14], [13, 14]]]
    assert embed(jnp.array([[2]]), dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_starts_with_the_deviation_asked_for():
    encoding = LearnedAbsolute(max_length=500, initial_deviation=0.1)
    x, positions = jnp.zeros((1, 1, 64)), jnp.zeros((1, 1), jnp.int32)
    params = encoding.init(jax.random.key(0), x, positions, method="embed")["params"]
    assert {name: (x.shape, x.dtype) for name, x in params.items()} == {
        "table": ((500, 64), jnp.float32)
    }
    np.testing.assert_allclose(jnp.std(params["table"]), 0.1, rtol=0.05)


def test_only_used_rows_get_gradients():
    def loss(table):
        return jnp.sum(lookup(table, jnp.array([[0, 2, 2]])))

    assert jax.grad(loss)(TABLE).tolist() == [[1, 1], [0, 0], [2, 2]]


def test_a_longer_sequence_is_refused_when_traced():
    with pytest.raises(LengthError, match=r"LearnedAbsolute has max_length=3.* has 4 tokens"):
        jax.jit(embed)(jnp.zeros((1, 4), jnp.int32))
    assert issubclass(LengthError, ValueError)


@pytest.mark.parametrize("position", [3, 1000, -1])
def test_a_position_outside_the_table_is_refused_where_it_is_known(position):
    with pytest.raises(LengthError, match=f"position {position} is not in a table of 3 rows"):
        embed(jnp.array([[0, position]]))


@pytest.mark.parametrize("position", [3, 1000, -1, -3])
def test_a_position_outside_the_table_is_nan_where_it_is_not_known(position):
    out = jax.jit(embed)(jnp.array([[2, position]]))
    assert np.isnan(out[0, 1]).all()
    assert np.isfinite(out[0, 0]).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_length": 0}, "max_length is 0; it must be at least 1"),
        ({"initial_deviation": -0.1}, "initial_deviation is -0.1; it must be 0 or more"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        LearnedAbsolute(**settings)
