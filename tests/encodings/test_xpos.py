import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import RoPE, XPos
from posjax.encodings.base import Side

REASON = "compares with x-transformers' code"
QUERY, KEY = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 8))
PLACES = jnp.array([[0, 1, 2, 3, 4], [7, 100, 300, 3, 600]])
LAYOUTS = pytest.mark.parametrize("layout", ["half", "interleaved"])


def logits(encoding, query, key, query_places, key_places):
    query, key = encoding.apply(
        {}, Side(query, query_places), Side(key, key_places), method="rotate"
    )
    return jnp.einsum("btnh,bsnh->bnts", query, key)


def slow_logit(query, key, distance, scale_base, layout):
    """The formula for one query and key, in Python's numbers."""
    size, total = len(query), 0.0
    for pair in range(size // 2):
        at = (pair, pair + size // 2) if layout == "half" else (2 * pair, 2 * pair + 1)
        zeta = (2 * pair + 0.4 * size) / (1.4 * size)
        q, k = (complex(float(x[at[0]]), float(x[at[1]])) for x in (query, key))
        angle = distance * 10_000.0 ** (-2 * pair / size)
        turned = (q * k.conjugate() * complex(math.cos(angle), math.sin(angle))).real
        total += zeta ** (distance / scale_base) * turned
    return total


@LAYOUTS
@pytest.mark.parametrize("centred", [False, True])
def test_equals_the_formula(layout, centred):
    encoding = XPos(scale_base=100.0, layout=layout, centred=centred)
    found = np.asarray(logits(encoding, QUERY, KEY, PLACES, PLACES))
    query, key = np.asarray(QUERY), np.asarray(KEY)
    for b, n, t, s in np.ndindex(found.shape):
        distance = int(PLACES[b, t] - PLACES[b, s])
        want = slow_logit(query[b, t, n], key[b, s, n], distance, 100.0, layout)
        np.testing.assert_allclose(found[b, n, t, s], want, rtol=5e-4, atol=5e-4)


@pytest.mark.filterwarnings("ignore")
def test_centred_equals_x_transformers():
    torch = pytest.importorskip("torch", reason=REASON)
    other = pytest.importorskip("x_transformers.x_transformers", reason=REASON)
    angles, scale = other.RotaryEmbedding(8, use_xpos=True, scale_base=64)(torch.arange(5))
    heads_first = (torch.tensor(np.asarray(x)).transpose(1, 2) for x in (QUERY, KEY))
    want = (
        other.apply_rotary_pos_emb(x, angles, s).transpose(1, 2).numpy()
        for x, s in zip(heads_first, (scale, scale**-1), strict=True)
    )
    encoding = XPos(scale_base=64.0, centred=True, layout="interleaved")
    places = jnp.broadcast_to(jnp.arange(5), (2, 5))
    found = encoding.apply({}, Side(QUERY, places), Side(KEY, places), method="rotate")
    for ours, theirs in zip(found, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@LAYOUTS
def test_the_reference_does_not_matter(layout):
    settings = {"scale_base": 200.0, "layout": layout}
    want = logits(XPos(**settings), QUERY, KEY, PLACES, PLACES)
    centred = logits(XPos(**settings, centred=True), QUERY, KEY, PLACES, PLACES)
    np.testing.assert_allclose(centred, want, rtol=1e-4, atol=1e-4)
    shifted = logits(XPos(**settings), QUERY, KEY, PLACES + 33, PLACES + 33)
    np.testing.assert_allclose(shifted, want, rtol=2e-3, atol=2e-3)


def test_a_key_is_turned_alike_whatever_follows():
    """Without a centre a cache of turned keys would do; with one it would not."""
    for centred in (False, True):
        encoding = XPos(centred=centred)
        whole = encoding.apply({}, Side(QUERY, PLACES), Side(KEY, PLACES), method="rotate")[1]
        part = (Side(x[:, :3], PLACES[:, :3]) for x in (QUERY, KEY))
        first = encoding.apply({}, *part, method="rotate")[1]
        assert np.array_equal(whole[:, :3], first) != centred


def test_an_endless_scale_is_rope():
    wide = XPos(scale_base=1e9).apply({}, Side(QUERY, PLACES), Side(KEY, PLACES), method="rotate")
    rope = RoPE().apply({}, Side(QUERY, PLACES), Side(KEY, PLACES), method="rotate")
    for ours, theirs in zip(wide, rope, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("centred", "place"), [(False, 32_000), (True, 64_000)])
def test_far_positions_are_finite_and_their_logits_right(dtype, centred, place):
    """Logits of two tokens one position apart, there as here, and their gradients."""
    near = jnp.array([[0, 1]])
    encoding = XPos(centred=centred)
    ones = jnp.ones((1, 2, 1, 64), dtype)

    def last(query, places):
        return jnp.sum(logits(encoding, query, ones, places, places)[0, 0, 1], dtype=jnp.float32)

    far, gradient = jax.value_and_grad(last)(ones, near + place - 1)
    tolerance = 0.003 if dtype == jnp.float32 else 0.1
    np.testing.assert_allclose(far, last(ones, near), rtol=tolerance)
    assert np.isfinite(gradient.astype(jnp.float32)).all()


def test_channels_must_come_in_pairs():
    x = jnp.ones((1, 1, 1, 5))
    with pytest.raises(ValueError, match="head size of XPos is 5; it must be even"):
        XPos().apply({}, Side(x, jnp.array([[1]])), Side(x, jnp.array([[1]])), method="rotate")
