import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import Fourier
from posjax.encodings.fourier import fourier_features

RANDOM = np.random.default_rng(0)
PLACES = jnp.array([[0, 3, 17, 700], [5, 4, 1, 0]])
ENCODINGS = [
    Fourier(features=6, hidden=5),
    Fourier(features=6, hidden=5, grid=(4, 6), length=6.0),
    Fourier(features=6, hidden=5, grid=(4, 6), length=6.0, groups=2),
]
every = pytest.mark.parametrize("encoding", ENCODINGS, ids=["line", "plane", "axes"])
X = jnp.asarray(RANDOM.normal(size=(2, 4, 8)), jnp.float32)


def params_of(encoding):
    shapes = jax.eval_shape(lambda: encoding.init(jax.random.key(0), X, PLACES, method="embed"))
    return jax.tree.map(lambda x: jnp.asarray(RANDOM.normal(size=x.shape), x.dtype), shapes)


def transcription(encoding, variables, x, places):
    """The formula with loops, in float64."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    out = np.asarray(x, np.float64).copy()
    for b, t in np.ndindex(*places.shape):
        place = int(places[b, t])
        coordinates = [place] if encoding.grid is None else list(divmod(place, encoding.grid[1]))
        for group, part in enumerate(np.split(np.array(coordinates, float), encoding.groups)):
            angles = [w @ (part / encoding.length) for w in params["frequencies"]]
            r = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
            r = np.array(r) / math.sqrt(encoding.features)
            hidden = r @ params["up"]["kernel"] + params["up"]["bias"]
            hidden = np.array([0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in hidden])
            result = hidden @ params["down"]["kernel"] + params["down"]["bias"]
            out[b, t, group * len(result) : (group + 1) * len(result)] += result
    return out


@every
def test_equals_the_formula(encoding):
    variables = params_of(encoding)
    out = encoding.apply(variables, X, PLACES, method="embed")
    np.testing.assert_allclose(out, transcription(encoding, variables, X, PLACES), atol=2e-5)


@every
def test_gradients_equal_finite_differences_of_the_formula(encoding):
    variables, weights = params_of(encoding), RANDOM.normal(size=X.shape)

    @jax.jit
    def grad(variables):
        out = lambda v: encoding.apply(v, X, PLACES, method="embed")  # noqa: E731
        return jax.grad(lambda v: jnp.sum(out(v) * jnp.asarray(weights, jnp.float32)))(variables)

    direction = jax.tree.map(lambda x: RANDOM.normal(size=x.shape), variables)
    move = lambda step: jax.tree.map(  # noqa: E731
        lambda x, d: np.asarray(x, np.float64) + step * d, variables, direction
    )
    ends = [np.sum(transcription(encoding, move(s), X, PLACES) * weights) for s in (1e-5, -1e-5)]
    pairs = zip(jax.tree.leaves(grad(variables)), jax.tree.leaves(direction), strict=True)
    slope = sum(np.sum(np.asarray(g) * d) for g, d in pairs)
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-3)


def test_features_are_a_gaussian_kernel_at_the_start():
    """So gamma^-2 is the variance, not the deviation: that would be a kernel of another width."""
    gamma = 0.25
    encoding = Fourier(features=20_000, gamma=gamma, grid=(9, 9), length=1.0)
    variables = encoding.init(jax.random.key(0), X, PLACES, method="embed")
    frequencies = variables["params"]["frequencies"]
    np.testing.assert_allclose(jnp.std(frequencies), 1 / gamma, rtol=0.02)
    x = jnp.array([[0.0, 0.0], [0.1, 0.2], [0.3, -0.1], [2.0, 0.0]])
    features = fourier_features(x, frequencies)
    products = features @ features.T
    squares = jnp.sum((x[:, None] - x[None]) ** 2, axis=-1)
    np.testing.assert_allclose(products, jnp.exp(-squares / (2 * gamma**2)) / 2, atol=0.01)


def test_initial_values_and_shapes():
    encoding = Fourier(grid=(4, 6), groups=2)
    params = encoding.init(jax.random.key(0), X, PLACES, method="embed")["params"]
    assert jax.tree.map(jnp.shape, params) == {
        "frequencies": (32, 1),
        "up": {"kernel": (64, 32), "bias": (32,)},
        "down": {"kernel": (32, 4), "bias": (4,)},
    }
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert not any(params[name]["bias"].any() for name in ("up", "down"))


def test_every_place_is_defined_and_neighbours_are_alike():
    encoding = Fourier.image()
    places = jnp.array([[0, 32, 1, 31 * 32 + 31, 10**6]])
    x = jnp.zeros((1, 5, 8))
    variables = encoding.init(jax.random.key(0), x, places, method="embed")
    out = encoding.apply(variables, x, places, method="embed")[0]
    assert np.isfinite(out).all()
    far = jnp.linalg.norm(out[0] - out[3])
    assert jnp.linalg.norm(out[0] - out[1]) < far  # one row below
    assert jnp.linalg.norm(out[0] - out[2]) < far  # one column on


def test_dividing_places_and_length_changes_nothing():
    whole, half = Fourier(length=100.0), Fourier(length=50.0)
    variables = whole.init(jax.random.key(0), X, PLACES, method="embed")
    out = whole.apply(variables, X, PLACES, method="embed")
    same = half.apply(variables, X, PLACES / 2, method="embed")
    np.testing.assert_allclose(out, same, atol=1e-6)


def test_groups_must_divide_the_width():
    with pytest.raises(ValueError, match="groups is 2 and the width 7; groups must divide it"):
        ENCODINGS[2].init(jax.random.key(0), X[..., :7], PLACES, method="embed")
