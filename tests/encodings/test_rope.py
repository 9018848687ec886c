import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posjax.encodings import RoPE
from posjax.encodings.base import Side
from posjax.encodings.rope import rotate
from posjax.encodings.rotary import lengths, turn
from posjax.frequencies import DynamicNTK, Linear, LongRoPE, YaRN

LAYOUTS = pytest.mark.parametrize("layout", ["half", "interleaved"])
X = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
POSITIONS = jnp.array([[0, 1, 2, 3, 4], [7, 100, 3, 3, 2000]])
REASON = "compares with Hugging Face's and x-transformers' code"


def scores(query, key, query_positions, key_positions, **settings):
    query, key = (
        rotate(x, p, **settings) for x, p in ((query, query_positions), (key, key_positions))
    )
    return jnp.einsum("btnh,bsnh->bnts", query, key)


def test_a_head_of_four_by_hand():
    x = jnp.array([1.0, 2.0, 3.0, 4.0])[None, None, None, :]
    sin, cos, slow_sin, slow_cos = (f(a) for a in (3.0, 0.03) for f in (math.sin, math.cos))
    half = rotate(x, jnp.array([[3]]))[0, 0, 0]
    want = [
        cos - 3 * sin,
        2 * slow_cos - 4 * slow_sin,
        3 * cos + sin,
        4 * slow_cos + 2 * slow_sin,
    ]
    np.testing.assert_allclose(half, want, rtol=1e-5)
    interleaved = rotate(x, jnp.array([[3]]), layout="interleaved")[0, 0, 0]
    want = [
        cos - 2 * sin,
        2 * cos + sin,
        3 * slow_cos - 4 * slow_sin,
        4 * slow_cos + 3 * slow_sin,
    ]
    np.testing.assert_allclose(interleaved, want, rtol=1e-5)


@LAYOUTS
def test_position_zero_changes_nothing(layout):
    still = rotate(X, jnp.zeros((1, 5), jnp.int32), layout=layout)
    np.testing.assert_array_equal(still, X)


@LAYOUTS
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_norms_stay(layout, fraction):
    turned = rotate(X, POSITIONS, layout=layout, fraction=fraction)
    norms = (jnp.linalg.norm(x, axis=-1) for x in (turned, X))
    np.testing.assert_allclose(*norms, rtol=1e-5)


@LAYOUTS
@given(shift=st.integers(-500, 500), fraction=st.sampled_from([0.25, 0.75, 1.0]))
def test_scores_depend_on_the_distance_only(layout, shift, fraction):
    settings = {"layout": layout, "fraction": fraction}
    here = scores(X, X[::-1], POSITIONS, POSITIONS, **settings)
    there = scores(X, X[::-1], POSITIONS + shift, POSITIONS + shift, **settings)
    np.testing.assert_allclose(here, there, atol=5e-3)


def test_layouts_differ_by_a_permutation():
    order = jnp.array([0, 4, 1, 5, 2, 6, 3, 7])
    interleaved = rotate(X[..., order], POSITIONS, layout="interleaved")
    np.testing.assert_allclose(interleaved, rotate(X, POSITIONS)[..., order], atol=1e-6)


@LAYOUTS
def test_a_fraction_turns_the_first_channels_with_a_full_spectrum(layout):
    turned = rotate(X, POSITIONS, fraction=0.5, layout=layout)
    np.testing.assert_array_equal(turned[..., 4:], X[..., 4:])
    np.testing.assert_array_equal(turned[..., :4], rotate(X[..., :4], POSITIONS, layout=layout))


def test_angles_are_float32_for_bfloat16():
    """Positions 1000 and 1001 are the same number in bfloat16."""
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    positions = jnp.array([[1000, 1001]])
    turned = rotate(x, positions)
    assert turned.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), positions).astype(jnp.bfloat16)
    np.testing.assert_array_equal(turned, exact)
    assert not np.array_equal(turned[0, 0], turned[0, 1])


