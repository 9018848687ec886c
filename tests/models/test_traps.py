"""An encoding in several layers, a second call of `generate`, and a cache that is full."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.attention import dot_product_attention
from posjax.encodings import create, names
from posjax.encodings.base import PositionEncoding, Side, Sizes
from posjax.models import Transformer, TransformerConfig, generate, init_cache

SIZES = Sizes(2, 2, 8)


class Layer(nn.Module):
    """Attention of someone's own model, with an encoding that it is given."""

    encoding: PositionEncoding

    @nn.compact
    def __call__(self, x):
        query, key, value = (
            nn.DenseGeneral((2, 8), name=name)(x) for name in ("query", "key", "value")
        )
        places = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        memory = self.encoding.cache(x, SIZES)
        query, key = Side(query, places, memory), Side(key, places, memory, value)
        turned = self.encoding.rotate(query, key)
        query, key = query._replace(x=turned[0]), key._replace(x=turned[1])
        mixed = dot_product_attention(
            query.x, key.x, value, self.encoding.bias(query, key), is_causal=True
        )
        return x + nn.DenseGeneral(x.shape[-1], axis=(-2, -1))(mixed)


class Compact(nn.Module):
    encoding: PositionEncoding

    @nn.compact
    def __call__(self, x):
        for index in range(3):
            x = Layer(self.encoding.layer(index, 3))(x)
        return x


class WithSetup(nn.Module):
    encoding: PositionEncoding

    def setup(self):
        self.layers = [nn.remat(Layer)(self.encoding.layer(index, 3)) for index in range(3)]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def tables(params) -> list:
    """The arrays of encodings."""
    flat, _ = jax.tree.flatten_with_path(params)
    return [x for path, x in flat if any("encoding" in str(part) for part in path)]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *((name, Compact) for name in ("cope.gate_keys", "shaw", "t5.per_layer")),
        ("shaw", WithSetup),
    ],
)
def test_layers_of_someones_own_model_have_their_own_tables(name, model):
    made = lambda module: jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 4, 16)))  # noqa: E731
    one = model(create(name))
    params = made(one)
    assert len(tables(params)) == 3 * len(tables(made(Layer(create(name))))) > 0
    assert jax.tree.structure(made(one)) == jax.tree.structure(params)


@pytest.mark.parametrize("name", [name for name in names() if name != "nope"])
def test_the_encoding_of_a_layer_is_unbound(name):
    class Holder(nn.Module):
        encoding: PositionEncoding

        def __call__(self):
            layers = [self.encoding.layer(index, 2) for index in range(2)]
            assert all(layer.parent is None and layer.scope is None for layer in layers)
            assert len({id(layer) for layer in layers}) == 2

    Holder(create(name)).apply({})


def small(**settings):
    model = Transformer(TransformerConfig(layers=1, width=16), 7, create("cope"))
    prompt = jnp.array([[1, 2, 3], [3, 2, 1]])
    return model, model.init(jax.random.key(0), prompt), prompt


def count_compilations(run) -> int:
    compiled = []
    listen = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(compiled)


def test_generate_compiles_once():
    model, variables, prompt = small()
    settings = {"temperature": 0.7, "key": jax.random.key(1)}
    first = generate(model, variables, prompt, 4, **settings)
    other = jax.tree.map(lambda x: x + 1.0, variables)
    key, again = jax.random.key(2), small()[0]
    jax.block_until_ready((other, key))
    assert count_compilations(lambda: generate(again, variables, prompt, 4, **settings)) == 0
    changed = functools.partial(generate, model, other, prompt + 1, 4)
    assert count_compilations(lambda: changed(temperature=0.2, key=key)) == 0
    assert count_compilations(lambda: generate(model, variables, prompt, 5, **settings)) > 0
    np.testing.assert_array_equal(generate(again, variables, prompt, 4, **settings), first)


@pytest.mark.parametrize(
    ("name", "chunk"), [("rope", 1), ("rope", 3), ("cope", 2), ("forgetting", 3), ("abacus", 1)]
)
def test_tokens_beyond_a_cache_are_nan_and_spoil_nothing(name, chunk):
    model = Transformer(TransformerConfig(layers=2, width=16), 7, create(name))
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 7)
    variables = model.init(jax.random.key(0), tokens)
    want = model.apply(variables, tokens)
    step = jax.jit(lambda part, cache: model.apply(variables, part, cache=cache))
    cache, logits = init_cache(model, variables, 2, 5), []
    for start in range(0, 8, chunk):
        part, cache = step(tokens[:, start : start + chunk], cache)
        logits.append(part)
    logits = jnp.concatenate(logits, axis=1)
    np.testing.assert_allclose(logits[:, :5], want[:, :5], atol=1e-5)
    assert bool(jnp.all(jnp.isnan(logits[:, 5:])))


def test_a_full_cache_is_an_error_where_its_length_is_known():
    model, variables, prompt = small()
    cache = init_cache(model, variables, 2, 4)
    _, cache = model.apply(variables, prompt, cache=cache)
    with pytest.raises(ValueError, match="room for 4, but tokens has 2 more"):
        model.apply(variables, prompt[:, :2], cache=cache)
    with pytest.raises(ValueError, match="room for 2, but tokens has 3 more"):
        jax.jit(model.apply)(variables, prompt, cache=init_cache(model, variables, 2, 2))


@pytest.mark.parametrize("token", [-1, 7, 10**6])
def test_tokens_outside_the_vocabulary(token):
    model, variables, prompt = small()
    bad = prompt.at[0, 1].set(token)
    with pytest.raises(ValueError, match=f"a token is {token}; it must be from 0 to 6"):
        model.apply(variables, bad)
    logits = jax.jit(model.apply)(variables, bad)
    assert bool(jnp.all(jnp.isnan(logits[0, 1:]))) and not bool(jnp.any(jnp.isnan(logits[1])))
