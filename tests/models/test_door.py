"""Wrong arguments of a model, of `generate` and of `init_cache`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import create, registry
from posjax.models import Transformer, TransformerConfig, generate, init_cache

TOKENS = jnp.array([[1, 2, 3], [3, 2, 1]])
KEY = jax.random.key(0)
PLACES = jnp.arange(3)


@functools.cache
def build(name="cope", **settings):
    """A model and its variables."""
    config = TransformerConfig(**{"layers": 1, "width": 16} | settings)
    model = Transformer(config, 7, create(name))
    shapes = jax.eval_shape(model.init, KEY, TOKENS)
    return model, jax.tree.map(lambda x: jnp.full(x.shape, 0.1, x.dtype), shapes)


@functools.cache
def cache_of(name="cope", batch=2, room=6, **settings):
    with jax.numpy_dtype_promotion("standard"):
        return init_cache(*build(name, **settings), batch, room)


def replaced(**fields):
    return lambda: {"cache": cache_of()._replace(**fields)}


MODEL = {
    "positions of bool": ({"positions": TOKENS == 1}, "positions has dtype bool"),
    "positions of NaN": ({"positions": jnp.full((2, 3), jnp.nan)}, "positions has dtype float32"),
    "positions of one token": (
        {"positions": TOKENS[:, :1]},
        r"positions has shape \(2, 1\); it must be \[3\] or \[1 or 2, 3\]",
    ),
    "positions of a word": ({"positions": "first"}, "positions is 'first'; it must be an array"),
    "positions of three rows": ({"positions": jnp.ones((3, 3), int)}, "positions has shape"),
    "segments of one token": ({"segment_ids": TOKENS[:, :1]}, r"segment_ids has shape \(2, 1\)"),
    "segments of bool": ({"segment_ids": TOKENS == 1}, "segment_ids has dtype bool"),
    "deterministic of a word": (
        {"deterministic": "False"},
        "deterministic is 'False'; it must be True or False",
    ),
    "deterministic of 0": ({"deterministic": 0}, "deterministic is 0"),
    "keep of 1": ({"keep": 1}, "keep is 1; it must be True or False"),
    "keep of None": ({"keep": None}, "keep is None"),
    "a dictionary": ({"cache": {}}, "cache is {}; it must be a Cache"),
    "a tuple": ({"cache": (1, 2)}, r"cache is \(1, 2\); it must be a Cache"),
    "more layers": (
        lambda: {"cache": cache_of(layers=2)},
        "cache.layers has 2 layers; it must have 1",
    ),
    "scanned layers": (
        lambda: {"cache": cache_of(scan_layers=True)},
        "cache.layers is a LayerState; it must be a tuple of 1 LayerState",
    ),
    "more heads": (
        lambda: {"cache": cache_of(heads=4)},
        r"cache.layers\[0\].attention.key has shape \(2, 6, 4, 4\); it must be \[2, room, 2, 8\]",
    ),
    "larger heads": (lambda: {"cache": cache_of(width=32)}, "attention.key has shape"),
    "one key head": (lambda: {"cache": cache_of(kv_heads=1)}, "attention.key has shape"),
    "one row": (lambda: {"cache": cache_of(batch=1)}, "attention.key has shape"),
    "another dtype": (
        lambda: {"cache": cache_of(dtype="bfloat16")},
        "attention.key has dtype bfloat16; it must be float32",
    ),
    "memory of another encoding": (
        lambda: {"cache": cache_of("forgetting")},
        "cache.layers.attention is Remembered.*; it must be",
    ),
    "fractions as indices": (
        replaced(indices=jnp.zeros((2, 6))),
        "cache.indices has dtype float32; it must be int32",
    ),
    "indices of one row": (
        replaced(indices=jnp.zeros((1, 6), jnp.int32)),
        r"cache.indices has shape \(1, 6\)",
    ),
    "a negative length": (replaced(length=jnp.int32(-1)), "cache.length is -1"),
    "a length of each row": (replaced(length=jnp.zeros(2, int)), "cache.length has shape"),
}


@pytest.mark.parametrize("case", MODEL)
def test_the_model_refuses(case):
    change, words = MODEL[case]
    model, variables = build()
    change = change() if callable(change) else change
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda variables: model.apply(variables, TOKENS, **change), variables)


def test_layers_that_are_scanned_refuse_those_that_are_not():
    model, variables = build(scan_layers=True)
    for cache, words in (
        (cache_of(), "cache.layers is a tuple; it must be one LayerState"),
        (cache_of(layers=2, scan_layers=True), r"cache.layers.attention.key has shape \(2, "),
    ):
        with pytest.raises(ValueError, match=words):
            model.apply(variables, TOKENS, cache=cache)


def test_a_carry_of_another_encoding_is_refused():
    model, variables = build("abacus")
    with pytest.raises(ValueError, match=r"cache.carry is None; it must be int32\[2\]"):
        model.apply(variables, TOKENS, cache=cache_of())


@pytest.mark.parametrize("name", ["positions", "segment_ids"])
def test_one_row_is_for_all(name):
    model, variables = build("rope")
    row = jnp.array([0, 1, 1])
    want = model.apply(variables, TOKENS, **{name: jnp.stack((row, row))})
    for same in (row[None], [0, 1, 1]):
        got = model.apply(variables, TOKENS, **{name: same})
        np.testing.assert_array_equal(got, want)


def test_keep_beside_a_cache_changes_nothing():
    model, variables = build()
    want = model.apply(variables, TOKENS, cache=cache_of())
    got = model.apply(variables, TOKENS, cache=cache_of(), keep=True)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("name", [*(n for n in registry.all_names() if "." not in n), "rope.yarn"])
def test_no_tokens_have_no_logits(name):
    model, _ = build(name, layers=2 if name == "peg" else 1)
    for shape in ((0, 3), (2, 0)):
        tokens = jnp.zeros(shape, jnp.int32)
        if not model.encoding or not model.encoding.reads_ahead:
            logits, _ = jax.eval_shape(lambda tokens: model.init_with_output(KEY, tokens), tokens)
            assert logits.shape == (*shape, 7)


GENERATE = {
    "an integer as key": ({"key": 1}, "key is 1; it must be one random key"),
    "a word as key": ({"key": "a"}, "key is 'a'; it must be one random key"),
    "floats as key": ({"key": jnp.ones(2)}, "it must be one random key"),
    "signed integers as key": ({"key": jnp.zeros(2, jnp.int32)}, "it must be one random key"),
    "several keys": ({"key": jax.random.split(KEY, 2)}, r"key has shape \(2,\); it must be one"),
    "several raw keys": ({"key": jnp.zeros((2, 2), jnp.uint32)}, r"key has shape \(2,\)"),
    "half a raw key": ({"key": jnp.zeros(1, jnp.uint32)}, r"key has shape \(1,\)"),
    "a key of no use": ({"key": 1, "temperature": 0.0}, "key is 1"),
    "a temperature of NaN": ({"temperature": float("nan")}, "temperature is nan"),
    "an infinite temperature": ({"temperature": float("inf")}, "temperature is inf"),
    "a flag as temperature": ({"temperature": True}, "temperature is True"),
    "0 in float32": ({"temperature": 1e-46}, "temperature is 1e-46; it must be 0 or from"),
    "infinite in float32": ({"temperature": 1e300}, r"temperature is 1e\+300; it must be"),
    "a flag as steps": ({"steps": True}, "steps is True; it must be an integer"),
    "a fraction of steps": ({"steps": 1.0}, "steps is 1.0; it must be an integer"),
    "no steps": ({"steps": 0}, "steps is 0; it must be at least 1"),
    "one axis": ({"prompt": TOKENS[0]}, r"prompt has shape \(3,\)"),
    "fractions": ({"prompt": jnp.ones((2, 3))}, "prompt has dtype float32"),
    "nothing": ({"prompt": TOKENS[:, :0]}, r"prompt has shape \(2, 0\)"),
    "no rows": ({"prompt": TOKENS[:0]}, r"prompt has shape \(0, 3\)"),
    "foreign tokens": ({"prompt": TOKENS + 5}, "a token is 7; it must be from 0 to 6"),
    "negative tokens": ({"prompt": TOKENS - 2}, "a token is -1; it must be from 0 to 6"),
    "large tokens": (
        {"prompt": np.array([[2**32 + 1]])},
        "a token is 4294967297; it must be from 0 to 6",
    ),
    "no model": ({"model": None}, "model is None; it must be an instance of Transformer"),
    "a config": ({"model": TransformerConfig()}, "model is TransformerConfig"),
    "no variables": ({"variables": None}, "variables is None; it must be a dictionary"),
    "an array as variables": ({"variables": TOKENS}, r"variables is Array\(\[\["),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate_refuses(case):
    change, words = GENERATE[case]
    model, variables = build()
    settings = {"model": model, "variables": variables, "prompt": TOKENS, "steps": 2}
    settings |= {"temperature": 1.0, "key": KEY}
    with pytest.raises(ValueError, match=words):
        generate(**settings | change)


OTHERS = {
    "nothing": (lambda own: {}, r"variables\['params'\]\['embedding'\]\['embedding'\] is None"),
    "params alone": (lambda own: own["params"], "is None; it must be an array"),
    "one without a table": (
        lambda own: build("rope")[1],
        r"\['layer_0'\]\['encoding'\]\['table'\] is None; it must be an array \[64, 8\]",
    ),
    "more layers": (lambda own: build(layers=2)[1], r"\['layer_1'\].*must be absent"),
    "a larger width": (
        lambda own: build(width=32)[1],
        r"has shape \(7, 32\); it must be \[7, 16\]",
    ),
    "a number": (lambda own: {"params": 1}, "is None; it must be an array"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_variables_of_another_model_are_refused(case):
    other, words = OTHERS[case]
    model, variables = build()
    with pytest.raises(ValueError, match=words):
        init_cache(model, other(variables), 2, 3)
    with pytest.raises(ValueError, match=words):
        generate(model, other(variables), TOKENS, 2)


def test_init_cache_refuses_what_is_no_model():
    model, variables = build()
    with pytest.raises(ValueError, match="model is None; it must be an instance of Transformer"):
        init_cache(None, variables, 2, 3)
    with pytest.raises(ValueError, match="variables is None; it must be a dictionary"):
        init_cache(model, None, 2, 3)
    with pytest.raises(ValueError, match="batch is True"):
        init_cache(model, variables, True, 3)


@pytest.mark.parametrize("key", [jax.random.PRNGKey(3), np.array([0, 3], np.uint32)])
def test_raw_keys_are_as_typed_ones(key):
    model, variables = build()
    sample = functools.partial(generate, model, variables, TOKENS, 2, temperature=1.0)
    np.testing.assert_array_equal(sample(key=key), sample(key=jax.random.key(3)))


def test_nan_is_no_token():
    """NaN of token 5 alone: only a row that has it has no next token."""
    model, variables = build("nope", tied_embeddings=False)
    table = variables["params"]["embedding"]["embedding"]
    table = jax.random.normal(KEY, table.shape).at[5].set(jnp.nan)
    variables = {"params": variables["params"] | {"embedding": {"embedding": table}}}
    prompt = TOKENS.at[1, 2].set(5)
    sample = functools.partial(generate, model, variables)
    with pytest.raises(ValueError, match=r"variables gives logits of NaN .* row 1 at step 0"):
        sample(prompt, 2)
    cold, warm = jax.jit(
        lambda prompt: [sample(prompt, 2), sample(prompt, 2, temperature=1.0, key=KEY)]
    )(prompt)
    for tokens in (cold, warm):
        assert (tokens[1] == -1).all() and (tokens[0] >= 0).all()


def test_foreign_tokens_inside_jit_have_no_next_token():
    model, variables = build()
    prompt = TOKENS.at[0, 1].set(7)
    tokens = jax.jit(lambda prompt: generate(model, variables, prompt, 2))(prompt)
    assert (tokens[0] == -1).all() and (tokens[1] >= 0).all()


def test_infinite_logits_have_no_token():
    model, variables = build("nope")
    head = variables["params"]["head"]["kernel"].at[:, 2].set(jnp.inf)
    variables = {"params": variables["params"] | {"head": {"kernel": head}}}
    with pytest.raises(ValueError, match="NaN or infinity"):
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
