import dataclasses

import jax
import jax.numpy as jnp
import pytest

import train
from posjax.encodings import CoPE, Learned
from posjax.models import Transformer
from posjax.training import Config, fit
from posjax.training.state import count_parameters

CONFIGS = {name: train.load(name, path) for name, path in train.presets().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_preset_builds(name):
    config = CONFIGS[name]
    assert isinstance(config, Config)
    assert config.name == name and config.encoding is not None
    default = config.encoding.clone(num_positions=CoPE().num_positions)
    assert default == (CoPE.paper() if name.endswith("_paper") else CoPE())
    model = Transformer(
        config.model, vocab_size=config.task.vocabulary.size, encoding=config.encoding
    )
    tokens = jnp.zeros((1, config.task.length), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix types in bfloat16.
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert count_parameters(params) > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_preset_says_what_it_shows(name):
    text = train.description(name, train.presets()[name])
    assert f"python train.py {name}" in text
    for word in ("What it shows:", "Command:", "Result and time:"):
        assert word in text


def test_sizes_of_the_paper():
    flip_flop, text = CONFIGS["flip_flop_paper"], CONFIGS["text_paper"]
    assert (flip_flop.model.layers, flip_flop.model.width, flip_flop.model.heads) == (4, 256, 4)
    assert flip_flop.train.steps == 10_000 and flip_flop.task.length == 512
    assert (text.model.layers, text.model.width, text.model.heads) == (12, 768, 12)
    assert text.task.length == 1024
    # Parameters in millions, with the words of the paper (its table 4).
    for encoding, millions in ((text.encoding, 123.7), (Learned(max_length=1024), 124.4)):
        model = Transformer(text.model, vocab_size=50_257, encoding=encoding)
        with jax.numpy_dtype_promotion("standard"):
            made = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
        assert count_parameters(made["params"]) / 1e6 == pytest.approx(millions, abs=0.05)
    blanks = CONFIGS["selective_copy_paper"].task
    assert (blanks.blanks, blanks.dense_blanks, blanks.sparse_blanks) == (256, 128, 512)


@pytest.mark.slow
def test_debug_runs(tmp_path):
    config = dataclasses.replace(CONFIGS["debug"], runs=str(tmp_path))
    report = fit(config)
    assert report["steps"] == config.train.steps
    assert (tmp_path / "debug" / "report.json").exists()
