import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import Combine, HeadScale, RoPE
from posjax.encodings.base import Side
from posjax.encodings.kerple import keep_within
from posjax.encodings.rope import rotate

X = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
PLACES = jnp.broadcast_to(jnp.arange(5), (2, 5))


def turned(encoding, variables, query=X):
    return encoding.apply(variables, Side(query, PLACES), Side(X, PLACES), method="rotate")


def test_the_query_of_each_head_is_multiplied():
    scale = jnp.array([1.0, 1.5, 3.0])
    query, key = turned(HeadScale(), {"params": {"scale": scale}})
    for n in range(3):
        np.testing.assert_allclose(query[:, :, n], X[:, :, n] * float(scale[n]), rtol=1e-6)
    np.testing.assert_array_equal(key, X)
    narrow, _ = turned(HeadScale(), {"params": {"scale": scale}}, X.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("encoding", "start"),
    [(HeadScale(), 1.0), (HeadScale.paper(), 1.6), (HeadScale.uniform(), None)],
)
def test_the_start(encoding, start):
    variables = encoding.init(jax.random.key(0), Side(X, PLACES), Side(X, PLACES), method="rotate")
    if start is None:
        assert variables == {}
        np.testing.assert_allclose(turned(encoding, {})[0], X * 1.2, rtol=1e-6)
    else:
        scale = variables["params"]["scale"]
        assert scale.dtype == jnp.float32
        np.testing.assert_allclose(scale, np.full(3, start), rtol=1e-6)
        np.testing.assert_allclose(turned(encoding, variables)[0], X * start, rtol=1e-6)


def test_scales_below_the_bound_count_as_the_bound():
    query, _ = turned(HeadScale(), {"params": {"scale": jnp.array([0.5, 1.0, 2.0])}})
    np.testing.assert_allclose(query[:, :, 0], X[:, :, 0])
    lower, _ = turned(
        HeadScale(lower_bound=0.25), {"params": {"scale": jnp.array([0.5, 1.0, 2.0])}}
    )
    np.testing.assert_allclose(lower[:, :, 0], X[:, :, 0] / 2)


def test_gradients_are_those_of_the_formula_above_the_bound():
    scale = jnp.array([1.2, 1.5, 3.0])
    loss = lambda s: jnp.sum(jnp.sin(turned(HeadScale(), {"params": {"scale": s}})[0]))  # noqa: E731
    got = jax.grad(loss)(scale)
    want = [(np.cos(X[:, :, n] * float(scale[n])) * X[:, :, n]).sum() for n in range(3)]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", [0.2, 1.0, 2.5])
def test_descent_ends_where_clamping_after_each_step_ends(target):
    """From above and from below the bound; the authors clamp the parameter instead."""
    loss = lambda x: jnp.sum((keep_within(x, 1.0, jnp.inf) - target) ** 2)  # noqa: E731
    step = jax.jit(lambda x: x - 0.1 * jax.grad(loss)(x))
    x = jnp.array([0.4, 1.0, 3.0])
    clamped = jnp.array([1.0, 1.0, 3.0])
    for _ in range(60):
        x = step(x)
        clamped = jnp.maximum(clamped - 0.2 * (clamped - target), 1.0)
    np.testing.assert_allclose(keep_within(x, 1.0, jnp.inf), clamped, atol=1e-4)


def test_joins_other_encodings():
    encoding = Combine((HeadScale(), RoPE()))
    places = (PLACES, PLACES)
    variables = {"params": {"encodings_0": {"scale": jnp.full((3,), 2.0)}}}
    query, key = encoding.apply(variables, Side(X, places), Side(X, places), method="rotate")
    np.testing.assert_allclose(query, 2 * rotate(X, PLACES), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(key, rotate(X, PLACES))
