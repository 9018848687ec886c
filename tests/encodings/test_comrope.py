import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from posjax.encodings import ComRoPE, RoPE
from posjax.encodings.base import Side
from posjax.encodings.comrope import rotate_blocks

X = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
PLACES = jnp.array([[0, 7, 3]])
KINDS = pytest.mark.parametrize("kind", ["axial", "linear"])
BLOCKS = pytest.mark.parametrize("block", [2, 4])


@functools.partial(jax.jit, static_argnums=0)
def turned(encoding, variables, query, key, places=PLACES):
    indices, _ = encoding.apply(variables, places, places, method="positions")
    return encoding.apply(variables, Side(query, indices), Side(key, indices), method="rotate")


def random_variables(encoding, heads=2, seed=1):
    key = jnp.zeros((1, 3, heads, 8))
    indices, _ = encoding.apply({}, PLACES, PLACES, method="positions")
    return encoding.init(
        jax.random.key(seed), Side(X, indices), Side(key, indices), method="rotate"
    )


def official(x, positions, angles, multiplier, kind):
    """Dense rotation matrices of one head: exp of the sum of block-diagonal matrices.

    Args:
        positions: [T, axes].
        angles: [blocks, b, b].
        multiplier: [axes, blocks], for "linear".
    """
    axes, (blocks, size, _) = positions.shape[1], angles.shape
    out = np.zeros_like(x)
    for t, place in enumerate(positions):
        exponent = np.zeros((blocks * size, blocks * size))
        for axis in range(axes):
            for m in range(blocks):
                skew = angles[m] - angles[m].T
                share = multiplier[axis, m] if kind == "linear" else float(m % axes == axis)
                cells = slice(m * size, (m + 1) * size)
                exponent[cells, cells] += skew * share * place[axis]
        out[t] = scipy.linalg.expm(exponent) @ x[t]
    return out


@KINDS
@BLOCKS
@pytest.mark.parametrize("grid", [None, (3, 4)])
def test_equals_a_transcription_of_the_official_code(kind, block, grid):
    encoding = ComRoPE(kind, block, grid)
    variables = random_variables(encoding)
    params = {name: np.asarray(value, np.float64) for name, value in variables["params"].items()}
    positions = np.asarray(PLACES[0], np.float64)[:, None]
    if grid is not None:
        rows = np.stack(np.unravel_index(np.asarray(PLACES[0]), grid), axis=-1)
        positions = (rows + 0.5) / np.array(grid)
    for found in turned(encoding, variables, X, X):
        for head in range(2):
            multiplier = params.get("multiplier")
            x = np.asarray(X[0, :, head], np.float64)
            want = official(x, positions, params["angles"][head], multiplier, kind)
            np.testing.assert_allclose(found[0, :, head], want, atol=2e-5)


@KINDS
def test_gradients_equal_finite_differences_of_the_transcription(kind):
    encoding = ComRoPE(kind, 4, (3, 4))
    variables = random_variables(encoding)
    weights = np.random.default_rng(0).normal(size=X.shape)
    rows = np.stack(np.unravel_index(np.asarray(PLACES[0]), (3, 4)), axis=-1)
    positions = (rows + 0.5) / np.array((3, 4))

    def slow(params):
        x = np.asarray(X[0], np.float64)
        parts = [
            official(x[:, n], positions, params["angles"][n], params.get("multiplier"), kind)
            for n in range(2)
        ]
        return np.sum(np.stack(parts, axis=1) * weights[0])

    def loss(variables):
        query, _ = turned(encoding, variables, X, X)
        return jnp.sum(query * jnp.asarray(weights, jnp.float32))

    gradients = jax.grad(loss)(variables)["params"]
    exact = {name: np.asarray(value, np.float64) for name, value in variables["params"].items()}
    for name, gradient in gradients.items():
        for place in [(0,) * gradient.ndim, tuple(np.array(gradient.shape) - 1), (1, 1, 2, 0)]:
            at, step = place[: gradient.ndim], 1e-5
            both = []
            for sign in (1, -1):
                moved = {**exact, name: exact[name].copy()}
                moved[name][at] += sign * step
                both.append(slow(moved))
            np.testing.assert_allclose(gradient[at], (both[0] - both[1]) / (2 * step), atol=2e-4)


