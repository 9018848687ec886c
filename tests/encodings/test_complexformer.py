import cmath
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import ComplexFormer, RoPE
from posjax.encodings.base import Side
from posjax.encodings.complexformer import phases

QUERY, KEY = jax.random.normal(jax.random.key(0), (2, 2, 3, 4, 6))
PLACES = jnp.array([[0, 1, 9], [100, 3, 40]])
LAYOUTS = pytest.mark.parametrize("layout", ["half", "interleaved"])


@functools.partial(jax.jit, static_argnames="layout")
def logits(variables, query, key, places=PLACES, layout="half"):
    encoding = ComplexFormer(layout=layout)
    query, key = encoding.apply(variables, Side(query, places), Side(key, places), method="rotate")
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    return jnp.einsum("btnh,bsnh->bnts", query, key)


def variables_of(scale, shift):
    return {"params": {"scale": jnp.asarray(scale, jnp.float32), "shift": jnp.asarray(shift)}}


def slow_logit(query, key, distance, scale, shift, layout):
    """The formula for one query and key, in Python's numbers."""
    size, total = len(query), 0.0
    for m in range(size // 2):
        at = (m, m + size // 2) if layout == "half" else (2 * m, 2 * m + 1)
        (r, s), (p, t) = (cmath.polar(complex(x[at[0]], x[at[1]])) for x in (query, key))
        adapted = scale * (s - t) + shift
        total += r * p * cmath.cos(adapted + distance * 10_000.0 ** (-2 * m / size)).real
    return total


def slow_logits(query, key, scale, shift, layout="half"):
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    found, group = np.zeros((2, 4, 3, 3)), 4 // key.shape[2]
    for b, n, t, s in np.ndindex(found.shape):
        heads, distance = (query[b, t, n], key[b, s, n // group]), int(PLACES[b, t] - PLACES[b, s])
        found[b, n, t, s] = slow_logit(*heads, distance, scale[n // group], shift[n], layout)
    return found


@LAYOUTS
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_the_formula(layout, kv_heads):
    scale, shift, key = (
        [0.7, -1.2, 2.5, 1.0][:kv_heads],
        [0.1, -0.6, 3.0, 0.0],
        KEY[:, :, :kv_heads],
    )
    found = logits(variables_of(scale, shift), QUERY, key, layout=layout)
    np.testing.assert_allclose(found, slow_logits(QUERY, key, scale, shift, layout), atol=1e-3)


@LAYOUTS
def test_starts_as_rope(layout):
    encoding = ComplexFormer(layout=layout)
    turned, variables = encoding.init_with_output(
        jax.random.key(0), Side(QUERY, PLACES), Side(KEY[:, :, :2], PLACES), method="rotate"
    )
    assert variables["params"]["scale"].tolist() == [1, 1]
    assert variables["params"]["shift"].tolist() == [0, 0, 0, 0]
    rope = RoPE(layout=layout).apply(
        {}, Side(QUERY, PLACES), Side(KEY[:, :, :2], PLACES), method="rotate"
    )
    for ours, theirs in zip(turned, rope, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_gradients_equal_finite_differences_of_the_formula():
    scale, shift = np.array([0.7, -1.2, 2.5, 1.0]), np.array([0.1, -0.6, 3.0, 0.0])
    weights = np.random.default_rng(0).normal(size=(2, 4, 3, 3))

    def loss(variables, query):
        return jnp.sum(logits(variables, query, KEY) * jnp.asarray(weights, jnp.float32))

    def slow(scale, shift, query=QUERY):
        return np.sum(slow_logits(query, KEY, scale, shift) * weights)

    of_params, of_query = jax.grad(loss, argnums=(0, 1))(variables_of(scale, shift), QUERY)
    step = 1e-6
    for head in range(4):
        up = step * np.eye(4)[head]
        want = (slow(scale + up, shift) - slow(scale - up, shift)) / (2 * step)
        np.testing.assert_allclose(of_params["params"]["scale"][head], want, atol=5e-3)
        want = (slow(scale, shift + up) - slow(scale, shift - up)) / (2 * step)
        np.testing.assert_allclose(of_params["params"]["shift"][head], want, atol=5e-3)
    query = np.asarray(QUERY, np.float64)
    for at in ((0, 1, 0, 2), (1, 2, 3, 5)):
        up = np.zeros_like(query)
        up[at] = step
        want = (slow(scale, shift, query + up) - slow(scale, shift, query - up)) / (2 * step)
        np.testing.assert_allclose(of_query[at], want, atol=5e-3)


def test_magnitudes_stay_and_phases_are_of_each_pair():
    variables = variables_of([0.3] * 4, [1.0] * 4)
    query, _ = ComplexFormer().apply(
        variables, Side(QUERY, PLACES), Side(KEY, PLACES), method="rotate"
    )
    radius = lambda x: jnp.hypot(x[..., :3], x[..., 3:])  # noqa: E731
    np.testing.assert_allclose(radius(query), radius(QUERY), rtol=1e-4)
    query = np.asarray(QUERY)
    np.testing.assert_allclose(
        phases(QUERY), np.angle(query[..., :3] + 1j * query[..., 3:]), rtol=1e-6
    )
    pairs = np.angle(query[..., ::2] + 1j * query[..., 1::2])
    np.testing.assert_allclose(phases(QUERY, "interleaved"), pairs, rtol=1e-6)


def test_depends_on_the_distance_only():
    variables = variables_of([0.7, -1.2, 2.5, 1.0], [0.1, -0.6, 3.0, 0.0])
    here, there = (logits(variables, QUERY, KEY, PLACES + shift) for shift in (0, 55))
    np.testing.assert_allclose(here, there, atol=2e-3)


def test_pairs_of_zeros_have_finite_gradients():
    zeros = jnp.zeros_like(QUERY)
    gradients = jax.grad(lambda q: jnp.sum(logits(variables_of([0.5] * 4, [1.0] * 4), q, KEY)))
    assert np.isfinite(gradients(zeros)).all()
    assert not logits(variables_of([0.5] * 4, [1.0] * 4), zeros, KEY).any()


def test_channels_must_come_in_pairs():
    with pytest.raises(ValueError, match="head size of ComplexFormer is 5; it must be even"):
        logits(variables_of([1.0] * 4, [0.0] * 4), QUERY[..., :5], KEY[..., :5])
