"""The transformer computes the same however it is compiled, cached, packed or split."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import create
from posjax.models import Transformer, TransformerConfig, generate, init_cache
from tests import tolerances

VOCABULARY = 11
SMALL = TransformerConfig(layers=2, heads=4, kv_heads=2, width=32)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, tokens, segment_ids=None):
    return model.apply(variables, tokens, segment_ids=segment_ids)


def build(encoding: str = "cope", length: int = 9, **settings):
    """A model, its variables and tokens."""
    model = Transformer(dataclasses.replace(SMALL, **settings), VOCABULARY, create(encoding))
    tokens = jax.random.randint(jax.random.key(1), (2, length), 0, VOCABULARY)
    return model, jax.jit(model.init)(jax.random.key(0), tokens), tokens


def close(a, b):
    chex.assert_trees_all_close(a, b, rtol=0, atol=tolerances.SAME_MODEL)


@pytest.mark.parametrize("encoding", ["nope", "abacus", "cope", "rope", "t5"])
def test_decoding_equals_the_full_forward_pass(encoding):
    """Prefill of 4 tokens, then a chunk of 2, then one at a time; with grouped heads."""
    model, variables, tokens = build(encoding)
    want = apply(model, variables, tokens)
    step = jax.jit(lambda part, cache: model.apply(variables, part, cache=cache))
    cache, logits = init_cache(model, variables, 2, 12), []
    for start, end in [(0, 4), (4, 6), (6, 7), (7, 8), (8, 9)]:
        part, cache = step(tokens[:, start:end], cache)
        logits.append(part)
    close(jnp.concatenate(logits, axis=1), want)
    assert int(cache.length) == 9


@pytest.mark.parametrize("encoding", ["cope", "rope", "learned"])
def test_packed_sequences_equal_separate_ones(encoding):
    model, variables, tokens = build(encoding, length=9)
    ids = jnp.array([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    packed = apply(model, variables, tokens[:1], segment_ids=ids)
    close(packed[:, :4], apply(model, variables, tokens[:1, :4]))
    close(packed[:, 4:], apply(model, variables, tokens[:1, 4:]))


def stacked(params: dict) -> dict:
    """The parameters of a model with `scan_layers` from those of one without."""
    layers = [params[name] for name in sorted(params) if name.startswith("layer_")]
    others = {name: value for name, value in params.items() if not name.startswith("layer_")}
    return others | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_equal_unrolled_ones(remat):
    model, variables, tokens = build()
    scanned = Transformer(
        dataclasses.replace(SMALL, scan_layers=True, remat=remat), VOCABULARY, create("cope")
    )
    params = {"params": stacked(variables["params"])}
    assert jax.tree.structure(params) == jax.tree.structure(scanned.init(jax.random.key(0), tokens))
    loss = lambda model: lambda v: jnp.mean(model.apply(v, tokens) ** 2)  # noqa: E731
    close(apply(scanned, params, tokens), apply(model, variables, tokens))
    want = stacked(jax.jit(jax.grad(loss(model)))(variables)["params"])
    got = jax.jit(jax.grad(loss(scanned)))(params)["params"]
    close(got, want)


def test_scanned_layers_decode():
    model, variables, tokens = build(scan_layers=True)
    cache = init_cache(model, variables, 2, 9)
    first, cache = model.apply(variables, tokens[:, :5], cache=cache)
    second, _ = model.apply(variables, tokens[:, 5:], cache=cache)
    close(jnp.concatenate([first, second], axis=1), apply(model, variables, tokens))


def test_every_layer_has_its_own_table():
    _, variables, _ = build()
    tables = [variables["params"][f"layer_{i}"]["encoding"]["table"] for i in range(2)]
    assert tables[0].shape == (64, 8)
    assert not jnp.array_equal(*tables)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_implementations_agree(implementation):
    model, variables, tokens = build()
    other = Transformer(
        dataclasses.replace(SMALL, implementation=implementation), VOCABULARY, create("cope")
    )
    close(apply(other, variables, tokens), apply(model, variables, tokens))


def test_causality_by_gradient():
    """The logits at one place depend on every earlier token and on no later one."""
    model, variables, _ = build(length=8)
    table = variables["params"]["embedding"]["embedding"]

    def one_place(table):
        changed = variables["params"] | {"embedding": {"embedding": table}}
        return jnp.sum(model.apply({"params": changed}, jnp.arange(8)[None])[0, 4] ** 2)

    grad = jax.grad(one_place)(table)
    assert jnp.all(grad[5:] == 0)
    assert jnp.all(jnp.any(grad[:5] != 0, axis=1))


FORMS = {
    "post-norm": {"norm": "post"},
    "rms, swiglu": {"norm_kind": "rms", "mlp": "swiglu"},
    "geglu, tied": {"mlp": "geglu", "tied_embeddings": True},
    "relu, window": {"mlp": "relu", "local_window": 3},
    "own head size": {"head_size": 16},
}


@pytest.mark.parametrize("form", FORMS)
def test_parameter_count_is_the_documented_one(form):
    model, variables, tokens = build("nope", **FORMS[form])
    c = model.config
    matrices = 3 if c.mlp in ("swiglu", "geglu") else 2
    width, hidden, scale = c.width, round(c.mlp_ratio * c.width), 1 if c.norm_kind == "rms" else 2
    block = 2 * width * c.size_of_head * (c.heads + c.key_heads)
    block += matrices * width * hidden + (matrices - 1) * hidden + width + 2 * scale * width
    want = c.layers * block + (2 - c.tied_embeddings) * VOCABULARY * width
    want += scale * width * (c.norm == "pre")
    assert sum(x.size for x in jax.tree.leaves(variables)) == want
    assert jnp.all(jnp.isfinite(apply(model, variables, tokens)))


@pytest.mark.standard_promotion
def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits():
    model, variables, tokens = build(dtype="bfloat16")
    want = apply(build()[0], variables, tokens)
    got, state = model.apply(variables, tokens, capture_intermediates=True)
    (block, _), _ = state["intermediates"]["layer_0"]["__call__"][0]
    assert block.dtype == jnp.bfloat16 and got.dtype == jnp.float32
    assert 1e-5 < float(jnp.max(jnp.abs(got - want))) < 0.1


def test_initial_loss_is_near_that_of_a_guess():
    model, variables, tokens = build(length=64)
    logits = apply(model, variables, tokens)
    loss = -jnp.mean(jnp.take_along_axis(nn.log_softmax(logits), tokens[..., None], axis=-1))
    assert abs(float(loss) - np.log(VOCABULARY)) < 1.0


def test_dropout_acts_in_training_only():
    model, variables, tokens = build(dropout=0.5)
    rngs = {"dropout": jax.random.key(2)}
    close(apply(model, variables, tokens), apply(model, variables, tokens))
    noisy = model.apply(variables, tokens, deterministic=False, rngs=rngs)
    assert not jnp.allclose(noisy, apply(model, variables, tokens), atol=1e-2)


@pytest.mark.parametrize("encoding", ["cope", "rope", "nope"])
def test_greedy_generation_equals_repeated_full_passes(encoding):
    model, variables, tokens = build(encoding, length=4)
    got = generate(model, variables, tokens, 3)
    text = tokens
    for _ in range(3):
        token = jnp.argmax(apply(model, variables, text)[:, -1], axis=-1).astype(jnp.int32)
        text = jnp.concatenate([text, token[:, None]], axis=1)
    assert got.tolist() == text[:, 4:].tolist()


def test_sampling_follows_the_temperature():
    model, variables, tokens = build("nope", length=2)
    many = jnp.repeat(tokens[:1], 400, axis=0)

    def sample(temperature):
        settings = {"temperature": temperature, "key": jax.random.key(3)}
        return generate(model, variables, many, 1, **settings)[:, 0]

    probabilities = nn.softmax(apply(model, variables, tokens[:1])[0, -1])
    frequencies = jnp.bincount(sample(1.0), length=VOCABULARY) / 400
    assert float(jnp.max(jnp.abs(frequencies - probabilities))) < 0.1
    assert len(set(sample(1e-4).tolist())) == 1


def test_a_cache_refuses_segments():
    model, variables, tokens = build("nope", length=2)
    cache = init_cache(model, variables, 2, 4)
    with pytest.raises(ValueError, match="segment_ids and cache"):
        model.apply(variables, tokens, cache=cache, segment_ids=tokens)
