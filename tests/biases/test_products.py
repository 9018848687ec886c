"""Descriptions of low rank: loops over their formulas, and blocks of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import posjax.kernels.blocks
from posjax import dot_product_attention
from posjax.biases.products import ProductBias, SinusoidBias, sinusoid_frequencies

BATCH, LENGTH, HEADS, KV_HEADS, SIZE, WIDTH = 2, 11, 4, 2, 3, 6
PLACES = jnp.array([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3], [0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 14]])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


QUERY = normal(0, BATCH, LENGTH, HEADS, SIZE)
KEY, VALUE = normal(1, 2, BATCH, LENGTH, KV_HEADS, SIZE)


def dense(bias, scale=0.7):
    bias.check(QUERY, KEY, False)
    settings = {"scale": scale, "allowed": None}
    return bias.dense(QUERY, KEY, **settings, query_positions=PLACES, key_positions=PLACES)


def sinusoid(params, places=PLACES, **settings):
    return SinusoidBias(**params, query_positions=places, key_positions=places, **settings)


def params_of(seed=3):
    return {
        "kernel": normal(seed, WIDTH, HEADS, SIZE),
        "query_bias": normal(seed + 1, HEADS, SIZE),
        "key_logits": normal(seed + 2, BATCH, LENGTH, HEADS),
    }


def literal_sinusoids(params, base, scale):
    """Builds R_{i-j} for every pair, in float64."""
    exact = {name: np.asarray(x, np.float64) for name, x in params.items()}
    bias, places = np.zeros((BATCH, HEADS, LENGTH, LENGTH)), np.asarray(PLACES)
    queries = np.asarray(QUERY, np.float64)
    for b, n, i, j in np.ndindex(bias.shape):
        distance = places[b, i] - places[b, j]
        angles = distance / base ** (np.arange(0, WIDTH, 2) / WIDTH)
        sinusoids = np.concatenate((np.sin(angles), np.cos(angles)))
        query = queries[b, i, n] + exact["query_bias"][n]
        bias[b, n, i, j] = query @ (sinusoids @ exact["kernel"][:, n])
        bias[b, n, i, j] += exact["key_logits"][b, j, n]
    return scale * bias


@pytest.mark.parametrize("base", [10_000.0, 7.0])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_sinusoid_bias_is_its_formula(base, scaled):
    params = params_of()
    got = dense(sinusoid(params, base=base, scaled=scaled))
    want = literal_sinusoids(params, base, 0.7 if scaled else 1.0)
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_a_sinusoid_bias_depends_on_the_distance_only():
    params = params_of()
    run = jax.jit(lambda places: dense(sinusoid(params, places)))
    for shift in (-(2**20), 1, 2**20):
        np.testing.assert_array_equal(run(PLACES), run(PLACES + shift))


@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 4), (4, 2), (4, 1), (1, 1)])
def test_a_product_is_its_formula(query_heads, key_heads):
    f, g = normal(0, BATCH, LENGTH, query_heads, 5), normal(1, BATCH, LENGTH, key_heads, 5)
    factor = jnp.arange(1.0, 5.0)
    want, (f_exact, g_exact) = (
        np.zeros((BATCH, HEADS, LENGTH, LENGTH)),
        (np.asarray(x) for x in (f, g)),
    )
    for b, n, i, j in np.ndindex(want.shape):
        of_query = n if query_heads > 1 else 0
        of_key = of_query // (query_heads // key_heads)
        want[b, n, i, j] = (n + 1) * np.dot(f_exact[b, i, of_query], g_exact[b, j, of_key])
    np.testing.assert_allclose(dense(ProductBias(f, g, factor)), want, atol=2e-5)
    got = dense(ProductBias(f, g, factor, scaled=True))
    np.testing.assert_allclose(got, 0.7 * want, atol=2e-5)
    plain = jnp.broadcast_to(dense(ProductBias(f, g)), want.shape)
    np.testing.assert_allclose(plain, want / factor[None, :, None, None], atol=2e-5)


CASES = {
    "sinusoid": (sinusoid, params_of),
    "product": (
        lambda p: ProductBias(**p),
        lambda: {
            "query_features": normal(3, BATCH, LENGTH, HEADS, 5),
            "key_features": normal(4, BATCH, LENGTH, KV_HEADS, 5),
            "factor": jnp.arange(1.0, 5.0),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_parts_of_the_whole_with_its_gradients(case, monkeypatch):
    sizes = posjax.kernels.blocks.Blocks(4, 4)
    monkeypatch.setattr(posjax.kernels.blocks, "blockwise_sizes", lambda queries, keys: sizes)
    describe, arrays = CASES[case]

    def loss(params, inputs, implementation):
        settings = {"is_causal": True, "implementation": implementation}
        output = dot_product_attention(*inputs, describe(params), **settings)
        return jnp.sum(jnp.sin(output)), output

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    arguments = arrays(), (QUERY, KEY, VALUE)
    dense_one, blocks = grad(*arguments, "reference"), grad(*arguments, "xla")
    chex.assert_trees_all_close(blocks, dense_one, atol=3e-5)
    assert all(np.any(x) for x in jax.tree.leaves(dense_one[0][0]))


def test_frequencies_by_hand():
    np.testing.assert_allclose(sinusoid_frequencies(4, 10_000.0), [1.0, 0.01], rtol=1e-6)


def bad(name, shape):
    return sinusoid(params_of() | {name: jnp.zeros(shape)})


@pytest.mark.parametrize(
    ("bias", "words"),
    [
        (bad("kernel", (5, 4, 3)), r"kernel.shape\[0\] is 5; it must be even"),
        (bad("kernel", (6, 2, 3)), r"kernel has shape \(6, 2, 3\)"),
        (bad("query_bias", (3,)), r"query_bias has shape \(3,\); it must be \[4, 3\]"),
        (
            bad("key_logits", (2, 11, 2)),
            r"key_logits has shape \(2, 11, 2\); it must be \[2, 11, 4\]",
        ),
        (
            ProductBias(jnp.ones((2, 11, 2, 5)), jnp.ones((2, 11, 2, 5))),
            r"query_features has shape \(2, 11, 2, 5\); it must be \[2 or 1, 11, 4 or 1, E\]",
        ),
        (
            ProductBias(jnp.ones((2, 11, 4, 5)), jnp.ones((2, 11, 3, 5))),
            r"key_features has shape \(2, 11, 3, 5\); it must be \[2, 11, M, 5\] with M dividing 4",
        ),
        (
            ProductBias(jnp.ones((2, 11, 1, 5)), jnp.ones((2, 11, 1, 5)), jnp.ones(3)),
            r"factor has shape \(3,\); it must be \[\] or \[4\]",
        ),
    ],
)
def test_bad_arguments(bias, words):
    with pytest.raises(ValueError, match=words):
        dot_product_attention(QUERY, KEY, VALUE, bias)
