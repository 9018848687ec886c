"""Each layer of a hand-written model makes its own parameters, unless they are made by `shared`."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posjax import dot_product_attention
from posjax.encodings import T5, Combine, CoPE, RoPE, Temperature, registry
from posjax.encodings.base import PositionEncoding, Side, Sizes
from posjax.encodings.stream import stream_of
from posjax.encodings.wrapper import Wrapper
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


@pytest.fixture(autouse=True)
def no_attention(monkeypatch):
    """Attention has no parameters, and takes most of the time."""
    monkeypatch.setitem(globals(), "dot_product_attention", lambda q, k, value, *_, **__: value)


def shapes(model) -> dict:
    """Shapes of parameters, without computing them."""
    made = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    return jax.tree.map(jnp.shape, made).get("params", {})


@pytest.mark.parametrize("name", [n for n in registry.all_names() if n != "nope"])
def test_every_layer_has_its_tables(name):
    """Those that are made once are the ones that a model without layers makes."""
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


class Defaults(nn.Module):
    """Two layers that each make an encoding around its class's default."""

    kind: type

    @nn.compact
    def __call__(self, tokens):
        x, places = jnp.ones((1, LENGTH, 16)), sequence_positions(1, LENGTH)
        for index in range(2):
            encoding = self.kind(name=f"encoding_{index}")
            indices, _ = encoding.positions(tokens, places)
            Layer(encoding, name=f"layer_{index}")((x, None), indices, encoding.shared(SIZES))


class Around(Wrapper):
    """A wrapper whose default has a table in each layer."""

    encoding: PositionEncoding = T5(share_layers=False)


class Both(Combine):
    """A combination whose defaults have a table in each layer."""

    encodings: tuple[PositionEncoding, ...] = (T5(share_layers=False), Around())


@pytest.mark.parametrize(("kind", "tables"), [(Temperature, 1), (Around, 1), (Both, 2)])
def test_a_default_is_no_shared_object(kind, tables):
    params = shapes(Defaults(kind))
    for index in range(2):
        assert len(jax.tree.leaves(params[f"encoding_{index}"], is_leaf=is_shape)) == tables


class ReturnsSelf(PositionEncoding):
    """A layer's form that is the encoding itself, with parts inside parts."""

    inside: PositionEncoding = Both()

    def layer(self, index, layers):
        return self

    def bias(self, query, key, shared=None):
        return self.inside.bias(query, key, shared)

    def positions(self, *args, **settings):
        return self.inside.positions(*args, **settings)


def test_an_override_may_return_the_encoding_itself():
    params = shapes(Model(ReturnsSelf()))
    assert "encoding" not in params
    assert len(jax.tree.leaves(params["layer_2"]["encoding"], is_leaf=is_shape)) == 2
    assert all(params[f"layer_{index}"] == params["layer_0"] for index in range(LAYERS))


@pytest.mark.parametrize("name", ["cope", "randomized.alibi", "temperature", "cope+t5"])
def test_a_layer_is_unbound_and_equal(name):
    encoding = registry.create(name)
    own = encoding.layer(0, LAYERS)
    assert own == encoding
    assert own is not encoding
    assert own.parent is None and own.name is None


@pytest.mark.parametrize(
    ("index", "layers", "message"),
    [
        (3, 3, "index is 3; it must be at least 0 and below 3."),
        (-1, 3, "index is -1; it must be at least 0 and below 3."),
        (0, 0, "layers is 0; it must be at least 1."),
        (True, 2, "index is True; it must be an integer, at least 0 and below 2."),
        (0, 2.0, "layers is 2.0; it must be an integer, at least 1."),
    ],
)
def test_a_layer_must_exist(index, layers, message):
    for encoding in (CoPE(), Temperature(), Combine((RoPE(),))):
        with pytest.raises(ValueError, match=re.escape(message)):
            encoding.layer(index, layers)
    assert CoPE().layer(np.int64(1), np.int32(2)) == CoPE()


def test_a_layer_that_is_no_encoding_is_refused():
    class Wrong(PositionEncoding):
        def layer(self, index, layers):
            return None

    words = "layer of Wrong is None; it must be an instance of PositionEncoding."
    with pytest.raises(ValueError, match=re.escape(words)):
        Wrong().layer(0, 1)


def test_layers_of_nnx_have_their_own_tables():
    """Each bridge of a layer's form holds its own variables."""

    class Stack(nnx.Module):
        def __init__(self, encoding, rngs):
            x = jnp.ones((1, LENGTH, 2, 8))
            side = Side(x, sequence_positions(1, LENGTH))
            make = lambda own: nnx.bridge.ToNNX(own, rngs=rngs).lazy_init(  # noqa: E731
                side, side, method="bias"
            )
            self.layers = nnx.List(make(encoding.layer(index, 2)) for index in range(2))

    params = nnx.to_pure_dict(nnx.state(Stack(CoPE(num_positions=4), nnx.Rngs(0)), nnx.Param))
    first, second = (params["layers"][index]["table"] for index in range(2))
    assert first.shape == (4, 8)
    assert not jnp.array_equal(first, second)
