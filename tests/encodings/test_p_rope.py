import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import PRoPE, RoPE
from posjax.encodings.base import Side
from posjax.encodings.p_rope import p_rope_frequencies

REASON = "compares with Hugging Face's code"
X = jax.random.normal(jax.random.key(0), (2, 4, 3, 16))
PLACES = jnp.array([[0, 1, 50, 900], [3, 4, 5, 6]])


def turned(encoding, places=PLACES):
    return encoding.apply({}, Side(X, places), Side(X[:, :, :1], places), method="rotate")


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_all_pairs_are_rope_and_none_is_no_encoding(layout):
    pairs = zip(turned(PRoPE(1e4, 1.0, layout=layout)), turned(RoPE(layout=layout)), strict=True)
    for ours, rope in pairs:
        np.testing.assert_array_equal(ours, rope)
    for pairs in ("fast", "slow"):
        np.testing.assert_array_equal(turned(PRoPE(fraction=0.0, pairs=pairs))[0], X)


@pytest.mark.parametrize("pairs", ["fast", "slow"])
def test_which_pairs_turn(pairs):
    rope, query = turned(RoPE())[0], turned(PRoPE(fraction=0.25, pairs=pairs))[0]
    turning = np.array([0, 1, 8, 9]) if pairs == "fast" else np.array([6, 7, 14, 15])
    still = np.setdiff1d(np.arange(16), turning)
    np.testing.assert_array_equal(query[..., still], X[..., still])
    np.testing.assert_array_equal(query[..., turning], rope[..., turning])


def test_number_of_pairs_is_rounded_down():
    for fraction, kept in ((0.75, 6), (0.7, 5), (0.13, 1), (0.1, 0), (1.0, 8)):
        for pairs in ("fast", "slow"):
            assert np.count_nonzero(p_rope_frequencies(16, 1e4, fraction, pairs)) == kept


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("channels", "encoding"),
    [(64, PRoPE()), (64, PRoPE.proportional()), (32, PRoPE(5e5, 0.3)), (6, PRoPE(fraction=0.5))],
)
def test_frequencies_equal_hugging_face(channels, encoding):
    pytest.importorskip("torch", reason=REASON)
    ropes = pytest.importorskip("transformers.modeling_rope_utils", reason=REASON)
    transformers = pytest.importorskip("transformers", reason=REASON)
    if "proportional" not in ropes.ROPE_INIT_FUNCTIONS:
        pytest.skip("this version of transformers has no proportional RoPE")
    config = transformers.LlamaConfig(
        hidden_size=2 * channels,
        num_attention_heads=2,
        head_dim=channels,
        rope_parameters={
            "rope_type": "proportional",
            "rope_theta": encoding.base,
            "partial_rotary_factor": encoding.fraction,
        },
    )
    want, _ = ropes.ROPE_INIT_FUNCTIONS["proportional"](config, "cpu")
    found = p_rope_frequencies(channels, encoding.base, encoding.fraction)
    np.testing.assert_allclose(found, want.numpy(), rtol=2e-6)


def test_scores_depend_on_the_distance_only():
    def scores(places):
        query, key = turned(PRoPE(fraction=0.5), places)
        return jnp.einsum("btnh,bsh->bnts", query, key[:, :, 0])

    np.testing.assert_allclose(scores(PLACES), scores(PLACES + 77), atol=2e-3)


def test_published_settings():
    assert PRoPE() == PRoPE(base=10_000.0, fraction=0.75, pairs="fast")
    assert PRoPE.reversed() == PRoPE(pairs="slow")
    assert PRoPE.proportional() == PRoPE(base=1e6, fraction=0.25)


def test_channels_must_come_in_pairs():
    x = jnp.ones((1, 1, 1, 5))
    with pytest.raises(ValueError, match="head size of PRoPE is 5; it must be even"):
        PRoPE().apply({}, Side(x, jnp.array([[1]])), Side(x, jnp.array([[1]])), method="rotate")
