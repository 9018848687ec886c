import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import Huang
from posjax.encodings.base import Side
from posjax.positions import LengthError

LENGTH, HEADS, KV_HEADS, SIZE, FAR = 7, 4, 2, 3, 4
METHODS = pytest.mark.parametrize("method", [1, 2, 3, 4])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


QUERY, KEY = normal(0, 1, LENGTH, HEADS, SIZE), normal(1, 1, LENGTH, KV_HEADS, SIZE)


def params_of(method, per_head=False):
    rows = 2 * FAR + 1
    if method <= 2:
        return {"multipliers": normal(2, HEADS, FAR + 1 if method == 1 else rows)}
    shape = (HEADS, rows, SIZE) if per_head else (rows, SIZE)
    return {"table" if method == 4 else "multipliers": normal(2, *shape)}


def bias_of(encoding, params, places):
    sides = Side(QUERY, places), Side(KEY, places)
    bias = encoding.apply({"params": params}, *sides, method="bias")
    settings = {"scale": SIZE**-0.5, "allowed": None}
    return bias.dense(QUERY, KEY, **settings, query_positions=places, key_positions=places)


def literal(method, params, places):
    """The logits of each method, less the plain ones, by loops in float64."""
    (table,) = (np.asarray(x, np.float64) for x in params.values())
    queries, keys = (np.asarray(x[0], np.float64) for x in (QUERY, KEY))
    bias = np.zeros((HEADS, LENGTH, LENGTH))
    for n, i, j in np.ndindex(bias.shape):
        q, k = queries[i, n], keys[j, n // (HEADS // KV_HEADS)]
        r = max(-FAR, min(FAR, places[j] - places[i]))
        a = (table[n] if table.ndim == 3 else table)[r + FAR] if method > 2 else None
        if method <= 2:
            logit = q @ k * table[n, abs(r) if method == 1 else r + FAR]
        elif method == 3:
            logit = np.sum(q * k * a)
        else:
            logit = (q + a) @ (k + a) - a @ a
        bias[n, i, j] = (logit - q @ k) / SIZE**0.5
    return bias


@pytest.mark.parametrize(
    ("method", "per_head"), [(1, False), (2, False), (3, False), (3, True), (4, False), (4, True)]
)
@pytest.mark.parametrize("places", [range(LENGTH), [0, 1, 2, 40, 41, 44, 90]])
def test_is_the_papers_formula(method, per_head, places):
    params = params_of(method, per_head)
    encoding = Huang(method=method, max_distance=FAR, per_head=per_head)
    got = jax.jit(bias_of, static_argnums=0)(encoding, params, jnp.array([list(places)]))[0]
    np.testing.assert_allclose(got, literal(method, params, list(places)), atol=3e-6)


@METHODS
def test_gradients_are_those_of_the_formula(method):
    """The formulas are linear in the parameters, so differences of the loops are exact."""
    params, places = params_of(method), jnp.arange(LENGTH)[None]
    weights = normal(3, HEADS, LENGTH, LENGTH)
    encoding = Huang(method=method, max_distance=FAR)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(bias_of(encoding, p, places)[0] * weights)))(params)
    for name, grad in grads.items():
        direction = normal(4, *grad.shape)
        ends = [
            np.sum(
                literal(method, {name: np.asarray(params[name] + sign * direction)}, range(LENGTH))
                * np.asarray(weights)
            )
            for sign in (1, -1)
        ]
        want = (ends[0] - ends[1]) / 2
        np.testing.assert_allclose(jnp.sum(grad * direction), want, rtol=1e-4, atol=1e-4)


@METHODS
def test_starts(method):
    side = Side(jnp.ones((1, 3, 2, 4)), jnp.arange(3)[None])
    encoding = getattr(Huang, f"m{method}")()
    assert encoding == Huang(method=method)
    params = encoding.init(jax.random.key(0), side, side, method="bias")["params"]
    ((name, table),) = params.items()
    shape = {1: (2, 512), 2: (2, 1023), 3: (1023, 4), 4: (1023, 4)}[method]
    assert (name, table.shape) == ("table" if method == 4 else "multipliers", shape)
    if method == 4:
        np.testing.assert_allclose(jnp.std(table), 0.02, rtol=0.05)
    else:
        assert (table == 1).all()


@pytest.mark.parametrize("method", [1, 2, 3])
def test_multipliers_of_one_change_nothing(method):
    ones = jax.tree.map(jnp.ones_like, params_of(method))
    encoding = Huang(method=method, max_distance=FAR)
    assert not bias_of(encoding, ones, jnp.arange(LENGTH)[None]).any()


@METHODS
def test_depends_on_the_distance_only(method):
    places, encoding = jnp.arange(LENGTH)[None], Huang(method=method, max_distance=FAR)
    run = jax.jit(lambda p: bias_of(encoding, params_of(method), p))
    for shift in (-(2**20), 1, 2**20):
        np.testing.assert_array_equal(run(places), run(places + shift))


@METHODS
def test_further_distances_have_the_last_row_or_are_refused(method):
    near, far = jnp.array([[0, 1, 2, 3, 4, 4, 4]]), jnp.array([[0, 1, 2, 3, 4, 4, 5]])
    encoding, params = Huang(method=method, max_distance=FAR), params_of(method)
    strict = Huang(method=method, max_distance=FAR, strict=True)
    run = jax.jit(bias_of, static_argnums=0)
    assert (encoding.beyond, strict.beyond) == ("clips", "raises")
    np.testing.assert_array_equal(run(strict, params, near), run(encoding, params, near))
    ends = [run(encoding, params, far.at[0, -1].set(last)) for last in (50, 5000)]
    np.testing.assert_array_equal(*ends)
    with pytest.raises(LengthError, match="max_distance=4, but positions are 5 apart; build it"):
        bias_of(strict, params, far)
    compiled = np.asarray(run(strict, params, far))
    distance = np.abs(far[0, :, None] - far[0, None, :])
    np.testing.assert_array_equal(np.isnan(compiled[0, 0]), distance > FAR)