@BLOCKS
def test_text_starts_as_rope(block):
    encoding = ComRoPE(block_size=block, start="spectrum")
    for ours, rope in zip(
        turned(encoding, random_variables(encoding), X, X),
        RoPE.interleaved().apply({}, Side(X, PLACES), Side(X, PLACES), method="rotate"),
        strict=True,
    ):
        np.testing.assert_allclose(ours, rope, atol=1e-5)
    assert ComRoPE.text() == ComRoPE(start="spectrum")
    linear = ComRoPE("linear", block, start="spectrum")
    variables = random_variables(linear)
    np.testing.assert_array_equal(variables["params"]["multiplier"], jnp.ones((1, 8 // block)))
    same = turned(encoding, random_variables(encoding), X, X)
    np.testing.assert_allclose(turned(linear, variables, X, X), jnp.stack(same), atol=1e-6)


def test_blocks_of_two_are_the_closed_form_of_the_exponential():
    angles = jax.random.normal(jax.random.key(2), (2, 4, 2, 2))
    amounts = jax.random.normal(jax.random.key(3), (1, 3, 4))
    found = rotate_blocks(X, amounts, angles)
    skew = np.asarray(angles - jnp.swapaxes(angles, -1, -2), np.float64)
    for t, n, m in np.ndindex(3, 2, 4):
        matrix = scipy.linalg.expm(skew[n, m] * float(amounts[0, t, m]))
        want = matrix @ np.asarray(X[0, t, n, 2 * m : 2 * m + 2])
        np.testing.assert_allclose(found[0, t, n, 2 * m : 2 * m + 2], want, atol=1e-5)


@pytest.mark.parametrize(("block", "deviation"), [(4, 0.0), (8, 0.0), (8, 1.0)])
def test_gradients_where_eigenvalues_are_equal(block, deviation):
    """All angles 0: the derivative of exp(a S) is then a times that of S."""
    blocks, random = 8 // block, np.random.default_rng(0)
    angles = deviation * random.normal(size=(2, blocks, block, block))
    weights, step = random.normal(size=X.shape), 1e-6
    amounts = random.normal(size=(1, 3, blocks))

    def slow(angles, amounts, x):
        out = np.zeros(X.shape)
        for t, n, m in np.ndindex(3, 2, blocks):
            cells = slice(m * block, (m + 1) * block)
            skew = (angles[n, m] - angles[n, m].T) * amounts[0, t, m]
            out[0, t, n, cells] = scipy.linalg.expm(skew) @ x[0, t, n, cells]
        return np.sum(out * weights)

    def loss(angles, amounts, x):
        return jnp.sum(rotate_blocks(x, amounts, angles) * jnp.asarray(weights, jnp.float32))

    exact = angles, amounts, np.asarray(X, np.float64)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*(jnp.float32(x) for x in exact))
    for number, gradient in enumerate(gradients):
        for place in random.integers(0, gradient.shape, (4, gradient.ndim)):
            both = []
            for sign in (1, -1):
                moved = [x.copy() for x in exact]
                moved[number][tuple(place)] += sign * step
                both.append(slow(*moved))
            want = (both[0] - both[1]) / (2 * step)
            np.testing.assert_allclose(gradient[tuple(place)], want, atol=1e-4)


@pytest.mark.parametrize("block", [3, 5])
def test_blocks_of_odd_size(block):
    x, angles = (
        jnp.ones((1, 2, 1, 2 * block)),
        jax.random.normal(jax.random.key(0), (1, 2, block, block)),
    )
    amounts = jnp.array([[[0.5, -2.0], [3.0, 0.0]]])
    found, skew = rotate_blocks(x, amounts, angles), np.asarray(angles, np.float64)
    for t, m in np.ndindex(2, 2):
        matrix = scipy.linalg.expm((skew[0, m] - skew[0, m].T) * float(amounts[0, t, m]))
        np.testing.assert_allclose(
            found[0, t, 0, m * block : (m + 1) * block], matrix.sum(1), atol=1e-5
        )


@KINDS
@BLOCKS
def test_scores_depend_on_differences_of_places_only_and_norms_stay(kind, block):
    """By a whole row, on a grid: both coordinates of all tokens move alike."""
    encoding = ComRoPE(kind, block, (3, 10))
    variables = random_variables(encoding)

    def scores(places):
        query, key = turned(encoding, variables, X, X[:, ::-1], places)
        np.testing.assert_allclose(
            jnp.linalg.norm(query, axis=-1), jnp.linalg.norm(X, axis=-1), rtol=1e-4
        )
        return jnp.einsum("btnh,bsnh->bnts", query, key)

    np.testing.assert_allclose(scores(PLACES + 22), scores(PLACES), atol=2e-4)


def test_a_group_shares_the_angles_of_its_key_head():
    encoding = ComRoPE(block_size=4)
    variables = random_variables(encoding, heads=1)
    query, key = turned(encoding, variables, X, X[:, :, :1])
    assert variables["params"]["angles"].shape == (1, 2, 4, 4)
    np.testing.assert_allclose(query[:, :, :1], key, atol=1e-6)
    alone, _ = turned(encoding, variables, X[:, :, 1:], X[:, :, :1])
    np.testing.assert_allclose(query[:, :, 1:], alone, atol=1e-6)


def test_parameters_and_how_they_start():
    encoding = ComRoPE.linear().clone(grid=(4, 4), initial_deviation=3.0)
    x, indices = jnp.zeros((1, 1, 16, 512)), jnp.zeros((1, 1, 2), jnp.int32)
    params = encoding.init(jax.random.key(0), Side(x, indices), Side(x, indices), method="rotate")[
        "params"
    ]
    shapes = {name: value.shape for name, value in params.items()}
    assert shapes == {"angles": (16, 256, 2, 2), "multiplier": (2, 256)}
    np.testing.assert_allclose(jnp.std(params["angles"]), 3.0, rtol=0.03)
    np.testing.assert_allclose(jnp.std(params["multiplier"]), 1.0, rtol=0.1)
    assert {value.dtype for value in params.values()} == {jnp.dtype("float32")}


def test_far_positions_are_finite():
    for block in (2, 4):
        encoding = ComRoPE(block_size=block, start="spectrum")
        places = jnp.array([[16_384, 16_383, 16_000]])
        query, key = turned(encoding, random_variables(encoding), X, X, places)
        far = jnp.einsum("btnh,bsnh->bnts", query, key)
        query, key = turned(encoding, random_variables(encoding), X, X, places - 15_999)
        np.testing.assert_allclose(far, jnp.einsum("btnh,bsnh->bnts", query, key), atol=0.05)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block_size": 3}, "a multiple of block_size=3, but the head size is 8"),
        ({"grid": (2, 2, 2)}, "a multiple of 3 x block_size=2, but the head size is 8"),
    ],
)
def test_blocks_must_fill_the_head(settings, words):
    with pytest.raises(ValueError, match=words):
        random_variables(ComRoPE(**settings))
