import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import (
    T5,
    Abacus,
    ALiBi,
    BiPE,
    Combine,
    Interpolated,
    Learned,
    Randomized,
    RoPE,
    Sinusoidal,
)
from posjax.encodings.base import Side
from posjax.encodings.t5 import t5_buckets
from posjax.frequencies import Linear
from posjax.positions import LengthError

X = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
PLACES = jnp.array([[0, 1, 7, 300, 2000]])
TOKENS = jnp.zeros_like(PLACES)


def indices_of(encoding):
    return encoding.apply({}, TOKENS, PLACES, method="positions")[0]


def test_rope_inside_is_rope_with_slower_frequencies():
    encoding = Interpolated(trained_length=100, target_length=400)
    indices = indices_of(encoding)
    got = encoding.apply({}, Side(X, indices), Side(X, indices), method="rotate")
    want = RoPE(scaling=Linear(factor=4.0)).apply(
        {}, Side(X, PLACES), Side(X, PLACES), method="rotate"
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_last_position_of_the_target_is_within_the_trained_range():
    encoding = Interpolated(trained_length=2001, target_length=6003)
    assert indices_of(encoding).dtype == jnp.float32
    np.testing.assert_allclose(indices_of(encoding)[0], PLACES[0] / 3, rtol=1e-6)
    same = Interpolated(trained_length=8, target_length=8)
    np.testing.assert_array_equal(indices_of(same), PLACES)


def test_alibi_inside_has_smaller_slopes():
    encoding = Interpolated(ALiBi(), trained_length=1, target_length=2)
    indices = indices_of(encoding)
    none = {"query_positions": None, "key_positions": None, "scale": 1.0, "allowed": None}
    got = encoding.apply({}, Side(X, indices), Side(X, indices), method="bias").dense(X, X, **none)
    want = ALiBi().apply({}, Side(X, PLACES), Side(X, PLACES), method="bias").dense(X, X, **none)
    np.testing.assert_allclose(got, want / 2, rtol=1e-6)


def test_sinusoids_inside_are_those_of_fractions():
    encoding = Interpolated(Sinusoidal(), trained_length=3, target_length=6)
    x = jnp.zeros((1, 5, 16))
    got = encoding.apply({}, x, indices_of(encoding), method="embed")
    even = jnp.array([[0, 2, 14, 600, 4000]])
    indices = encoding.apply({}, TOKENS, even, method="positions")[0]
    want = Sinusoidal().apply({}, x, PLACES, method="embed")
    np.testing.assert_allclose(
        encoding.apply({}, x, indices, method="embed"), want, rtol=1e-5, atol=1e-5
    )
    assert not np.allclose(got, want)


def test_a_trained_table_is_interpolated():
    encoding = Interpolated(Learned(max_length=4), trained_length=4, target_length=8)
    table = jnp.array([[0.0], [4.0], [8.0], [0.0]])
    x, places = jnp.zeros((1, 8, 1)), jnp.arange(8)[None]
    indices, _ = encoding.apply({}, jnp.zeros_like(places), places, method="positions")
    variables = {"params": {"encoding": {"table": table}}}
    rows = encoding.apply(variables, x, indices, method="embed")
    assert rows[0, :, 0].tolist() == [0, 2, 4, 6, 8, 4, 0, 0]


def test_t5_inside_rounds_distances():
    encoding = Interpolated(T5(share_layers=False), trained_length=1, target_length=4)
    indices, places = indices_of(encoding), jnp.round(PLACES / 4).astype(jnp.int32)
    table = jax.random.normal(jax.random.key(0), (32, 2))
    bias = encoding.apply(
        {"params": {"encoding": {"table": table}}},
        Side(X, indices),
        Side(X, indices),
        method="bias",
    )
    none = {"query_positions": None, "key_positions": None, "scale": 1.0, "allowed": None}
    dense = bias.dense(X, X, **none)[0, :, -1]  # the last query is at a whole position
    np.testing.assert_array_equal(dense, table[t5_buckets(places[0] - places[0, -1])].T)


@pytest.mark.parametrize("promotion", ["strict", "standard"])
@pytest.mark.parametrize(
    "inner", [Abacus(digits=(0,)), BiPE(), Randomized(), Combine((ALiBi(), BiPE()))]
)
def test_encodings_with_indices_of_their_own_are_refused(inner, promotion):
    name = type(inner).__name__
    with jax.numpy_dtype_promotion(promotion), pytest.raises(ValueError) as error:
        indices_of(Interpolated(inner))
    # Strict promotion may refuse the fractions first.
    assert f"{name} " in str(error.value) or promotion == "strict"
    assert "put Interpolated inside it" in str(error.value) or promotion == "strict"


def test_the_table_ends_where_the_squeezed_positions_end():
    learned = Interpolated(Learned(max_length=4), trained_length=4, target_length=8)
    variables = {"params": {"encoding": {"table": jnp.ones((4, 1))}}}
    assert learned.beyond == "raises"
    with pytest.raises(LengthError):
        learned.apply(variables, jnp.zeros((1, 5, 1)), indices_of(learned), method="embed")
