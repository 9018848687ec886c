import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import AbsoluteWindow
from posjax.encodings.absolute_window import resize_weights, window_table
from posjax.positions import LengthError

REASON = "compares with PyTorch's F.interpolate"
RANDOM = np.random.default_rng(0)
GRID = AbsoluteWindow(shape=(8, 12), coarse=(3, 5), window=(4, 4))
TABLES = {
    "coarse_table": jnp.asarray(RANDOM.normal(size=(3, 5, 2)), jnp.float32),
    "window_table": jnp.asarray(RANDOM.normal(size=(4, 4, 2)), jnp.float32),
}


def embed(encoding, tables, places):
    x = jnp.ones((*places.shape, 2))
    return encoding.apply({"params": tables}, x, places, method="embed")


def hiera(torch, coarse, window, shape):
    """SAM 2's tables in PyTorch, [height, width, D]."""
    coarse, window = (torch.tensor(np.asarray(x)).permute(2, 0, 1)[None] for x in (coarse, window))
    total = torch.nn.functional.interpolate(coarse, size=shape, mode="bicubic")
    repeats = [new // old for new, old in zip(shape, window.shape[2:], strict=True)]
    return (total + window.tile(1, 1, *repeats))[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("shape", [(8, 12), (4, 4), (56, 28), (2, 3)])
def test_a_grid_equals_torch(shape):
    torch = pytest.importorskip("torch", reason=REASON)
    window = TABLES["window_table"][: min(shape[0], 4), : min(shape[1], 4)]
    want = hiera(torch, TABLES["coarse_table"], window, shape)
    out = window_table(TABLES["coarse_table"], window, shape)
    np.testing.assert_allclose(out.reshape(want.shape), want, atol=3e-6)


@pytest.mark.parametrize(("old", "new"), [(3, 11), (7, 4), (5, 5), (1, 6)])
def test_a_sequence_equals_torch(old, new):
    torch = pytest.importorskip("torch", reason=REASON)
    coarse = RANDOM.normal(size=(old, 2)).astype(np.float32)
    resize = torch.nn.functional.interpolate
    want = resize(torch.tensor(coarse).T[None], size=new, mode="linear", align_corners=False)
    out = window_table(jnp.asarray(coarse), jnp.zeros((1, 2)), (new,))
    np.testing.assert_allclose(out, want[0].T.numpy(), atol=1e-6)


def cubic(x: float) -> float:
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


@pytest.mark.parametrize(("old", "new"), [(3, 7), (6, 4), (4, 4)])
def test_cubic_weights_are_the_formula(old, new):
    want = np.zeros((new, old))
    for i in range(new):
        x = (i + 0.5) * old / new - 0.5
        for sample in range(-4, old + 4):
            want[i, min(max(sample, 0), old - 1)] += cubic(x - sample)
    np.testing.assert_allclose(resize_weights(old, new), want, atol=1e-12)
    np.testing.assert_allclose(want.sum(axis=1), 1)


def test_places_of_a_grid_run_row_by_row():
    places = jnp.array([[0, 13, 95], [12, 11, 5]])
    out = embed(GRID, TABLES, places)
    table = window_table(TABLES["coarse_table"], TABLES["window_table"], (8, 12)).reshape(8, 12, 2)
    want = np.asarray(table)[places // 12, places % 12] + 1
    np.testing.assert_allclose(out, want, rtol=1e-6)


def test_the_window_repeats_and_the_coarse_part_does_not():
    encoding = AbsoluteWindow(shape=(10,), coarse=(10,), window=(3,))
    coarse, window = jnp.arange(20.0).reshape(10, 2), 100 * jnp.arange(6.0).reshape(3, 2)
    tables = {"coarse_table": coarse, "window_table": window}
    out = embed(encoding, tables, jnp.arange(10)[None])[0]
    np.testing.assert_allclose(out, 1 + coarse + window[jnp.arange(10) % 3], rtol=1e-6)
    between = embed(encoding, tables, jnp.array([[3.5]]))[0, 0]
    np.testing.assert_allclose(between, (out[3] + out[4]) / 2, rtol=1e-6)


def test_gradients_are_how_often_rows_are_used():
    """The loss is linear, so the gradient is the matrix of weights itself."""
    encoding = AbsoluteWindow(shape=(6,), coarse=(4,), window=(4,))
    tables = {"coarse_table": jnp.zeros((4, 2)), "window_table": jnp.zeros((4, 2))}
    loss = lambda tables: jnp.sum(embed(encoding, tables, jnp.arange(6)[None]))  # noqa: E731
    grads = jax.grad(loss)(tables)
    weights = resize_weights(4, 6, "linear").sum(axis=0)
    np.testing.assert_allclose(grads["coarse_table"], np.stack((weights, weights), 1), rtol=1e-6)
    assert grads["window_table"].tolist() == [[2, 2], [2, 2], [1, 1], [1, 1]]


def test_parameters_stay_when_the_input_grows():
    x, places = jnp.zeros((1, 2, 64)), jnp.array([[0, 1]])
    encodings = AbsoluteWindow.grid(), AbsoluteWindow.grid().clone(shape=(112, 112))
    init = lambda e: e.init(jax.random.key(0), x, places, method="embed")  # noqa: E731
    small, large = (
        jax.jit(init, static_argnums=0)(encodings[0]),
        jax.eval_shape(lambda: init(encodings[1])),
    )
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, large)
    assert jax.tree.map(jnp.shape, small)["params"] == {
        "coarse_table": (14, 14, 64),
        "window_table": (8, 8, 64),
    }
    for table in small["params"].values():
        np.testing.assert_allclose(jnp.std(table), 0.02, rtol=0.05)


def test_beyond_the_last_place_is_refused_or_nan():
    with pytest.raises(LengthError, match="position 96 is not in a table of 96 rows"):
        embed(GRID, TABLES, jnp.array([[96]]))
    with pytest.raises(LengthError, match=r"AbsoluteWindow has shape=\(8, 12\).* 97 tokens"):
        jax.jit(lambda p: embed(GRID, TABLES, p))(jnp.zeros((1, 97), jnp.int32))
    out = jax.jit(lambda p: embed(GRID, TABLES, p))(jnp.array([[95, 96]]))
    assert np.isfinite(out[0, 0]).all() and np.isnan(out[0, 1]).all()
