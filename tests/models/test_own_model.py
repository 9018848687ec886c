"""Encodings in someone's own decoder, with one config for all layers and Linen's cache variables.

The shape is that of Flax's lm1b example; the code is not.
"""

import dataclasses

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax import dot_product_attention
from posjax.encodings import registry
from posjax.encodings.base import PositionEncoding, Side, Sizes
from posjax.positions import sequence_positions

TOKENS = jnp.array([[1, 5, 3, 3, 0, 6], [2, 2, 4, 1, 0, 5]])
BATCH, LENGTH = TOKENS.shape
NAMES = ("cope", "t5", "t5.per_layer", "rope", "learned", "temperature", "cope+shaw.keys")


class _Settings:
    @property
    def sizes(self):
        return Sizes(self.heads, self.heads, self.width // self.heads)


@dataclasses.dataclass(frozen=True)
class Plain(_Settings):
    """Linen does not look into it, so that the encoding stays unbound."""

    encoding: PositionEncoding
    layers: int = 3
    heads: int = 2
    width: int = 16
    decode: bool = False


@flax.struct.dataclass
class Struct(_Settings):
    """Linen finds the encoding in it, and attaches it to the first module that has the config."""

    encoding: PositionEncoding
    layers: int = 3
    heads: int = 2
    width: int = 16
    decode: bool = False


class Attention(nn.Module):
    """Attention with keys, values, memory and indices in variables."""

    config: Plain | Struct
    encoding: PositionEncoding

    def known(self, name, new, start):
        """The arrays of all tokens so far."""
        if not self.config.decode:
            return new
        room = lambda x: jnp.zeros((BATCH, LENGTH, *x.shape[2:]), x.dtype)  # noqa: E731
        kept = self.variable("cache", f"known_{name}", lambda: jax.tree.map(room, new))
        write = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, start, 1)  # noqa: E731
        kept.value = jax.tree.map(write, kept.value, new)
        return kept.value

    @nn.compact
    def __call__(self, x, start, indices, shared):
        encoding, sizes = self.encoding, self.config.sizes
        project = lambda name: nn.DenseGeneral((sizes.heads, sizes.head_size), name=name)(x)  # noqa: E731
        memory = encoding.cache(x, sizes)
        query = Side(project("query"), indices, memory)
        value = self.known("value", project("value"), start)
        key = Side(
            self.known("key", project("key"), start),
            self.known("indices", indices, start),
            self.known("memory", memory, start),
            value,
        )
        turned = encoding.rotate(query, key)
        query, key = query._replace(x=turned[0]), key._replace(x=turned[1])
        places = sequence_positions(BATCH, x.shape[1], start)
        bias = encoding.bias(query, key, shared)
        mixed = dot_product_attention(
            query.x, key.x, value, bias, is_causal=True, query_positions=places
        )
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(mixed)


class Block(nn.Module):
    """Attention and a small MLP."""

    config: Plain | Struct
    encoding: PositionEncoding

    @nn.compact
    def __call__(self, x, *inputs):
        x = x + Attention(self.config, self.encoding, name="attention")(nn.LayerNorm()(x), *inputs)
        return x + nn.Dense(self.config.width)(nn.gelu(nn.LayerNorm()(x)))


class Decoder(nn.Module):
    """The whole model."""

    config: Plain | Struct

    def setup(self):
        config, encoding = self.config, self.config.encoding
        self.encoding = encoding
        self.embedding = nn.Embed(7, config.width)
        self.blocks = [
            Block(config, encoding.layer(index, config.layers)) for index in range(config.layers)
        ]

    @nn.compact
    def __call__(self, tokens):
        start = jnp.int32(0)
        if self.config.decode:
            index = self.variable("cache", "index", lambda: start)
            start, index.value = index.value, index.value + tokens.shape[1]
        places = sequence_positions(BATCH, tokens.shape[1], start)
        indices, _ = self.encoding.positions(tokens, places)
        x = self.encoding.embed(self.embedding(tokens), indices)
        shared = self.encoding.shared(self.config.sizes)
        for block in self.blocks:
            x = block(x, start, indices, shared)
        return self.embedding.attend(x)


def tables(params) -> dict[str, int]:
    """How many arrays of encodings there are, by the module in which they are."""
    found = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        keys = [part.key for part in path]
        if any("encoding" in key for key in keys):
            found[keys[0]] = found.get(keys[0], 0) + 1
    return found


@pytest.mark.parametrize("config", [Plain, Struct])
@pytest.mark.parametrize("name", NAMES)
def test_each_layer_has_its_own_tables(name, config):
    model = Decoder(config(registry.create(name)))
    found = tables(jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"])
    each = {"cope": 1, "t5.per_layer": 1, "cope+shaw.keys": 2}.get(name, 0)
    at_top = name in ("t5", "learned", "temperature")
    assert sum(found.values()) == 3 * each + at_top
    assert {key: count for key, count in found.items() if key.startswith("blocks")} == (
        {f"blocks_{index}": each for index in range(3)} if each else {}
    )


@pytest.mark.parametrize("name", ["cope", "learned", "temperature"])
def test_decoding_is_the_full_pass(name):
    model = Decoder(Struct(registry.create(name), layers=2))
    decoder = Decoder(dataclasses.replace(model.config, decode=True))
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    want = jax.jit(model.apply)(variables, TOKENS)
    step = jax.jit(lambda state, part: decoder.apply(variables | state, part, mutable=["cache"]))
    _, shapes = jax.eval_shape(step, {}, TOKENS[:, :1])
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    got = []
    for index in range(LENGTH):
        logits, state = step(state, TOKENS[:, index : index + 1])
        got.append(logits)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, atol=2e-5)
