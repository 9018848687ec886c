import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax import ForgettingBias, dot_product_attention
from posjax.encodings import Forgetting
from posjax.encodings.base import Sizes
from posjax.encodings.forgetting import bias_for_decay_times

SIZES = Sizes(heads=3, kv_heads=1, head_size=4)
X = jax.random.normal(jax.random.key(0), (2, 6, 5))


def plain_form(query, key, value, log_gates):
    """The official code's decoding path: differences of cumulative sums, then softmax."""
    total = np.cumsum(np.asarray(log_gates), axis=1)  # [B, T, N]
    logits = np.einsum("bind,bjnd->bnij", query, key) * query.shape[-1] ** -0.5
    logits += np.moveaxis(total, 2, 1)[..., :, None] - np.moveaxis(total, 2, 1)[..., None, :]
    logits = np.where(np.tri(query.shape[1], dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnij,bjnd->bind", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_equals_the_official_plain_form(implementation):
    query, key, value = jax.random.normal(jax.random.key(1), (3, 2, 6, 3, 4))
    gates = jax.nn.log_sigmoid(jax.random.normal(jax.random.key(2), (2, 6, 3)))
    output = dot_product_attention(
        query, key, value, ForgettingBias(gates), is_causal=True, implementation=implementation
    )
    np.testing.assert_allclose(output, plain_form(query, key, value, gates), atol=1e-5)


def test_gates_are_a_linear_map_of_the_inputs():
    encoding = Forgetting()
    variables = encoding.init(jax.random.key(0), X, SIZES, method="cache")
    params = variables["params"]
    assert jax.tree.map(jnp.shape, params) == {"kernel": (5, 3), "bias": (3,)}
    assert not params["bias"].any()
    wide = Forgetting(initial_deviation=0.5).init(
        jax.random.key(0), jnp.ones((1, 1, 4000)), SIZES, method="cache"
    )
    np.testing.assert_allclose(jnp.std(wide["params"]["kernel"]), 0.5, rtol=0.05)
    params = {"kernel": params["kernel"] * 50, "bias": jnp.array([1.0, 0.0, -1.0])}
    gates = encoding.apply({"params": params}, X, SIZES, method="cache")
    kernel, shift = (np.asarray(params[name]) for name in ("kernel", "bias"))
    want = np.log(1 / (1 + np.exp(-(np.asarray(X) @ kernel + shift))))
    np.testing.assert_allclose(gates, want, atol=1e-5)


def test_decay_times_are_when_a_key_has_faded_to_one_over_e():
    gates = jax.nn.sigmoid(bias_for_decay_times(3, 2.0, 50.0))
    np.testing.assert_allclose(gates ** jnp.array([2.0, 10.0, 50.0]), np.exp(-1.0), rtol=1e-4)


def test_gates_that_look_at_nothing():
    trained = Forgetting(gate="bias_only", decay_times=(2.0, 50.0))
    variables = trained.init(jax.random.key(0), X, SIZES, method="cache")
    want = bias_for_decay_times(3, 2.0, 50.0)
    assert list(variables["params"]) == ["bias"]
    np.testing.assert_array_equal(variables["params"]["bias"], want)
    gates = Forgetting(gate="fixed", decay_times=(2.0, 50.0)).apply({}, X, SIZES, method="cache")
    np.testing.assert_allclose(gates[1, 3], jax.nn.log_sigmoid(want))
    np.testing.assert_array_equal(gates, trained.apply(variables, X, SIZES, method="cache"))


def test_a_gate_of_zero_separates_and_gates_of_one_are_nope():
    query, key, value = jax.random.normal(jax.random.key(1), (3, 1, 5, 1, 4))
    open_gates = jnp.zeros((1, 5, 1))
    run = lambda gates: dot_product_attention(  # noqa: E731
        query, key, value, None if gates is None else ForgettingBias(gates), is_causal=True
    )
    np.testing.assert_allclose(run(open_gates), run(None), atol=1e-6)
    shut = run(open_gates.at[0, 2].set(-1e9))
    alone = dot_product_attention(query[:, 2:], key[:, 2:], value[:, 2:], is_causal=True)
    np.testing.assert_allclose(shut[:, 2:], alone, atol=1e-6)


def test_bad_gates():
    q = jnp.ones((1, 3, 2, 4))
    with pytest.raises(
        ValueError, match=r"log_gates has shape \(1, 3, 1\); it must be \[1, 3, 2\]"
    ):
        dot_product_attention(q, q, q, ForgettingBias(jnp.zeros((1, 3, 1))), is_causal=True)
