"""What a model, `generate` and `init_cache` refuse, and with what words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import create
from posjax.models import Transformer, TransformerConfig, generate, init_cache

TOKENS = jnp.array([[1, 2, 3], [3, 2, 1]])
ROW = "it must be \\[3\\] or \\[1 or 2, 3\\]"


def made(layers=1, name="rope", **settings):
    model = Transformer(TransformerConfig(layers=layers, width=16, **settings), 7, create(name))
    return model, model.init(jax.random.key(0), TOKENS)


@pytest.fixture(scope="module")
def small():
    return made()


def cache_of(batch=2, **settings):
    return init_cache(*made(**settings), batch, 4)


CALL = {
    "float tokens": ({"tokens": TOKENS.astype(jnp.float32)}, "tokens has dtype float32"),
    "one row": ({"tokens": TOKENS[0]}, "tokens has shape"),
    "positions": ({"positions": "abc"}, "positions is 'abc'; it must be an array"),
    "short positions": ({"positions": jnp.arange(2)}, f"positions has shape \\(2,\\); {ROW}"),
    "column of positions": ({"positions": jnp.ones((2, 1), jnp.int32)}, "positions has shape"),
    "positions of nan": ({"positions": jnp.full((2, 3), jnp.nan)}, "positions has dtype float32"),
    "flags": ({"positions": TOKENS > 1}, "positions has dtype bool"),
    "segments": ({"segment_ids": jnp.ones((3, 3), jnp.int32)}, "segment_ids has shape"),
    "deterministic": ({"deterministic": "False"}, "deterministic is 'False'; .* True or False"),
    "keep": ({"keep": 1}, "keep is 1; it must be True or False"),
    "no cache": ({"cache": {}}, "cache is {}; it must be what init_cache"),
}
CACHES = {
    "layers": ({"layers": 2}, "cache has 2 layers; it must be of this model, with 1 layers"),
    "scanned": ({"scan_layers": True}, "cache has scanned layers; it must be"),
    "heads": ({"heads": 4}, "array of keys in cache has shape"),
    "batch": ({"batch": 3}, "array of keys in cache has shape"),
    "encoding": ({"name": "cope.gate_keys"}, "cache is .*; it must be one that holds"),
}
GENERATE = {
    "model": ({"model": "rope"}, "model is 'rope'; it must be an instance of Transformer"),
    "variables": ({"variables": 3}, "variables is 3; it must be the variables of the model"),
    "variables of none": ({"variables": {"params": {}}}, "variables must be those of the model"),
    "prompt": ({"prompt": TOKENS[:, :0]}, "prompt has shape \\(2, 0\\)"),
    "foreign token": ({"prompt": TOKENS + 5}, "a token is 7; it must be from 0 to 6"),
    "steps": ({"steps": 0}, "steps is 0; it must be at least 1"),
    "endless steps": ({"steps": 10**9}, "steps is 1000000000; it must be at most"),
    "temperature": ({"temperature": float("nan")}, "temperature is nan; it must be a finite"),
    "no key": ({"temperature": 1.0}, "key is None; it must be a random key"),
    "key": ({"temperature": 1.0, "key": 3}, "key is 3; it must be a random key"),
    "keys": ({"temperature": 1.0, "key": jax.random.split(jax.random.key(0))}, "key has shape"),
}


@pytest.mark.parametrize(("change", "words"), CALL.values(), ids=CALL)
def test_what_a_model_refuses(small, change, words):
    model, variables = small
    with pytest.raises(ValueError, match=words):
        model.apply(variables, **({"tokens": TOKENS} | change))


@pytest.mark.parametrize(("settings", "words"), CACHES.values(), ids=CACHES)
def test_a_cache_of_another_model_is_refused(small, settings, words):
    model, variables = small
    with pytest.raises(ValueError, match=words):
        model.apply(variables, TOKENS, cache=cache_of(**settings))


@pytest.mark.parametrize(("change", "words"), GENERATE.values(), ids=GENERATE)
def test_what_generate_refuses(small, change, words):
    model, variables = small
    right = {"model": model, "variables": variables, "prompt": TOKENS, "steps": 2}
    with pytest.raises(ValueError, match=words):
        generate(**(right | change))


def test_positions_may_be_one_row_for_all(small):
    model, variables = small
    row = jnp.array([4, 6, 7])
    want = model.apply(variables, TOKENS, positions=jnp.broadcast_to(row, (2, 3)))
    for positions in (row, row[None], np.asarray(row), [4, 6, 7]):
        np.testing.assert_array_equal(model.apply(variables, TOKENS, positions=positions), want)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5, "key": jax.random.key(1)}])
def test_logits_that_are_not_numbers_give_no_token(small, settings):
    model, variables = small
    # The token 3 stands in the second row only until it is generated.
    broken = jax.tree.map(lambda x: x, variables)
    embedding = broken["params"]["embedding"]
    embedding["embedding"] = embedding["embedding"].at[1].set(jnp.nan)
    prompt = jnp.array([[2, 2], [2, 1]])
    with pytest.raises(ValueError, match="logits are not numbers in row 1 at step 0"):
        generate(model, broken, prompt, 3, **settings)
    tokens = jax.jit(lambda v: generate(model, v, prompt, 3, **settings))(broken)
    assert tokens[1].tolist() == [-1, -1, -1]
    assert int(tokens[0, 0]) >= 0


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_sequences_and_no_tokens(small, shape):
    model, variables = small
    logits = model.apply(variables, jnp.zeros(shape, jnp.int32))
    assert logits.shape == (*shape, 7)
