import math

import jax.numpy as jnp
import numpy as np
import pytest

from posjax.frequencies import (
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    NTKAware,
    YaRN,
    rope_frequencies,
)

REASON = "compares with Hugging Face's and x-transformers' code"
BASE = 10_000.0
LENGTHS = jnp.array([1, 100, 101, 1000])
ALL = [Linear, NTKAware, DynamicNTK, YaRN, LongRoPE, Llama3]


def hugging_face(kind, length=None, channels=64, base=BASE, max_length=100, **parameters):
    """Frequencies and factor of their code."""
    pytest.importorskip("torch", reason=REASON)
    ropes = pytest.importorskip("transformers.modeling_rope_utils", reason=REASON)
    transformers = pytest.importorskip("transformers", reason=REASON)
    config = transformers.LlamaConfig(
        hidden_size=2 * channels,
        num_attention_heads=2,
        head_dim=channels,
        max_position_embeddings=max_length,
        rope_parameters={"rope_type": kind, "rope_theta": base, **parameters},
    )
    frequencies, factor = ropes.ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    return frequencies.numpy(), factor


def assert_same(found, want):
    np.testing.assert_allclose(found[0], want[0], rtol=2e-6)
    assert math.isclose(found[1], want[1], rel_tol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_linear_equals_hugging_face():
    assert_same(Linear(5.0)(64, BASE, LENGTHS), hugging_face("linear", factor=5.0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
def test_dynamic_equals_hugging_face_row_by_row(factor):
    frequencies, attention = DynamicNTK(factor, original_length=100)(64, BASE, LENGTHS)
    for row, length in zip(frequencies, LENGTHS.tolist(), strict=True):
        want = hugging_face("dynamic", length, factor=factor)
        np.testing.assert_allclose(row, want[0], rtol=1e-5)
    assert attention == 1.0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("channels", "base", "original", "factor"),
    [(64, 1e4, 4096, 16.0), (128, 5e5, 8192, 4.0), (8, 1e4, 50, 40.0), (16, 1e4, 1000, 1.0)],
)
def test_yarn_equals_hugging_face(channels, base, original, factor, truncate):
    own = YaRN(factor, original, truncate=truncate)(channels, base, LENGTHS)
    settings = {"original_max_position_embeddings": original, "truncate": truncate}
    assert_same(own, hugging_face("yarn", None, channels, base, factor=factor, **settings))


@pytest.mark.filterwarnings("ignore")
def test_yarn_with_other_settings_equals_hugging_face():
    settings = {"beta_fast": 20.0, "beta_slow": 2.0, "attention_factor": 1.5}
    found = YaRN(8.0, 500, **settings)(64, BASE, LENGTHS)
    other = {"original_max_position_embeddings": 500, **settings}
    assert_same(found, hugging_face("yarn", factor=8.0, **other))
    # DeepSeek's.
    other = {"original_max_position_embeddings": 500, "mscale": 0.7, "mscale_all_dim": 0.7}
    assert_same(
        YaRN(8.0, 500, attention_factor=1.0)(64, BASE, LENGTHS),
        hugging_face("yarn", factor=8.0, **other),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_with_a_step_equals_hugging_face(truncate):
    settings = {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": truncate}
    found = YaRN(64.0, 4096, **settings)(64, 5e4, LENGTHS)
    other = {"original_max_position_embeddings": 4096, **settings}
    assert_same(found, hugging_face("yarn", None, 64, 5e4, factor=64.0, **other))
    kept = YaRN(64.0, 4096, 1.0, 1.0, ramp="rotations")(64, 5e4, LENGTHS)[0]
    own = rope_frequencies(64, 5e4)
    np.testing.assert_allclose(kept, np.where(own * 4096 >= 2 * np.pi, own, own / 64))


def test_yarn_as_the_paper_writes_it():
    factor, original, slow, fast = 16.0, 4096, 1.0, 32.0
    found, attention = YaRN(factor, original, ramp="rotations")(128, BASE, LENGTHS)
    for pair in range(64):
        frequency = BASE ** (-2 * pair / 128)
        turns = original / (2 * math.pi / frequency)
        share = 0 if turns < slow else 1 if turns > fast else (turns - slow) / (fast - slow)
        want = (1 - share) * frequency / factor + share * frequency
        np.testing.assert_allclose(found[pair], want, rtol=1e-12)
    assert math.isclose(attention, 0.1 * math.log(16) + 1)
    assert not np.allclose(found, YaRN(factor, original)(128, BASE, LENGTHS)[0], rtol=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_longrope_equals_hugging_face_row_by_row():
    long, short = (tuple(np.linspace(1, end, 32).round(2).tolist()) for end in (40.0, 1.5))
    frequencies, attention = LongRoPE(long, short, 8.0, 100)(64, BASE, LENGTHS)
    settings = {"long_factor": list(long), "short_factor": list(short), "factor": 8.0}
    for row, length in zip(frequencies, LENGTHS.tolist(), strict=True):
        other = hugging_face("longrope", length, original_max_position_embeddings=100, **settings)
        assert_same((row, attention), other)


def test_longrope_without_lists_is_linear_for_long_rows():
    found, attention = LongRoPE(factor=8.0, original_length=100)(8, BASE, LENGTHS)
    own = rope_frequencies(8, BASE)
    np.testing.assert_allclose(found, np.stack([own, own, own / 8, own / 8]), rtol=1e-6)
    assert math.isclose(attention, math.sqrt(1 + math.log(8) / math.log(100)))
    assert LongRoPE(attention_factor=1.25)(8, BASE, LENGTHS)[1] == 1.25


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("factor", "low", "high"), [(8.0, 1.0, 4.0), (32.0, 2.0, 3.0), (16.0, 1.0, 1.0)]
)
def test_llama3_equals_hugging_face(factor, low, high):
    settings = {"low_freq_factor": low, "high_freq_factor": high, "factor": factor}
    settings["original_max_position_embeddings"] = 8192
    want = hugging_face("llama3", None, 128, 5e5, **settings)
    assert_same(Llama3(factor, 8192, low, high)(128, 5e5, LENGTHS), want)


@pytest.mark.filterwarnings("ignore")
def test_ntk_equals_x_transformers():
    pytest.importorskip("torch", reason=REASON)
    other = pytest.importorskip("x_transformers.x_transformers", reason=REASON)
    want = other.RotaryEmbedding(64, base_rescale_factor=4.0).inv_freq.numpy()
    assert_same(NTKAware(4.0)(64, BASE, LENGTHS), (want, 1.0))
    own = rope_frequencies(64, BASE)
    ratio = own / NTKAware(4.0)(64, BASE, LENGTHS)[0]
    np.testing.assert_allclose(ratio[[0, -1]], [1, 4])


@pytest.mark.parametrize("kind", ALL)
def test_a_factor_of_one_is_rope(kind):
    settings = {"original_length": 1000} if kind in (DynamicNTK, LongRoPE) else {}
    found, factor = kind(factor=1.0, **settings)(32, BASE, LENGTHS)
    want = np.broadcast_to(rope_frequencies(32, BASE), np.shape(found))
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert factor == 1.0
