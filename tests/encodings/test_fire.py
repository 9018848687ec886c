import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import FIRE
from posjax.encodings.base import Side, Sizes
from posjax.encodings.fire import InterpolatedDistance

HEADS = 3


def random_params(encoding, seed=0):
    side = Side(jnp.zeros((1, 1, HEADS, 4)), jnp.zeros((1, 1), jnp.int32))
    own = encoding.clone(share_layers=False)
    start = own.init(jax.random.key(0), side, side, method="bias")["params"]
    leaves, tree = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    random = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return tree.unflatten(random)


def listing(params, positions, initial_threshold):
    """The listing in the paper's appendix, pair by pair in float64."""
    p = {name: np.asarray(x, np.float64) for name, x in params.items()}
    length, layers = len(positions), sum(name.startswith("kernel") for name in p)
    bias = np.zeros((p[f"bias_{layers - 1}"].size, length, length))
    threshold = abs(p["threshold"] * initial_threshold)
    for a, i in enumerate(positions):
        normaliser = np.log(abs(p["c"] * max(i, threshold)) + 1)
        for b, j in enumerate(positions):
            x = np.array([np.log(abs(p["c"] * (i - j)) + 1) / (normaliser + 1e-6)])
            for layer in range(layers):
                x = x @ p[f"kernel_{layer}"] + p[f"bias_{layer}"]
                x = np.maximum(x, 0) if layer < layers - 1 else x
            bias[:, a, b] = x
    return bias


def bias_of(encoding, params, places):
    x = jnp.zeros((1, places.shape[1], HEADS, 4))
    shared = encoding.apply({"params": params}, Sizes(HEADS, HEADS, 4), method="shared")
    sides = [Side(x, places)] * 2
    bias = encoding.apply({"params": params}, *sides, shared, method="bias")
    assert not bias.distance_only
    return bias.dense(x, x, scale=1, allowed=None, query_positions=None, key_positions=None)


@pytest.mark.parametrize("settings", [{}, {"hidden_layers": 3}, {"share_layers": True}])
@pytest.mark.parametrize("threshold", [5.0, 512.0])
def test_equals_a_transcription_of_the_listing(settings, threshold):
    encoding = FIRE(hidden_width=8, initial_threshold=threshold, **settings)
    params = random_params(encoding)
    places = [0, 1, 2, 9, 40, 1000]
    bias = bias_of(encoding, params, jnp.array([places]))
    np.testing.assert_allclose(bias[0], listing(params, places, threshold), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threshold", [2.0, 512.0])
def test_gradients_against_the_transcription(threshold):
    """Finite differences of the float64 loops, for every parameter."""
    encoding = FIRE(hidden_width=4, initial_threshold=threshold)
    params, places = random_params(encoding, 1), jnp.array([[0, 1, 3, 4, 9]])
    weights = np.asarray(jax.random.normal(jax.random.key(2), (HEADS, 5, 5)), np.float64)
    function = InterpolatedDistance(threshold)
    loss = jax.jit(lambda p: jnp.sum(function(p, places, places)[0] * jnp.float32(weights)))
    exact = {name: np.asarray(x, np.float64) for name, x in params.items()}
    for name, grad in jax.grad(loss)(params).items():
        for index in np.ndindex(grad.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = {n: x.copy() for n, x in exact.items()}
                moved[name][index] += step
                ends.append(np.sum(listing(moved, places[0].tolist(), threshold) * weights))
            want = (ends[0] - ends[1]) / 2e-6
            np.testing.assert_allclose(grad[index], want, rtol=2e-3, atol=2e-4, err_msg=name)


def test_starts_as_the_listing_does():
    encoding = FIRE(hidden_width=4000)
    side = Side(jnp.ones((1, 3, 2, 4)), jnp.arange(3)[None])
    params = encoding.init(jax.random.key(0), side, side, method="bias")["params"]
    assert (params["c"], params["threshold"]) == (jnp.float32(0.1), 1.0)
    for layer, bound in ((0, 1.0), (1, 4000**-0.5)):
        kernel = params[f"kernel_{layer}"]
        assert jnp.max(jnp.abs(kernel)) <= bound
        assert jnp.max(jnp.abs(params[f"bias_{layer}"])) <= bound
        np.testing.assert_allclose(jnp.std(kernel), bound / 3**0.5, rtol=0.05)
    assert params["bias_0"].shape == (4000,)
    assert params["bias_1"].shape == (2,)


def test_longer_contexts_are_squeezed_into_one():
    """The share is 1 for the first key of every query from L on, and stays below before."""
    params = {"c": jnp.float32(0.1), "threshold": jnp.float32(1.0)}
    places = jnp.array([[0, 50, 511, 512, 5000, 2**20]])
    first = InterpolatedDistance().share(params, places, places)[0, :, 0]
    np.testing.assert_allclose(first[3:], 1.0, rtol=1e-5)
    assert (first[:3] < 1).all()
    assert first[0] == 0


def test_keys_after_the_query():
    """Normalised by the query the share exceeds 1; by the later of the two it does not."""
    params = {"c": jnp.float32(0.1), "threshold": jnp.float32(1.0)}
    places = jnp.array([[0, 600, 4000]])
    by_query, by_larger = (
        np.asarray(InterpolatedDistance(normaliser=n).share(params, places, places)[0])
        for n in ("query", "larger")
    )
    assert by_query[0, 2] > 1
    assert by_larger.max() <= 1
    np.testing.assert_array_equal(by_larger, by_larger.T)
    np.testing.assert_array_equal(np.tril(by_larger), np.tril(by_query))


def test_one_network_for_all_layers_or_one_in_each():
    side = Side(jnp.ones((1, 3, 2, 4)), jnp.arange(3)[None])
    assert FIRE().init(jax.random.key(0), Sizes(2, 2, 4), method="shared") == {}
    variables = FIRE.shared_layers().init(jax.random.key(0), Sizes(2, 2, 4), method="shared")
    assert variables["params"]["kernel_1"].shape == (32, 2)
    assert sum(x.size for x in jax.tree.leaves(variables)) == 64 + 33 * 2 + 2
    two = FIRE.two_hidden().init(jax.random.key(0), side, side, method="bias")
    assert two["params"]["kernel_1"].shape == (32, 32)
