"""Caches and variables of other models, and numbers at the limits of their types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import create, registry
from posjax.models import Transformer, TransformerConfig, generate, init_cache

TOKENS = jnp.array([[1, 2, 3], [3, 2, 1]])
KEY = jax.random.key(0)


@functools.cache
def build(name="cope", **settings):
    """A model and its variables."""
    config = TransformerConfig(**{"layers": 1, "width": 16} | settings)
    model = Transformer(config, 7, create(name))
    shapes = jax.eval_shape(model.init, KEY, TOKENS)
    return model, jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), shapes)


@functools.cache
def cache_of(name="cope", **settings):
    with jax.numpy_dtype_promotion("standard"):
        return init_cache(*build(name, **settings), 2, 6)


def replaced(**fields):
    return lambda: cache_of()._replace(**fields)


CACHES = {
    "larger heads": (lambda: cache_of(width=32), "array of keys in cache has shape"),
    "one key head": (lambda: cache_of(kv_heads=1), "array of keys in cache has shape"),
    "another dtype": (
        lambda: cache_of(dtype="bfloat16"),
        "array of keys in cache has dtype bfloat16; it must be float32",
    ),
    "memory": (lambda: cache_of("forgetting"), "cache is Remembered.*; it must be one that holds"),
    "fractions as indices": (
        replaced(indices=jnp.zeros((2, 6))),
        r"cache is float32\[2\]; it must be one that holds int\[2\] of each token",
    ),
    "indices of one row": (
        replaced(indices=jnp.zeros((1, 6), jnp.int32)),
        r"cache is int\[1\]; it must be one that holds int\[2\]",
    ),
    "a negative length": (replaced(length=jnp.int32(-1)), "length of cache is -1"),
    "a length of each row": (replaced(length=jnp.zeros(2, int)), "length of cache has shape"),
    "no layers": (replaced(layers=(1,)), "layer of cache is 1; it must be an instance of"),
}


@pytest.mark.parametrize("case", CACHES)
def test_caches_of_other_models_are_refused(case):
    cache, words = CACHES[case]
    model, variables = build()
    cache = cache()
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda variables: model.apply(variables, TOKENS, cache=cache), variables)


def test_a_carry_of_another_encoding_is_refused():
    model, variables = build("abacus")
    with pytest.raises(ValueError, match=r"carry of cache is None; it must be one that holds int"):
        model.apply(variables, TOKENS, cache=cache_of())


def test_keep_beside_a_cache_changes_nothing():
    model, variables = build()
    want = model.apply(variables, TOKENS, cache=cache_of())
    got = model.apply(variables, TOKENS, cache=cache_of(), keep=True)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_parameters_that_the_model_does_not_have_are_refused():
    model, _ = build()
    _, larger = build(layers=2)
    with pytest.raises(ValueError, match=r"variables\['params'\]\['layer_1'\].*must be absent"):
        init_cache(model, larger, 2, 3)
    with pytest.raises(ValueError, match=r"variables\['params'\]\['layer_1'\].*must be absent"):
        generate(model, larger, TOKENS, 2)


@pytest.mark.parametrize("name", [*(n for n in registry.all_names() if "." not in n), "rope.yarn"])
def test_no_tokens_have_no_logits(name):
    model, _ = build(name, layers=2 if name == "peg" else 1)
    for shape in ((0, 3), (2, 0)):
        tokens = jnp.zeros(shape, jnp.int32)
        logits, _ = jax.eval_shape(lambda tokens: model.init_with_output(KEY, tokens), tokens)
        assert logits.shape == (*shape, 7)


GENERATE = {
    "0 in float32": ({"temperature": 1e-46}, "temperature is 1e-46; it must be 0 or from"),
    "infinite in float32": ({"temperature": 1e300}, r"temperature is 1e\+300; it must be 0 or"),
    "a flag as temperature": ({"temperature": True}, "temperature is True"),
    "a flag as steps": ({"steps": True}, "steps is True; it must be an integer"),
    "a key of no use": ({"key": 1, "temperature": 0.0}, "key is 1"),
    "half a raw key": ({"key": jnp.zeros(1, jnp.uint32)}, "it must be a random key"),
    "several raw keys": ({"key": jnp.zeros((2, 2), jnp.uint32)}, "it must be a random key"),
    "large tokens": (
        {"prompt": np.array([[2**32 + 1]])},
        "a token is 4294967297; it must be from 0 to 6",
    ),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate_refuses(case):
    change, words = GENERATE[case]
    model, variables = build()
    settings = {"model": model, "variables": variables, "prompt": TOKENS, "steps": 2}
    settings |= {"temperature": 1.0, "key": KEY}
    with pytest.raises(ValueError, match=words):
        generate(**settings | change)


def test_foreign_tokens_inside_jit_have_no_next_token():
    model, variables = build()
    prompt = TOKENS.at[0, 1].set(7)
    tokens = jax.jit(lambda prompt: generate(model, variables, prompt, 2))(prompt)
    assert (tokens[0] == -1).all() and (tokens[1] >= 0).all()


def test_infinite_logits_have_no_token():
    model, variables = build("nope")
    head = variables["params"]["head"]["kernel"].at[:, 2].set(jnp.inf)
    variables = {"params": variables["params"] | {"head": {"kernel": head}}}
    with pytest.raises(ValueError, match="variables must be such that they are finite"):
        generate(model, variables, TOKENS, 1)


def test_the_coldest_temperature_is_greedy():
    model, variables = build("nope")
    kernel = variables["params"]["head"]["kernel"]
    head = {"kernel": jax.random.normal(KEY, kernel.shape)}
    variables = {"params": variables["params"] | {"head": head}}
    cold = generate(model, variables, TOKENS, 2, temperature=1.2e-38, key=KEY)
    np.testing.assert_array_equal(cold, generate(model, variables, TOKENS, 2))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"width": 2**40, "heads": 1}, "model.width is 1099511627776; it must be at most 1048576"),
        ({"layers": 2**30}, "model.layers is 1073741824; it must be at most 1048576"),
        ({"mlp_ratio": 1e30}, "model.mlp_ratio is 1e"),
    ],
)
def test_sizes_beyond_reason_are_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        TransformerConfig(**setting)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8])
def test_tokens_of_small_types(dtype):
    model = Transformer(TransformerConfig(layers=1, width=16), 300)
    run = lambda tokens: model.init_with_output(KEY, tokens)[0]  # noqa: E731
    assert jax.eval_shape(run, TOKENS.astype(dtype)).shape == (2, 3, 300)
