import jax
import jax.numpy as jnp
import numpy as np
import pytest

import posjax.kernels.blocks
from posjax import BiasSum, ForgettingBias, StickBreakingBias, dot_product_attention
from posjax.encodings import StickBreaking
from posjax.encodings.base import Side

QUERY, KEY, VALUE = jax.random.normal(jax.random.key(0), (3, 2, 40, 2, 4))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    sizes = posjax.kernels.blocks.Blocks(8, 8)
    monkeypatch.setattr(posjax.kernels.blocks, "blockwise_sizes", lambda queries, keys: sizes)


def weights_by_hand(query, key, attend_current):
    """Shares of the stick in a loop from the query leftwards."""
    beta = 1 / (1 + np.exp(-np.einsum("bind,bjnd->bnij", query, key) * query.shape[-1] ** -0.5))
    weights = np.zeros_like(beta)
    for i in range(beta.shape[2]):
        left = np.ones(beta.shape[:2])
        for j in range(i if attend_current else i - 1, -1, -1):
            weights[:, :, i, j] = beta[:, :, i, j] * left
            left = left * (1 - beta[:, :, i, j])
    return weights


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("attend_current", [False, True])
@pytest.mark.parametrize("sharpness", [1.0, 40.0])
def test_equals_shares_by_hand(implementation, attend_current, sharpness):
    """Also where the stick is used up within a few keys, so that the walk ends early."""
    query = sharpness * QUERY
    bias = StickBreakingBias(attend_current)
    output = dot_product_attention(
        query, KEY, VALUE, bias, is_causal=True, implementation=implementation
    )
    query, key, value = (np.asarray(x, np.float64) for x in (query, KEY, VALUE))
    weights = weights_by_hand(query, key, attend_current)
    # Logits near 100 have float32 errors near 1e-5, which weights inherit.
    tolerance = 1e-5 if sharpness == 1 else 1e-3
    want = np.einsum("bnij,bjnd->bind", weights, value)
    np.testing.assert_allclose(output, want, atol=tolerance)
    assert (weights.sum(-1) <= 1 + 1e-5).all()


def test_the_first_token_sees_nothing_or_itself():
    none = dot_product_attention(QUERY, KEY, VALUE, StickBreakingBias(), is_causal=True)
    assert not none[:, 0].any()
    own = dot_product_attention(QUERY, KEY, VALUE, StickBreakingBias(True), is_causal=True)
    share = jax.nn.sigmoid(0.5 * jnp.sum(QUERY * KEY, axis=-1, keepdims=True)) * VALUE
    np.testing.assert_allclose(own[:, 0], share[:, 0], rtol=1e-5)


def test_the_walk_ends_where_nothing_is_left():
    """Far keys that would poison everything are never read."""
    key = jnp.ones_like(KEY)
    poisoned = key.at[:, :8].set(jnp.nan)
    query = 400.0 * jnp.ones_like(QUERY)
    run = lambda key: dot_product_attention(  # noqa: E731
        query, key, VALUE, StickBreakingBias(), is_causal=True, implementation="xla"
    )
    np.testing.assert_array_equal(run(poisoned)[:, 24:], run(key)[:, 24:])
    assert np.isnan(run(poisoned)[:, 8:16]).any()


def test_no_bias_can_be_added():
    both = BiasSum((StickBreakingBias(), ForgettingBias(jnp.zeros((2, 40, 2)))))
    with pytest.raises(ValueError, match="StickBreakingBias replaces softmax"):
        dot_product_attention(QUERY, KEY, VALUE, both, is_causal=True)


def test_the_encoding_hands_its_setting_on():
    side = Side(QUERY, None)
    bias = StickBreaking(attend_current=True).apply({}, side, side, method="bias")
    assert bias == StickBreakingBias(attend_current=True)
