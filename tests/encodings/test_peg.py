import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import PEG, Combine, RoPE, Temperature
from posjax.encodings.peg import causal_convolution, grid_convolution
from posjax.models import Transformer, TransformerConfig
from posjax.positions import segment_positions

REASON = "compares with PyTorch's convolutions"
RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(2, 12, 4)), jnp.float32)
PLACES = jnp.broadcast_to(jnp.arange(12), (2, 12))
ROWS = jnp.arange(12)


def draw(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def update(encoding, params, x=X, places=PLACES, rows=ROWS, inputs=None):
    inputs = x if inputs is None else inputs
    return encoding.apply({"params": params}, x, inputs, places, rows, method="update_stream")


def in_torch(torch, kind, kernel, offset, **settings):
    """A depthwise convolution of PyTorch with these weights, [taps..., D] and [D]."""
    width = kernel.shape[-1]
    convolution = kind(width, width, kernel.shape[0], groups=width, **settings)
    weight = np.moveaxis(np.asarray(kernel), -1, 0)[:, None]
    convolution.weight.data[:] = torch.tensor(weight)
    convolution.bias.data[:] = torch.tensor(np.asarray(offset))
    return convolution


@pytest.mark.parametrize("taps", [1, 3, 4])
def test_a_sequence_equals_torch_in_values_and_gradients(taps):
    torch = pytest.importorskip("torch", reason=REASON)
    params = {"kernel": draw(taps, 4), "offset": draw(4)}
    convolution = in_torch(torch, torch.nn.Conv1d, *params.values(), padding=taps - 1)
    x = torch.tensor(np.asarray(X)).transpose(1, 2).requires_grad_()
    want = x + convolution(x)[..., :12]
    (want**2).sum().backward()
    encoding = PEG(kernel_size=taps)
    out = update(encoding, params)
    np.testing.assert_allclose(out, want.detach().transpose(1, 2).numpy(), atol=1e-5)
    loss = lambda params, x: jnp.sum(update(encoding, params, x) ** 2)  # noqa: E731
    of_params, of_x = jax.grad(loss, argnums=(0, 1))(params, X)
    np.testing.assert_allclose(of_x, x.grad.transpose(1, 2).numpy(), atol=1e-4)
    np.testing.assert_allclose(of_params["offset"], convolution.bias.grad.numpy(), atol=1e-4)
    of_kernel = convolution.weight.grad[:, 0].T.numpy()
    np.testing.assert_allclose(of_params["kernel"], of_kernel, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("taps", "shape"), [(3, (3, 4)), (3, (12, 1)), (5, (2, 6)), (1, (4, 3))])
def test_a_grid_equals_torch_in_values_and_gradients(taps, shape):
    torch = pytest.importorskip("torch", reason=REASON)
    params = {"kernel": draw(taps, taps, 4), "offset": draw(4)}
    convolution = in_torch(torch, torch.nn.Conv2d, *params.values(), padding=taps // 2)
    x = torch.tensor(np.asarray(X)).transpose(1, 2).reshape(2, 4, *shape).requires_grad_()
    want = x + convolution(x)
    (want**2).sum().backward()
    encoding = PEG(kernel_size=taps, grid=shape)
    flat = lambda y: y.detach().flatten(2).transpose(1, 2).numpy()  # noqa: E731
    np.testing.assert_allclose(update(encoding, params), flat(want), atol=1e-5)
    loss = lambda params, x: jnp.sum(update(encoding, params, x) ** 2)  # noqa: E731
    of_params, of_x = jax.grad(loss, argnums=(0, 1))(params, X)
    np.testing.assert_allclose(of_x, flat(x.grad), atol=1e-4)
    of_kernel = convolution.weight.grad[:, 0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(of_params["kernel"], of_kernel, rtol=1e-4, atol=1e-4)


def test_a_sequence_by_loops():
    kernel = draw(3, 4)
    segments = jnp.array([[0] * 5 + [1] * 7, [0] * 1 + [1] * 11])
    places = segment_positions(segments)
    want = np.zeros(X.shape)
    for b, t in np.ndindex(2, 12):
        for back in range(3):
            if back <= places[b, t]:
                want[b, t] += np.asarray(kernel[2 - back] * X[b, t - back])
    np.testing.assert_allclose(causal_convolution(X, kernel, places, ROWS), want, atol=1e-6)


@pytest.mark.parametrize("grid", [None, (2, 3)])
def test_packed_segments_do_not_touch(grid):
    kernel = draw(3, 4) if grid is None else draw(3, 3, 4)
    params = {"kernel": kernel, "offset": draw(4)}
    places = jnp.broadcast_to(jnp.arange(12) % 6, (2, 12))
    packed = update(PEG(grid=grid), params, places=places)
    for part in (slice(0, 6), slice(6, 12)):
        alone = update(PEG(grid=grid), params, X[:, part], PLACES[:, :6], ROWS[:6])
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-6)


def test_a_sequence_is_causal_and_reaches_its_taps():
    params = {"kernel": draw(3, 4), "offset": draw(4)}
    jacobian = jax.jacobian(lambda x: update(PEG(), params, x)[0, :, 0])(X)[:, 0, :, 0]
    seen = np.abs(jacobian) > 1e-6
    back = np.arange(12)[:, None] - np.arange(12)[None]
    np.testing.assert_array_equal(seen, (back >= 0) & (back < 3))


def test_decoding_sees_the_cache():
    """Slots not yet filled hold something else, and are not used."""
    params = {"kernel": draw(3, 4), "offset": draw(4)}
    whole = update(PEG(), params)
    for start, stop in ((0, 4), (4, 5), (5, 12)):
        known = X.at[:, stop:].set(99.0)
        part = slice(start, stop)
        out = update(PEG(), params, X[:, part], PLACES[:, part], ROWS[part], known)
        np.testing.assert_allclose(out, whole[:, part], atol=1e-6)
    assert PEG().decodes
    assert not PEG(grid=(3, 4)).decodes


def test_shifting_the_tokens_shifts_the_output():
    kernel = draw(3, 4)
    moved = causal_convolution(jnp.roll(X, 2, axis=1), kernel, PLACES, ROWS)
    here = causal_convolution(X, kernel, PLACES, ROWS)
    np.testing.assert_allclose(moved[:, 4:], here[:, 2:-2], atol=1e-6)
    square = draw(3, 3, 4)
    here = grid_convolution(X, square, PLACES, 3).reshape(2, 4, 3, 4)
    moved = grid_convolution(jnp.roll(X, 3, axis=1), square, PLACES, 3).reshape(2, 4, 3, 4)
    np.testing.assert_allclose(moved[:, 2:3], here[:, 1:2], atol=1e-6)


def test_acts_before_one_block_only():
    encoding = PEG(block=2)
    layers = [encoding.layer(index, 4) for index in range(4)]
    assert [layer.block for layer in layers] == [None, None, 2, None]
    for layer in layers[:2]:
        assert layer.layer(0, 1) == layer
        assert layer.apply({}, X, method="stream_inputs") is None
        np.testing.assert_array_equal(update(layer, {}), X)
        assert layer.init(jax.random.key(0), X, None, PLACES, ROWS, method="update_stream") == {}
    np.testing.assert_array_equal(encoding.apply({}, X, method="stream_inputs"), X)
    with pytest.raises(
        ValueError, match="PEG block is 2; it must be below 2, the number of layers"
    ):
        encoding.layer(0, 2)


@pytest.mark.parametrize(("grid", "taps"), [(None, 3), ((3, 4), 9)])
def test_initial_values(grid, taps):
    x = jnp.zeros((1, 12, 500))
    params = PEG(grid=grid).init(jax.random.key(0), x, x, PLACES[:1], ROWS, method="update_stream")[
        "params"
    ]
    kernel = params["kernel"]
    assert kernel.shape == ((3, 500) if grid is None else (3, 3, 500))
    assert (kernel.dtype, params["offset"].shape) == (jnp.float32, (500,))
    assert not params["offset"].any()
    np.testing.assert_allclose(jnp.std(kernel), (3 * taps) ** -0.5, rtol=0.05)
    assert 0.99 < jnp.max(jnp.abs(kernel)) * taps**0.5 <= 1


def test_bfloat16_is_summed_in_float32():
    params = {"kernel": draw(3, 4), "offset": draw(4)}
    narrow = X.astype(jnp.bfloat16)
    out = update(PEG(), params, narrow)
    assert out.dtype == jnp.bfloat16
    exact = update(PEG(), params, narrow.astype(jnp.float32))
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("wrapped", [lambda e: e, lambda e: Combine((RoPE(), e)), Temperature])
def test_a_causal_model_refuses_a_grid(wrapped):
    model = Transformer(
        TransformerConfig(layers=2), vocab_size=5, encoding=wrapped(PEG(grid=(2, 3)))
    )
    with pytest.raises(ValueError, match="reads tokens that follow; this model is causal"):
        model.init(jax.random.key(0), jnp.zeros((1, 6), jnp.int32))
