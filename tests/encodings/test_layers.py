"""Each layer of a hand-written model makes its own parameters, unless they are made by `shared`."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from posjax import dot_product_attention
from posjax.encodings import Combine, CoPE, Temperature, registry
from posjax.encodings.base import PositionEncoding, Side, Sizes
from posjax.encodings.stream import stream_of
from posjax.positions import sequence_positions

LAYERS = 3
SIZES = Sizes(2, 2, 8)
TOKENS = jnp.array([list(b"12+34.5")])
LENGTH = TOKENS.shape[1]
# One of each kind: a table, two hooks with parameters, an encoding inside, parts, a stream, both.
SOME = ("t5", "cope", "temperature", "cope+t5", "tape", "randomized.alibi", "fire.shared_layers")


class Layer(nn.Module):
    """One attention layer that calls places 3 and 4, and those of streams."""

    encoding: PositionEncoding

    @nn.compact
    def __call__(self, flow, indices, shared):
        (x, state), stream = flow, stream_of(self.encoding)
        x = stream.update_stream(x, stream.stream_inputs(x), indices, jnp.arange(LENGTH))
        memory = self.encoding.cache(x, SIZES, state)
        query, key, value = (
            nn.DenseGeneral((SIZES.heads, SIZES.head_size), name=name)(x) for name in "qkv"
        )
        query, key = Side(query, indices, memory), Side(key, indices, memory, value)
        turned = self.encoding.rotate(query, key)
        query, key = query._replace(x=turned[0]), key._replace(x=turned[1])
        bias, extra = self.encoding.bias(query, key, shared), stream.extra_values(memory)
        value = value if extra is None else jnp.concatenate((value, extra), axis=-1)
        mixed = dot_product_attention(*turned, value, bias, is_causal=True)
        change = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="o")(mixed[..., :8])
        rest = None if extra is None else mixed[..., 8:]
        return (x + change, stream.update_state(state, change, rest)), None


class Model(nn.Module):
    """The calls that are made once per model; `blocks` differs."""

    encoding: PositionEncoding
    layers: int = LAYERS

    def layer(self, index):
        return self.encoding.layer(index, self.layers)

    def blocks(self):
        return [Layer(self.layer(index), name=f"layer_{index}") for index in range(self.layers)]

    @nn.compact
    def __call__(self, tokens):
        encoding = self.encoding
        indices, _ = encoding.positions(tokens, sequence_positions(*tokens.shape))
        x = encoding.embed(nn.Embed(128, 16, name="embedding")(tokens), indices)
        flow = x, stream_of(encoding).init_state(indices, SIZES)
        shared = encoding.shared(SIZES)
        for block in self.blocks():
            flow, _ = block(flow, indices, shared)
        return flow[0]


class InSetup(Model):
    """Layers are made before any call."""

    def setup(self):
        self.layer_0, self.layer_1, self.layer_2 = (Layer(self.layer(i)) for i in range(LAYERS))

    def blocks(self):
        return [self.layer_0, self.layer_1, self.layer_2]


class OwnLayer(nn.Module):
    """A layer that gets the model's encoding and makes its own."""

    encoding: PositionEncoding
    index: int

    def setup(self):
        self.block = Layer(self.encoding.layer(self.index, LAYERS))

    def __call__(self, *inputs):
        return self.block(*inputs)


class InLayers(Model):
    """Every layer gets the same object."""

    def blocks(self):
        return [OwnLayer(self.encoding, i, name=f"layer_{i}") for i in range(self.layers)]


class Rematerialised(Model):
    """Compact, with layers that are computed again in the backward pass."""

    def blocks(self):
        return [nn.remat(Layer)(self.layer(i), name=f"layer_{i}") for i in range(self.layers)]


class Scanned(Model):
    """One layer, scanned."""

    def blocks(self):
        scanned = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
        )
        return [scanned(self.layer(0), name="layers")]


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings in one object, which is handed to every layer."""

    encoding: PositionEncoding
    layers: int = LAYERS


class FromConfig(nn.Module):
    """A model whose layers take all settings from one object."""

    config: Config

    @nn.compact
    def __call__(self, tokens):
        return Model(self.config.encoding, self.config.layers, name="model")(tokens)


def shapes(model) -> dict:
    """Shapes of parameters, without computing them."""
    made = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    return jax.tree.map(jnp.shape, made).get("params", {})


@pytest.mark.parametrize("name", [n for n in registry.all_names() if n != "nope"])
def test_every_layer_has_its_tables(name, monkeypatch):
    """Those that are made once are the ones that a model without layers makes."""
    monkeypatch.setitem(globals(), "dot_product_attention", lambda q, k, value, *_, **__: value)
    encoding = registry.create(name)
    params, without = shapes(Model(encoding)), shapes(Model(encoding, 0))
    own = [encoding.layer(index, LAYERS) for index in range(LAYERS)]
    alike = [(i, j) for i in range(LAYERS) for j in range(i) if own[i] == own[j]]
    assert all(params[f"layer_{i}"] == params[f"layer_{j}"] for i, j in alike)
    assert {key: params[key] for key in params if not key.startswith("layer_")} == without


FORMS = (InSetup, InLayers, Rematerialised)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_models_have_the_same_tables(name, form):
    encoding = registry.create(name)
    params = shapes(form(encoding))
    if form is InLayers:
        params |= {f"layer_{i}": params[f"layer_{i}"]["block"] for i in range(LAYERS)}
    assert params == shapes(Model(encoding))


@pytest.mark.parametrize("name", SOME)
def test_a_scanned_layer_has_a_table_for_each_step(name):
    encoding = registry.create(name)
    params, unrolled = shapes(Scanned(encoding)), shapes(Model(encoding))
    layer = jax.tree.map(lambda x: (LAYERS, *x), unrolled["layer_0"], is_leaf=is_shape)
    assert params.pop("layers") == layer
    assert params == {key: unrolled[key] for key in unrolled if not key.startswith("layer_")}


def is_shape(x) -> bool:
    return isinstance(x, tuple)


@pytest.mark.parametrize("name", SOME)
def test_a_config_hands_one_encoding_to_all_layers(name):
    encoding = registry.create(name)
    params = shapes(FromConfig(Config(encoding)))["model"]
    unrolled = shapes(Model(encoding))
    assert params == unrolled


class Plain(PositionEncoding):
    """Its form for a layer is itself, as an encoding of someone's own may say."""

    def layer(self, index, layers):
        return self

    @nn.compact
    def bias(self, query, key, shared=None):
        self.param("table", nn.initializers.zeros_init(), (3,))


def test_an_encoding_of_ones_own_has_a_table_in_each_layer():
    params = shapes(Model(Plain()))
    assert [params[f"layer_{i}"]["encoding"] for i in range(LAYERS)] == [{"table": (3,)}] * LAYERS


def test_the_same_part_twice_has_two_tables():
    part = CoPE()
    params = shapes(Model(Combine((Temperature(part), part))))
    found = jax.tree.leaves(params["layer_0"]["encoding"], is_leaf=is_shape)
    assert len([shape for shape in found if len(shape) == 2]) == 2
