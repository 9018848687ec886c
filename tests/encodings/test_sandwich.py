import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import Sandwich
from posjax.encodings.base import Side
from posjax.encodings.sandwich import CosineSum

PLACES = jnp.array([[0, 1, 5, 30, 200]])


def bias_of(encoding, heads, places):
    x = jnp.zeros((1, places.shape[1], heads, 4))
    bias = encoding.apply({}, Side(x, places), Side(x, places), method="bias")
    return bias.dense(x, x, scale=1, allowed=None, query_positions=None, key_positions=None)


def embeddings(positions, width, base):
    """Sinusoidal embeddings, number by number, in float64."""
    table = np.zeros((len(positions), width))
    for row, position in enumerate(positions):
        for m in range(width // 2):
            angle = position / base ** (2 * m / width)
            table[row, m], table[row, width // 2 + m] = np.sin(angle), np.cos(angle)
    return table


@pytest.mark.parametrize("heads", [1, 5, 12])
@pytest.mark.parametrize("settings", [{}, {"width": 6, "base": 50.0}])
def test_is_the_product_of_embeddings_divided_by_the_ratio_of_the_head(heads, settings):
    places = [0, 1, 2, 17, 900]
    table = embeddings(places, settings.get("width", 128), settings.get("base", 10_000.0))
    ratios = np.arange(1, heads + 1) * 8 / heads
    want = (table @ table.T)[None] / ratios[:, None, None]
    got = bias_of(Sandwich(**settings), heads, jnp.array([places]))[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-3)


def test_nemo_differs_by_its_frequencies_and_a_constant():
    """NeMo's sum over m = 1 ... width / 2 is ours without m = 0 and with one more."""
    width, places = 8, np.array([0, 2, 3, 11])
    distance = places[:, None] - places[None, :]
    counts = np.arange(1, width / 2 + 1)
    nemo = np.sum(np.cos(distance[:, :, None] * 10_000.0 ** (-2 * counts / width)), axis=2)
    ours = 8 * np.asarray(CosineSum(1, width)(None, *[jnp.asarray(places)[None]] * 2)[0, 0])
    np.testing.assert_allclose(
        nemo + np.cos(distance) - np.cos(distance / 10_000.0), ours, rtol=1e-4, atol=1e-5
    )


def test_depends_on_the_distance_only():
    """Exactly, because positions count from the first query."""
    run = jax.jit(lambda places: bias_of(Sandwich(), 2, places))
    for shift in (-(2**20), 1, 2**20):
        np.testing.assert_array_equal(run(PLACES), run(PLACES + shift))


def test_is_greatest_at_the_query_and_falls_far_beyond():
    far = jnp.array([[0, 10, 100, 1000, 10_000]])
    first = bias_of(Sandwich(), 1, far)[0, 0, 0]
    assert (jnp.diff(first) < 0).all()
    np.testing.assert_allclose(first[0], 64 / 8, rtol=1e-5)
    ratio = bias_of(Sandwich(), 8, far)[0, :, 0, 0]
    np.testing.assert_allclose(ratio, 64 / np.arange(1, 9), rtol=1e-5)


def test_has_no_parameters():
    side = Side(jnp.ones((1, 3, 2, 4)), jnp.arange(3)[None])
    assert Sandwich().init(jax.random.key(0), side, side, method="bias") == {}
