import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import LogLength
from posjax.encodings.base import Side
from posjax.encodings.log_length import log_factors

X = jax.random.normal(jax.random.key(0), (2, 4, 3, 8))
PLACES = jnp.array([[0, 1, 15, 16], [3, 255, 5000, 100_000]])


@pytest.mark.parametrize("minimum", [0.0, 1.0])
def test_queries_are_multiplied_by_the_formula(minimum):
    encoding = LogLength(trained_length=16, minimum=minimum)
    query, key = encoding.apply({}, Side(X, PLACES), Side(X, PLACES), method="rotate")
    for b, t in np.ndindex(2, 4):
        factor = max(math.log(int(PLACES[b, t]) + 1) / math.log(16), minimum)
        np.testing.assert_allclose(query[b, t], X[b, t] * factor, rtol=1e-5)
    np.testing.assert_array_equal(key, X)


def test_is_one_at_the_trained_length_and_grows():
    factors = np.asarray(log_factors(jnp.arange(100)[None], 32))[0]
    np.testing.assert_allclose(factors[31], 1.0, rtol=1e-6)
    assert (np.diff(factors) > 0).all()
    clipped = np.asarray(log_factors(jnp.arange(100)[None], 32, 1.0))[0]
    assert (clipped[:32] == 1).all()
    np.testing.assert_array_equal(clipped[32:], factors[32:])
    assert LogLength.clipped().minimum == 1.0


def test_undoes_the_spread_of_a_gaussian_key():
    """The weight of one key that is ln n better than n others stays as n grows."""
    for length in (16, 256, 4096):
        factor = float(log_factors(jnp.array([[length - 1]]), 16)[0, 0])
        best = math.exp(factor * math.log(16) * 2)
        assert best / (best + length) > 0.9


def test_computes_in_float32_and_keeps_the_dtype():
    places = jnp.array([[1000, 1001, 1002, 1003]])
    narrow = Side(X.astype(jnp.bfloat16), places)
    wide = narrow._replace(x=narrow.x.astype(jnp.float32))
    query, exact = (
        LogLength().apply({}, side, side, method="rotate")[0] for side in (narrow, wide)
    )
    assert query.dtype == jnp.bfloat16
    np.testing.assert_array_equal(query, exact.astype(jnp.bfloat16))