def test_the_module_turns_query_and_key_by_their_own_positions():
    encoding = RoPE(base=500.0, fraction=0.5, layout="interleaved")
    query, key = encoding.apply(
        {}, Side(X, POSITIONS), Side(X[:, :2, :1], POSITIONS[:, :2]), method="rotate"
    )
    settings = {"base": 500.0, "fraction": 0.5, "layout": "interleaved"}
    np.testing.assert_array_equal(query, rotate(X, POSITIONS, **settings))
    np.testing.assert_array_equal(key, rotate(X[:, :2, :1], POSITIONS[:, :2], **settings))


@pytest.mark.filterwarnings("ignore")
def test_half_equals_hugging_face_llama():
    torch = pytest.importorskip("torch", reason=REASON)
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason=REASON)
    config = llama.LlamaConfig(hidden_size=24, num_attention_heads=3, head_dim=8)
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(POSITIONS.tolist()))
    x = torch.tensor(np.asarray(X))
    want, _ = llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    np.testing.assert_allclose(rotate(X, POSITIONS), want.numpy(), atol=1e-3)
    np.testing.assert_allclose(rotate(X, POSITIONS)[0], want.numpy()[0], atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_fraction_equals_hugging_face_gpt_neox():
    torch = pytest.importorskip("torch", reason=REASON)
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox", reason=REASON)
    config = neox.GPTNeoXConfig(hidden_size=24, num_attention_heads=3)
    config.rope_parameters = {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.5,
    }
    places = torch.arange(5)[None]
    cos, sin = neox.GPTNeoXRotaryEmbedding(config)(torch.zeros(1), places)
    x = torch.tensor(np.asarray(X))
    want, _ = neox.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    out = rotate(X, jnp.arange(5)[None], fraction=0.5)
    np.testing.assert_allclose(out, want.numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [8, 4])
def test_interleaved_equals_x_transformers(size):
    torch = pytest.importorskip("torch", reason=REASON)
    other = pytest.importorskip("x_transformers.x_transformers", reason=REASON)
    angles, _ = other.RotaryEmbedding(size)(torch.arange(5))
    heads_first = torch.tensor(np.asarray(X)).transpose(1, 2)
    want = other.apply_rotary_pos_emb(heads_first, angles).transpose(1, 2)
    out = rotate(X, jnp.arange(5)[None], layout="interleaved", fraction=size / 8)
    np.testing.assert_allclose(out, want.numpy(), atol=1e-5)


def test_turn_by_given_angles_and_scales():
    """As complex numbers."""
    random = np.random.default_rng(0)
    angles, scales = random.normal(size=(2, 2, 5, 3, 3)).astype(np.float32)
    turned = np.asarray(turn(X, jnp.asarray(angles), scale=jnp.asarray(scales)))
    x = np.asarray(X)
    want = (x[..., :3] + 1j * x[..., 3:6]) * scales * np.exp(1j * angles)
    np.testing.assert_allclose(turned[..., :3] + 1j * turned[..., 3:6], want, atol=1e-5)
    np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])


def test_linear_scaling_divides_positions():
    squeezed = rotate(X, POSITIONS, scaling=Linear(4.0))
    np.testing.assert_allclose(squeezed, rotate(X, POSITIONS / 4), atol=1e-3)


def test_the_factor_is_for_turned_channels_only():
    scaled = rotate(X, POSITIONS, fraction=0.5, scaling=YaRN(attention_factor=1.5, factor=1.0))
    plain = rotate(X, POSITIONS, fraction=0.5)
    np.testing.assert_allclose(scaled[..., :4], 1.5 * plain[..., :4], rtol=1e-6)
    np.testing.assert_array_equal(scaled[..., 4:], X[..., 4:])


def test_each_row_has_its_own_length():
    scaling = DynamicNTK(original_length=10)
    both = rotate(X, POSITIONS, scaling=scaling)
    np.testing.assert_array_equal(both[0], rotate(X, POSITIONS)[0])  # 5 positions
    alone = rotate(X[1:], POSITIONS[1:], scaling=scaling)
    np.testing.assert_array_equal(both[1:], alone)
    assert not np.allclose(both[1], rotate(X, POSITIONS)[1], atol=0.1)
    assert lengths(POSITIONS).tolist() == [5, 2001]


