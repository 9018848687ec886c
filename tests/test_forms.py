"""Forms of arguments: what is known of them in a trace, and what is refused there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import posjax
from posjax import dot_product_attention, forms

QUERY = jnp.ones((2, 3, 2, 4))


def attention(query, **settings):
    return dot_product_attention(query, query, query, **settings)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.grad])
@pytest.mark.parametrize(
    "settings, words",
    [
        ({"mask": np.full((3, 3), 0.5)}, "mask holds 0.5"),
        ({"mask": np.array([[1, 0, -2]])}, "mask holds -2"),
        ({"key_value_seq_lengths": np.array([3, 4])}, r"\[3, 4\]; it must be from 0 to 3"),
        ({"query_seq_lengths": [-1, 3]}, r"\[-1, 3\]; it must be from 0 to 3"),
    ],
)
def test_numbers_that_are_known_are_checked_in_a_trace_too(settings, words, transform):
    with pytest.raises(ValueError, match=words):
        transform(lambda query: jnp.sum(attention(query, **settings)))(QUERY)


def test_numbers_that_are_not_known_give_nan():
    call = jax.jit(lambda query, mask: attention(query, mask=mask))
    assert jnp.all(jnp.isnan(call(QUERY, jnp.full((3, 3), 0.5))))
    np.testing.assert_array_equal(call(QUERY, jnp.ones((3, 3))), QUERY)


@pytest.mark.parametrize("of_queries", [None, np.array([2, 3]), jnp.array([2, 3]), [2, 3]])
@pytest.mark.parametrize("of_keys", [None, np.array([0, 3]), jnp.array([0, 3]), (0, 3)])
def test_lengths_in_every_form(of_queries, of_keys):
    output = attention(QUERY, query_seq_lengths=of_queries, key_value_seq_lengths=of_keys)
    want = np.ones((2, 3))
    if of_queries is not None:
        want[0, 2] = 0
    if of_keys is not None:
        want[0] = 0
    np.testing.assert_array_equal(output[..., 0, 0], want)


def test_what_is_known():
    seen = {}

    def traced(x):
        numbers = {"tracer": x, "numpy": np.ones(2), "list": [1, 2], "mixed": [1, x[0]]}
        seen.update({name: forms.known(x) is not None for name, x in numbers.items()})
        return x

    jax.jit(traced)(jnp.ones(2))
    assert seen == {"tracer": False, "numpy": True, "list": True, "mixed": False}
    assert forms.known(jax.ShapeDtypeStruct((2,), jnp.float32)) is None
    np.testing.assert_array_equal(forms.known(jnp.ones(2)), np.ones(2))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_sink_of_minus_infinity_is_none(implementation):
    """Also for a query that sees nothing, and in the gradients."""
    mask = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 1]])

    def call(query, sinks):
        settings = {"mask": mask, "sinks": sinks, "implementation": implementation}
        output, log_sum_exp = attention(query, **settings, return_residual=True)
        return jnp.sum(output**2), (output, log_sum_exp)

    compute = jax.value_and_grad(call, (0, 1), has_aux=True)
    (_, (output, log_sum_exp)), (of_query, of_sinks) = compute(QUERY, jnp.array([-jnp.inf, 0.0]))
    want = call(QUERY, None)[1]
    np.testing.assert_allclose(output[:, :, 0], want[0][:, :, 0], rtol=1e-6)
    np.testing.assert_allclose(log_sum_exp[:, :, 0], want[1][:, :, 0], rtol=1e-6)
    assert jnp.all(jnp.isfinite(of_query)) and jnp.all(of_query[:, 1] != 0)
    assert of_sinks[0] == 0 and of_sinks[1] != 0


@pytest.mark.parametrize("settings", [{"sinks": jnp.ones(2)}, {"return_residual": True}])
def test_what_belongs_to_a_softmax_needs_one(settings):
    bias = posjax.StickBreakingBias()
    with pytest.raises(ValueError, match="for a softmax, and attention with StickBreakingBias has"):
        attention(QUERY, bias=bias, is_causal=True, **settings)


@pytest.mark.parametrize("keys", [0, 3])
def test_no_queries_and_no_keys(keys):
    """The log-sum-exp is that of the sinks alone."""
    key = QUERY[:, :keys]
    call = lambda query, sinks: dot_product_attention(  # noqa: E731
        query, key, key, sinks=sinks, return_residual=True
    )
    output, log_sum_exp = call(QUERY, jnp.array([1.0, 2.0]))
    assert call(QUERY[:, :0], None)[0].shape == (2, 0, 2, 4)
    if not keys:
        assert jnp.all(output == 0)
        np.testing.assert_array_equal(log_sum_exp, np.broadcast_to([1.0, 2.0], (2, 3, 2)))
        assert jnp.all(call(QUERY, None)[1] == -jnp.inf)
