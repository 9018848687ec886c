"""The descriptions: their meaning, literally, and their properties."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posjax import ArrayBias, BiasSum, ContextualBias, RelativeBias, dot_product_attention
from posjax.biases.contextual import _interpolate, _interpolate_falling
from tests.cases import Case, arrays, linear, run


def literal_cope(query, key, table, scale, gate_bias=0.0, bias_scale=1.0):
    """CoPE for one head by loops over the paper's equations 3 to 6 and the clamp, in float64."""
    length, last = len(query), len(table) - 1
    bias = np.zeros((length, length))
    for i in range(length):
        position = 0.0
        for j in range(i, -1, -1):
            position += 1 / (1 + np.exp(-(scale * query[i] @ key[j] + gate_bias)))
            p = min(position, last)
            low, high = int(np.floor(p)), int(np.ceil(p))
            e = (p - low) * table[high] + (1 - p + low) * table[low]
            bias[i, j] = bias_scale * query[i] @ e
    return bias


def context(length: int, size: int = 8) -> dict:
    index = jnp.arange(length)[None]
    allowed = jnp.tril(jnp.ones((length, length), bool))[None, None]
    return {
        "scale": size**-0.5,
        "allowed": allowed,
        "query_positions": index,
        "key_positions": index,
    }


@pytest.mark.parametrize("settings", [{}, {"gate_bias": -1.0}, {"bias_scale": 8**-0.5}])
def test_dense_contextual_bias_is_the_papers_formula(settings):
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 9, 1, 8))
    table = jax.random.normal(jax.random.key(1), (4, 8))
    exact = [np.asarray(x, np.float64) for x in (query[0, :, 0], key[0, :, 0], table)]
    want = literal_cope(*exact, scale=8**-0.5, **settings)
    described = {n: jnp.float32(v) if n == "gate_bias" else v for n, v in settings.items()}
    got = ContextualBias(table, **described).dense(query, key, **context(9))[0, 0]
    np.testing.assert_allclose(np.tril(got), np.tril(want), atol=2e-6)


def test_gates_of_one_are_a_relative_table():
    """p_ij = min(i - j + 1, P - 1), so the bias is q_i . table at that row."""
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 9, 1, 8))
    table = jax.random.normal(jax.random.key(1), (4, 8))
    got = ContextualBias(table, None, jnp.float32(jnp.inf), gate_scale=0.0).dense(
        query, key, **context(9)
    )[0, 0]
    index = np.clip(np.arange(9)[:, None] - np.arange(9)[None, :] + 1, 0, 3)
    want = np.take_along_axis(np.asarray(query[0, :, 0] @ table.T), index, axis=1)
    np.testing.assert_allclose(np.tril(got), np.tril(want), atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_zero_table_is_no_encoding(implementation):
    case = Case(bias="cope")
    inputs, params = arrays(case)
    params["table"] = jnp.zeros_like(params["table"])
    want = run(dataclasses.replace(case, bias="none"), inputs, {}, implementation)
    np.testing.assert_allclose(run(case, inputs, params, implementation), want, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_same_vector_added_to_every_row_of_the_table_changes_nothing(implementation):
    case = Case(bias="cope")
    inputs, params = arrays(case)
    moved = params | {"table": params["table"] + jnp.arange(8.0)[None, :] * 0.1}
    got = run(case, inputs, moved, implementation)
    np.testing.assert_allclose(got, run(case, inputs, params, implementation), atol=2e-5)


def test_gradient_of_the_last_row_balances_the_others():
    """Softmax does not see a shift of the table, so its gradient sums to zero over positions."""
    case = Case(bias="cope")
    inputs, params = arrays(case)
    grad = jax.grad(lambda p: jnp.sum(run(case, inputs, p, "xla") ** 2))(params)["table"]
    assert float(jnp.max(jnp.abs(grad))) > 0.1
    np.testing.assert_allclose(jnp.sum(grad, axis=0), jnp.zeros(8), atol=1e-4)


def test_gate_gradients_against_finite_differences():
    case = Case(bias="cope", batch=1, heads=1, kv_heads=1, queries=12, keys=12)
    inputs, params = arrays(case)
    loss = jax.jit(lambda b: jnp.sum(run(case, inputs, params | {"gate_bias": b}, "xla") ** 2))
    step = 3e-3
    numeric = (loss(params["gate_bias"] + step) - loss(params["gate_bias"] - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(params["gate_bias"]), numeric, rtol=2e-2)


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 30))
def test_falling_interpolation_has_the_gradients_of_the_plain_one(seed, positions, keys):
    z_key, gate_key, weight_key = jax.random.split(jax.random.key(seed), 3)
    z = jax.random.normal(z_key, (1, 2, 3, positions))
    gates = jax.random.uniform(gate_key, (1, 2, 3, keys))
    count = jax.lax.cumsum(gates, axis=3, reverse=True)
    weights = jax.random.normal(weight_key, count.shape)
    plain, falling = (
        jax.jit(jax.value_and_grad(lambda z, c, f=f: jnp.sum(f(z, c) * weights), argnums=(0, 1)))(
            z, count
        )
        for f in (_interpolate, _interpolate_falling)
    )
    chex.assert_trees_all_close(falling, plain, rtol=0, atol=3e-5)


def test_counts_are_float32_whatever_the_inputs():
    """A bfloat16 sum of 300 gates would stop at 256."""
    query = jnp.ones((1, 300, 1, 8), jnp.bfloat16)
    table = jnp.arange(400.0)[:, None] * jnp.ones((1, 8)) / 8
    bias = ContextualBias(table, None, jnp.float32(jnp.inf), gate_scale=0.0)
    dense = bias.dense(query, query, **context(300))
    assert float(dense[0, 0, 299, 0]) == pytest.approx(300.0)


def test_relative_bias_is_its_function():
    slopes = jnp.array([1.0, 2.0])
    dense = RelativeBias(linear, slopes).dense(None, None, **context(3))
    assert dense[0].tolist() == [
        [[-0.0, -1.0, -2.0], [-1.0, -0.0, -1.0], [-2.0, -1.0, -0.0]],
        [[-0.0, -2.0, -4.0], [-2.0, -0.0, -2.0], [-4.0, -2.0, -0.0]],
    ]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_relative_bias_with_positions_of_its_own(implementation):
    """Positions of the description are not those of the mask, and may be fractions."""
    inputs, _ = arrays(Case())
    slopes = jnp.linspace(0.1, 0.5, 4)
    own = jnp.arange(33)[None].astype(jnp.float32) / 2

    def call(bias):
        return dot_product_attention(
            **inputs, bias=bias, is_causal=True, implementation=implementation
        )

    got = call(RelativeBias(linear, slopes, own, own))
    np.testing.assert_allclose(got, call(RelativeBias(linear, slopes / 2)), atol=1e-6)


def test_a_sum_is_the_sum_of_its_parts():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 5, 2, 8))
    parts = (
        ContextualBias(jax.random.normal(jax.random.key(1), (4, 8))),
        RelativeBias(linear, jnp.ones(2)),
        ArrayBias(jax.random.normal(jax.random.key(2), (1, 2, 5, 5))),
    )
    want = sum(part.dense(query, key, **context(5)) for part in parts)
    np.testing.assert_allclose(BiasSum(parts).dense(query, key, **context(5)), want, atol=1e-6)