@pytest.mark.parametrize("scaling", [DynamicNTK(original_length=3), LongRoPE(original_length=3)])
def test_lengths_are_those_of_the_keys_and_grow_while_decoding(scaling):
    """Query and key of a step agree on the frequencies; those of past steps were others."""
    encoding, places = RoPE(scaling=scaling), jnp.arange(5)[None, :]

    @jax.jit
    def logits(query, key, query_positions, key_positions):
        sides = Side(query, query_positions), Side(key, key_positions)
        query, key = encoding.apply({}, *sides, method="rotate")
        return jnp.einsum("btnh,bsnh->nts", query, key)

    x = X[:1]
    whole = logits(x, x, places, places)
    last = logits(x[:, 4:], x, places[:, 4:], places)
    np.testing.assert_allclose(last[:, 0], whole[:, 4], rtol=1e-4, atol=1e-5)
    early = logits(x[:, :2], x, places[:, :2], places)
    np.testing.assert_allclose(early, whole[:, :2], rtol=1e-4, atol=1e-5)
    # Of a full cache of 5 places 3 are filled; the others hold index 0.
    filled = jnp.where(places < 3, places, 0)
    third = logits(x[:, 2:3], x, places[:, 2:3], filled)
    assert not np.allclose(third[:, 0, :3], whole[:, 2, :3], atol=1e-2)
    short = logits(x[:, :3], x[:, :3], places[:, :3], places[:, :3])
    np.testing.assert_allclose(third[:, 0, :3], short[:, 2], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("encoding", "parameters"),
    [
        (RoPE(scaling=Linear(4.0)), {"rope_type": "linear", "factor": 4.0}),
        (
            RoPE(scaling=YaRN(8.0, 64)),
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
        ),
        (
            RoPE(scaling=LongRoPE((8.0,) * 4, (1.0,) * 4, 8.0, 64)),
            {
                "rope_type": "longrope",
                "factor": 8.0,
                "long_factor": [8.0] * 4,
                "short_factor": [1.0] * 4,
                "original_max_position_embeddings": 64,
            },
        ),
        (RoPE(scaling=DynamicNTK(2.0, 64)), {"rope_type": "dynamic", "factor": 2.0}),
    ],
)
def test_scalings_equal_hugging_face_llama(encoding, parameters):
    torch = pytest.importorskip("torch", reason=REASON)
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason=REASON)
    parameters = {"rope_theta": 10_000.0, **parameters}
    config = llama.LlamaConfig(
        hidden_size=24, num_attention_heads=3, head_dim=8, max_position_embeddings=64,
        rope_parameters=parameters,
    )  # fmt: skip
    places = jnp.array([[0, 1, 30, 80, 100]])
    module = llama.LlamaRotaryEmbedding(config)
    cos, sin = module(torch.zeros(1), torch.tensor(places.tolist()))
    x = torch.tensor(np.asarray(X[:1]))
    want, _ = llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    query, key = encoding.apply({}, Side(X[:1], places), Side(X[:1], places), method="rotate")
    np.testing.assert_allclose(query, want.numpy(), atol=5e-5)
    np.testing.assert_array_equal(query, key)


def test_published_settings():
    assert RoPE.partial().fraction == 0.25
    assert RoPE.interleaved().layout == "interleaved"
    assert RoPE.llama3().base == 500_000.0
    kinds = [
        type(getattr(RoPE, name)().scaling).__name__
        for name in ("linear", "ntk", "dynamic", "yarn", "longrope", "llama3")
    ]
    assert kinds == ["Linear", "NTKAware", "DynamicNTK", "YaRN", "LongRoPE", "Llama3"]


@pytest.mark.parametrize(
    ("size", "fraction", "channels"), [(7, 1.0, 7), (8, 0.125, 1), (8, 0.4, 3), (4, 0.1, 0)]
)
def test_channels_must_come_in_pairs(size, fraction, channels):
    with pytest.raises(ValueError, match=f"head size {size} is {channels} channels"):
        rotate(jnp.ones((1, 1, 1, size)), jnp.array([[1]]), fraction=fraction)
