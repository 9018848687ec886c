import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import Sinusoidal
from posjax.encodings.sinusoidal import sinusoids

POSITIONS = jnp.array([[0, 1, 7, 300], [5, 4, 1000, 2]])


def embed(encoding, x, positions):
    return encoding.apply({}, x, positions, method="embed")


def test_a_width_of_four_by_hand():
    waves = sinusoids(jnp.array([[3]]), 4)[0, 0]
    want = [math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)]
    np.testing.assert_allclose(waves, want, rtol=1e-6)
    waves = sinusoids(jnp.array([[3]]), 4, base=16.0, layout="concatenated")[0, 0]
    want = [math.sin(3), math.sin(0.75), math.cos(3), math.cos(0.75)]
    np.testing.assert_allclose(waves, want, rtol=1e-6)


def test_equals_a_float64_computation():
    width = 16
    angles = np.asarray(POSITIONS)[..., None] / 10_000.0 ** (np.arange(0, width, 2) / width)
    waves = sinusoids(POSITIONS, width)
    np.testing.assert_allclose(waves[..., 0::2], np.sin(angles), atol=1e-4)
    np.testing.assert_allclose(waves[..., 1::2], np.cos(angles), atol=1e-4)


def test_layouts_are_permutations_of_each_other():
    interleaved = sinusoids(POSITIONS, 8)
    concatenated = sinusoids(POSITIONS, 8, layout="concatenated")
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    np.testing.assert_array_equal(interleaved[..., order], concatenated)


def test_a_shift_is_a_rotation():
    """PE(p + d) is a linear function of PE(p) that does not depend on p."""
    waves = sinusoids(POSITIONS[:, :2], 8, layout="concatenated")
    shifted = sinusoids(POSITIONS[:, :2] + 3, 8, layout="concatenated")
    scores = jnp.einsum("btd,btd->bt", waves, shifted)
    np.testing.assert_allclose(scores, jnp.full(scores.shape, scores[0, 0]), rtol=1e-5)


def test_is_added_with_its_scale():
    x = jnp.full((2, 4, 8), 2.0)
    out = embed(Sinusoidal(scale=0.5, base=100.0, layout="concatenated"), x, POSITIONS)
    want = 2 + 0.5 * sinusoids(POSITIONS, 8, base=100.0, layout="concatenated")
    np.testing.assert_allclose(out, want, rtol=1e-6)


def test_bfloat16_is_rounded_once():
    """Neighbouring positions beyond 256 stay apart, which bfloat16 positions would not."""
    x = jnp.zeros((1, 2, 8), jnp.bfloat16)
    positions = jnp.array([[1000, 1001]])
    out = embed(Sinusoidal(), x, positions)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, sinusoids(positions, 8).astype(jnp.bfloat16))
    assert not np.array_equal(out[0, 0], out[0, 1])


@pytest.mark.filterwarnings("ignore")
def test_equals_x_transformers():
    reason = "compares with x-transformers"
    torch = pytest.importorskip("torch", reason=reason)
    other = pytest.importorskip("x_transformers.x_transformers", reason=reason)
    want = other.ScaledSinusoidalEmbedding(8)(torch.zeros(1, 50, 8)).detach().numpy()
    encoding = Sinusoidal(scale=8**-0.5, layout="concatenated")
    out = embed(encoding, jnp.zeros((1, 50, 8)), jnp.arange(50)[None])
    np.testing.assert_allclose(out[0], want, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_trained_scale_equals_x_transformers_in_value_and_gradient():
    reason = "compares with x-transformers"
    torch = pytest.importorskip("torch", reason=reason)
    other = pytest.importorskip("x_transformers.x_transformers", reason=reason)
    module = other.ScaledSinusoidalEmbedding(8)
    module.scale.data[:] = 0.7
    want = module(torch.zeros(1, 20, 8))
    (want**3).sum().backward()

    def loss(scale):
        variables = {"params": {"trained_scale": scale}}
        x, places = jnp.zeros((1, 20, 8)), jnp.arange(20)[None]
        out = Sinusoidal.learned_scale().apply(variables, x, places, method="embed")
        return jnp.sum(out**3), out

    gradient, out = jax.grad(loss, has_aux=True)(jnp.float32(0.7))
    np.testing.assert_allclose(out[0], want.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(gradient, module.scale.grad.item(), rtol=1e-4)


def test_a_trained_scale_starts_at_the_scale():
    x, places = jnp.zeros((1, 1, 16)), jnp.zeros((1, 1), jnp.int32)
    init = lambda encoding: encoding.init(jax.random.key(0), x, places, method="embed")  # noqa: E731
    assert init(Sinusoidal.learned_scale()) == {"params": {"trained_scale": jnp.float32(0.25)}}
    assert init(Sinusoidal(scale=0.5, train_scale=True))["params"]["trained_scale"] == 0.5
    assert init(Sinusoidal(scale=None)) == init(Sinusoidal()) == {}
    untrained = embed(Sinusoidal(scale=None), x, places)
    np.testing.assert_array_equal(untrained, 0.25 * sinusoids(places, 16))


def test_variants_are_concatenated():
    assert Sinusoidal.concatenated() == Sinusoidal(layout="concatenated")
    assert Sinusoidal.learned_scale().layout == "concatenated"


def test_fractions_lie_between():
    waves = sinusoids(jnp.array([[1.0, 1.5, 2.0]]), 4)[0, :, 0]
    np.testing.assert_allclose(waves, np.sin([1, 1.5, 2]), rtol=1e-5)


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="width is 7; it must be at least 2 and even"):
        embed(Sinusoidal(), jnp.zeros((1, 1, 7)), jnp.zeros((1, 1), jnp.int32))
