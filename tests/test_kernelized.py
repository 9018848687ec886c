import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax import ArrayBias, dot_product_attention
from posjax.kernelized import (
    KernelizedAttention,
    kernelized_attention,
    positive_features,
    random_projection,
)

RANDOM = np.random.default_rng(0)
causal_or_not = pytest.mark.parametrize("is_causal", [False, True])
directions = jax.jit(random_projection, static_argnums=(1, 2), static_argnames="orthogonal")
run = jax.jit(kernelized_attention, static_argnames=("is_causal", "implementation", "scale"))


def draw(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def inputs(length=7, heads=4, kv_heads=2, size=8, features=5, offsets=13, value_size=3):
    query, key = draw(2, length, heads, size), draw(2, length, kv_heads, size)
    projection = directions(jax.random.key(0), features, size)
    value = draw(2, length, kv_heads, value_size)
    return query, key, value, draw(heads, offsets), projection


def transcription(query, key, value, relative, projection, *, scale=1.0, is_causal=False):
    """The formula with loops over queries and keys, in float64."""
    arrays = (query, key, value, relative, projection)
    query, key, value, relative, projection = (np.asarray(x, np.float64) for x in arrays)
    batch, length, heads, _ = query.shape
    reach, groups = relative.shape[1] // 2, heads // key.shape[2]
    out = np.zeros((batch, length, heads, value.shape[3]))

    def phi(x):
        x = np.sqrt(scale) * x / np.linalg.norm(x)
        return np.exp(projection @ x - x @ x / 2) / np.sqrt(len(projection))

    for b, i, n in np.ndindex(batch, length, heads):
        total, of_query = 0.0, phi(query[b, i, n])
        for j in range(i + 1 if is_causal else length):
            c = np.exp(relative[n, reach + min(max(j - i, -reach), reach)])
            weight = c * (of_query @ phi(key[b, j, n // groups]))
            out[b, i, n] += weight * value[b, j, n // groups]
            total += weight
        out[b, i, n] /= total
    return out


@causal_or_not
@pytest.mark.parametrize("implementation", ["fft", "reference"])
@pytest.mark.parametrize(("length", "offsets", "scale"), [(7, 13, 1.0), (8, 5, 2.0), (1, 1, 1.0)])
def test_equals_the_formula(length, offsets, scale, is_causal, implementation):
    """With as many offsets as there are, with clipped ones, and alone; grouped heads."""
    arrays = inputs(length=length, offsets=offsets)
    settings = {"is_causal": is_causal, "scale": scale}
    out = run(*arrays, **settings, implementation=implementation)
    np.testing.assert_allclose(out, transcription(*arrays, **settings), atol=2e-5)


@causal_or_not
def test_gradients_equal_those_of_the_dense_form(is_causal):
    arrays, weights = inputs(length=9, offsets=9), draw(2, 9, 4, 3)

    @functools.partial(jax.jit, static_argnums=0)
    def grad(implementation, *arrays):
        settings = {"is_causal": is_causal, "implementation": implementation}
        loss = lambda *x: jnp.sum(kernelized_attention(*x, **settings) * weights)  # noqa: E731
        return jax.grad(loss, argnums=tuple(range(5)))(*arrays)

    for fast, dense in zip(grad("fft", *arrays), grad("reference", *arrays), strict=True):
        assert np.isfinite(fast).all() and np.any(fast)
        np.testing.assert_allclose(fast, dense, atol=1e-4)


def test_gradient_of_the_bias_equals_finite_differences():
    arrays, weights = inputs(offsets=5), RANDOM.normal(size=(2, 7, 4, 3))
    loss = lambda b: jnp.sum(run(*arrays[:3], b, arrays[4]) * jnp.float32(weights))  # noqa: E731
    direction = RANDOM.normal(size=arrays[3].shape)
    ends = [
        np.sum(
            transcription(*arrays[:3], np.asarray(arrays[3]) + s * direction, arrays[4]) * weights
        )
        for s in (1e-5, -1e-5)
    ]
    slope = np.sum(np.asarray(jax.grad(loss)(arrays[3])) * direction)
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-3)


@causal_or_not
def test_many_features_are_softmax_attention_with_the_bias(is_causal):
    length = 12
    query, key, value, relative, _ = inputs(length=length, offsets=2 * length - 1)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    place = np.arange(length)
    bias = ArrayBias(relative[:, place[None] - place[:, None] + length - 1][None])
    settings = {"is_causal": is_causal, "scale": 1.0}
    want = dot_product_attention(
        unit(query), unit(key), value, bias, **settings, implementation="reference"
    )
    errors = []
    for features in (64, 4096):
        projection = directions(jax.random.key(1), features, 8)
        out = run(query, key, value, relative, projection, **settings, implementation="reference")
        errors.append(float(jnp.mean(jnp.abs(out - want))))
    assert errors[0] > 4 * errors[1]
    assert errors[1] < 0.015


def test_products_of_features_are_exponentials_on_average():
    x = draw(6, 8)
    x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    want = jnp.exp(x @ x.T)
    for orthogonal in (True, False):
        projection = directions(jax.random.key(0), 40_000, 8, orthogonal=orthogonal)
        features = positive_features(x, projection)
        np.testing.assert_allclose(features @ features.T, want, rtol=0.1)
        assert (features > 0).all()


def test_directions_are_orthogonal_in_blocks_with_lengths_of_normal_vectors():
    projection = directions(jax.random.key(0), 4000, 8)
    assert projection.shape == (4000, 8)
    products = projection[8:16] @ projection[8:16].T
    np.testing.assert_allclose(products, jnp.diag(jnp.diag(products)), atol=1e-5)
    np.testing.assert_allclose(jnp.mean(projection**2), 1, rtol=0.05)
    squares = jnp.sum(projection**2, axis=1)
    np.testing.assert_allclose([jnp.mean(squares), jnp.std(squares)], [8, 4], rtol=0.1)


def test_is_causal_means_no_gradient_from_the_future():
    arrays = inputs(length=6, offsets=11)
    loss = lambda k, v: jnp.sum(run(arrays[0], k, v, *arrays[3:], is_causal=True)[:, 2])  # noqa: E731
    of_key, of_value = jax.grad(loss, argnums=(0, 1))(*arrays[1:3])
    for gradient in (of_key, of_value):
        np.testing.assert_allclose(gradient[:, 3:], 0, atol=1e-6)
        assert np.abs(gradient[:, :3]).max() > 1e-3


@causal_or_not
def test_lengths_of_query_and_key_and_a_common_bias_do_not_count(is_causal):
    query, key, value, relative, projection = inputs()
    out = run(query, key, value, relative, projection, is_causal=is_causal)
    same = run(3 * query, 0.1 * key, value, relative + 50, projection, is_causal=is_causal)
    np.testing.assert_allclose(out, same, atol=1e-4)


@causal_or_not
def test_equal_values_come_out(is_causal):
    """Weights sum to 1."""
    query, key, value, relative, projection = inputs(length=64, offsets=127)
    out = run(query, key, jnp.ones_like(value), relative, projection, is_causal=is_causal)
    np.testing.assert_allclose(out, jnp.ones_like(out), atol=1e-4)


@pytest.mark.parametrize(
    ("is_causal", "deviation", "tolerance"),
    [(False, 1.0, 1e-5), (True, 0.0, 3e-4), (True, 1.0, 3e-3)],
)
def test_rounding_errors_are_as_documented(is_causal, deviation, tolerance):
    query, key, value, relative, projection = inputs(length=512, offsets=1023)
    arrays = query, key, value, deviation * relative, projection
    exact = run(*arrays, is_causal=is_causal, implementation="reference")
    np.testing.assert_allclose(run(*arrays, is_causal=is_causal), exact, atol=tolerance)


def test_a_slope_over_the_distance_is_right_to_1e_5():
    query, key, value, _, projection = inputs(length=512)
    slope = -0.5 * jnp.abs(jnp.arange(-511.0, 512.0))
    arrays = query, key, value, jnp.stack((slope,) * 4), projection
    exact = run(*arrays, is_causal=True, implementation="reference")
    np.testing.assert_allclose(run(*arrays, is_causal=True), exact, atol=1e-5)


def test_biases_too_far_apart_and_zero_vectors_stay_finite():
    """Denominators lost in rounding errors, negative ones too, do not blow outputs up."""
    query, key, value, relative, projection = inputs(length=64, offsets=127)
    out = run(query, key, value, 30 * relative, projection, is_causal=True)
    assert jnp.max(jnp.abs(out)) < 3 * jnp.max(jnp.abs(value))
    loss = lambda q: jnp.sum(run(q, key, value, relative, projection, is_causal=True))  # noqa: E731
    assert np.isfinite(jax.grad(loss)(0 * query)).all()


def test_bfloat16_is_float32_inside():
    arrays = inputs(length=32, offsets=63)
    narrow = tuple(x.astype(jnp.bfloat16) for x in arrays[:3])
    out = run(*narrow, *arrays[3:])
    assert out.dtype == jnp.bfloat16
    exact = run(*(x.astype(jnp.float32) for x in narrow), *arrays[3:])
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))
    np.testing.assert_allclose(out.astype(jnp.float32), run(*arrays), atol=0.03)


def test_module_has_a_bias_and_directions_of_its_seed():
    query, key, value, *_ = inputs(length=6)
    module = KernelizedAttention(max_distance=4, features=16)
    variables = jax.jit(module.init)(jax.random.key(0), query, key, value)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"relative": (4, 9)}}
    assert not variables["params"]["relative"].any()
    relative = draw(4, 9)
    other = module.clone(seed=3)
    out = jax.jit(
        lambda *arrays: other.apply({"params": {"relative": relative}}, *arrays, is_causal=True)
    )(query, key, value)
    ours, default = (
        run(
            query,
            key,
            value,
            relative,
            directions(jax.random.key(seed), 16, 8),
            is_causal=True,
        )
        for seed in (3, 0)
    )
    np.testing.assert_allclose(out, ours, atol=1e-5)
    assert not np.allclose(out, default, atol=1e-3)
