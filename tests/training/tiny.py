"""A run that takes a moment: shared by the tests of training."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.console import Console

from posjax.encodings import CoPE, PositionEncoding
from posjax.models import TransformerConfig
from posjax.positions import check_length
from posjax.tasks import SelectiveCopy
from posjax.training import Config, MeshConfig, OptimizerConfig, TrainConfig

TASK = SelectiveCopy(symbols=2, alphabet=2, blanks=2, dense_blanks=2, sparse_blanks=2, examples=12)


class Toy(nn.Module):
    """Stands for the transformer and compiles in a moment: mixes the tokens before each place."""

    config: TransformerConfig
    vocab_size: int
    encoding: PositionEncoding | None = None

    @nn.compact
    def __call__(self, tokens, *, deterministic=True):
        if hasattr(self.encoding, "max_length"):
            check_length(tokens.shape[1], self.encoding.max_length, "Toy")
        x = nn.Embed(self.vocab_size, 8, name="embedding")(tokens)
        x = nn.gelu(nn.Dense(16)(x + 0.1 * jnp.cumsum(x, axis=1)))
        x = nn.Dropout(self.config.dropout, deterministic=deterministic)(x)
        return nn.Dense(self.vocab_size)(x)


def tiny(**changes) -> Config:
    """A config of one tiny layer; changes go by dotted path with `__`, such as train__steps=3."""
    config = Config(
        name="tiny",
        task=TASK,
        model=TransformerConfig(layers=1, heads=1, width=8),
        encoding=CoPE(num_positions=4),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(
            steps=6, batch_size=8, log_every=2, checkpoint_every=3, evaluation_batch_size=8
        ),
        mesh=MeshConfig(data=1),
    )
    for path, value in changes.items():
        section, _, name = path.rpartition("__")
        if section:
            name, value = section, dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{name: value})
    return config


def printed(show) -> str:
    """What `show(console)` prints."""
    text = io.StringIO()
    show(Console(file=text, width=200))
    return text.getvalue()


def assert_same_bits(a, b) -> None:
    """Two trees have the same structure and the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
