"""What every encoding promises. A new file in posjax/encodings joins by itself."""

import dataclasses
import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posjax import dot_product_attention
from posjax.encodings import registry
from posjax.encodings.base import PositionEncoding
from posjax.positions import segment_positions, sequence_positions

HEADS, SIZE, WIDTH = 4, 8, 16
SINGLE = [name for name in registry.names() if name != "nope"]
COMBINED = ["abacus+rope", "rope+cope+learned+t5"]
every = pytest.mark.parametrize("name", SINGLE + COMBINED)
# Variants differ in settings only; what costs a compilation runs once for each file.
each_file = pytest.mark.parametrize("name", [n for n in SINGLE if "." not in n] + COMBINED)

TOKENS = jnp.array([list(b"12+34580"), list(b"907-2509")])  # a number crosses the middle
BATCH, LENGTH = TOKENS.shape
HALF = LENGTH // 2
PLACES = sequence_positions(BATCH, LENGTH)


class Layer(nn.Module):
    """Embeddings and one attention layer, which call the four places in the order of base.py."""

    encoding: PositionEncoding
    implementation: str = "reference"
    dtype: str = "float32"
    is_causal: bool = True

    @nn.compact
    def __call__(self, tokens, places, segment_ids=None, past=None, deterministic=True):
        encoding, kv_heads = self.encoding, HEADS // 2
        old, carry = (None, None) if past is None else past
        indices, carry = encoding.positions(
            tokens, places, carry, segment_ids=segment_ids, deterministic=deterministic
        )
        x = encoding.embed(nn.Embed(64, WIDTH, dtype=self.dtype)(tokens), indices)
        shared = encoding.shared(HEADS)
        project = lambda heads: nn.DenseGeneral((heads, SIZE), dtype=self.dtype)(x)  # noqa: E731
        query, key, value = project(HEADS), project(kv_heads), project(kv_heads)
        kept = indices, key, value, encoding.remember(x, kv_heads, SIZE)
        if past is not None:
            kept = jax.tree.map(lambda a, b: jnp.concatenate((a, b), axis=1), old, kept)
        keys, key, value, memory = kept
        query, turned = encoding.rotate(query, key, indices, keys)
        bias = encoding.bias(query, turned, value, indices, keys, memory, shared)
        output = dot_product_attention(
            query,
            turned,
            value,
            bias,
            is_causal=self.is_causal,
            query_positions=None if past is None else places,
            query_segment_ids=segment_ids,
            implementation=self.implementation,
        )
        return output, (kept, carry)


@functools.partial(jax.jit, static_argnums=0)
def run(layer, variables, tokens, places, segment_ids=None, past=None):
    return layer.apply(variables, tokens, places, segment_ids, past)


def shapes(layer):
    """The shapes of the layer's parameters."""
    return jax.eval_shape(layer.init, jax.random.key(0), TOKENS, PLACES)


@functools.cache
def variables_of(name):
    """Random values, because tables that start at 0 or near it would hide mistakes."""
    random = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(0.5 * random.normal(size=x.shape), x.dtype)  # noqa: E731
    return jax.tree.map(draw, shapes(Layer(registry.create(name))))


def of_encoding(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [leaf for path, leaf in leaves if "encoding" in jax.tree_util.keystr(path)]


def assert_close(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance), a, b)


@every
def test_is_a_configuration(name):
    """Equal settings are equal and hash alike; without parts every field has a default."""
    a, b = registry.create(name), registry.create(name)
    assert isinstance(a, PositionEncoding)
    assert a == b
    assert hash(a) == hash(b)
    assert "." in name or "+" in name or registry.spec_of(a) == name
    own = [f for f in dataclasses.fields(a) if f.init and f.name not in ("parent", "name")]
    assert name in COMBINED or all(f.default is not dataclasses.MISSING for f in own)


@each_file
def test_implementations_agree_in_values_and_gradients(name):
    @functools.partial(jax.jit, static_argnums=0)
    def grad(implementation, variables):
        def loss(variables):
            layer = Layer(registry.create(name), implementation)
            output, _ = layer.apply(variables, TOKENS, PLACES)
            return jnp.sum(output**2), output

        return jax.grad(loss, has_aux=True)(variables)

    dense, output = grad("reference", variables_of(name))
    blockwise, same = grad("xla", variables_of(name))
    assert_close(output, same, 1e-5)
    assert_close(dense, blockwise, 1e-4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(dense))
    assert all(np.any(x) for x in of_encoding(dense))


@each_file
def test_vmap_is_a_batch(name):
    layer = Layer(registry.create(name))

    def one(tokens, places):
        return run(layer, variables_of(name), tokens[None], places[None])[0][0]

    mapped = jax.jit(jax.vmap(one))(TOKENS, PLACES)
    assert_close(mapped, run(layer, variables_of(name), TOKENS, PLACES)[0])


@each_file
def test_bfloat16_stays_and_is_near(name):
    layer = Layer(registry.create(name))
    exact, _ = run(layer, variables_of(name), TOKENS, PLACES)
    output, (kept, _) = run(layer.clone(dtype="bfloat16"), variables_of(name), TOKENS, PLACES)
    assert output.dtype == jnp.bfloat16
    floats = [x for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(output.astype(jnp.float32), exact, atol=0.03 * np.abs(exact).max())


@each_file
def test_packed_sequences_are_as_if_alone(name):
    layer = Layer(registry.create(name))
    segments = jnp.broadcast_to(jnp.arange(LENGTH) // HALF, TOKENS.shape)
    packed, _ = run(layer, variables_of(name), TOKENS, segment_positions(segments), segments)
    for part in (slice(0, HALF), slice(HALF, None)):
        alone, _ = run(layer, variables_of(name), TOKENS[:, part], PLACES[:, :HALF])
        assert_close(packed[:, part], alone)


@each_file
def test_decoding_in_two_calls_is_one_call(name):
    layer, variables = Layer(registry.create(name)), variables_of(name)
    whole, (kept, carry) = run(layer, variables, TOKENS, PLACES)
    first, past = run(layer, variables, TOKENS[:, :HALF], PLACES[:, :HALF])
    second, state = run(layer, variables, TOKENS[:, HALF:], PLACES[:, HALF:], None, past)
    assert_close(jnp.concatenate((first, second), axis=1), whole)
    assert_close(state, (kept, carry))


@every
def test_training_has_its_random_stream(name):
    layer = Layer(registry.create(name))
    train = functools.partial(
        layer.apply, deterministic=False, rngs={"encoding": jax.random.key(0)}
    )
    output, _ = jax.eval_shape(train, variables_of(name), TOKENS, PLACES)
    assert output.shape == (BATCH, LENGTH, HEADS, SIZE)


@every
def test_both_directions_work_or_are_refused(name):
    layer = Layer(registry.create(name), is_causal=False)
    if layer.encoding.is_causal_only:
        with pytest.raises(ValueError, match="causal"):
            jax.eval_shape(layer.apply, variables_of(name), TOKENS, PLACES)
    else:
        jax.eval_shape(layer.apply, variables_of(name), TOKENS, PLACES)


class TwoLayers(nn.Module):
    """A model that gives each layer an unbound copy of its encoding."""

    encoding: PositionEncoding

    @nn.compact
    def __call__(self, tokens, places):
        indices, _ = self.encoding.positions(tokens, places)
        self.encoding.embed(jnp.zeros((*tokens.shape, WIDTH)), indices)
        for index in range(2):
            fresh = self.encoding.clone(parent=None, name=None)
            Layer(fresh, name=f"layer_{index}")(tokens, places)


@every
def test_each_layer_makes_its_own_parameters(name):
    model = shapes(TwoLayers(registry.create(name)))["params"]
    alone = shapes(Layer(registry.create(name)))["params"]
    assert model["layer_0"] == alone
    assert model["layer_1"] == alone


def test_works_in_nnx():
    layer = Layer(registry.create("rope+cope+learned+t5"))
    model = nnx.bridge.lazy_init(nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(0)), TOKENS, PLACES)
    output, _ = nnx.jit(lambda model: model(TOKENS, PLACES))(model)
    variables = {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))}
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes(layer))
    assert_close(output, run(layer, variables, TOKENS, PLACES)[0], 1e-6)


def test_registry_names_files_and_their_variants():
    wanted = {"abacus", "alibi", "cope", "cope.paper", "learned", "nope", "rope", "sinusoidal"}
    assert wanted | {"t5"} <= set(registry.names())
    assert "combine" not in registry.names()  # it needs parts
    assert registry.names() == sorted(registry.names())
    assert registry.create("nope") is None
    assert registry.spec_of(None) == "nope"
    assert [type(p).__name__ for p in registry.create("abacus+rope").encodings] == [
        "Abacus",
        "RoPE",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rop", 'did you mean "rope"'),
        ("RoPE", 'did you mean "rope"'),
        ("alibbi", 'did you mean "alibi"'),
        ("cope.papr", 'did you mean "cope.paper"'),
        ("abacus+ropee", 'did you mean "rope"'),
        ("qqq", '"qqq"; known are abacus, alibi'),
        ("", '""; known are'),
    ],
)
def test_an_unknown_name_says_the_nearest(name, words):
    with pytest.raises(ValueError, match=words):
        registry.create(name)


@pytest.mark.parametrize("cls", registry.classes().values())
@pytest.mark.parametrize("place", ["embed", "shared", "remember", "rotate", "bias"])
def test_has_the_arguments_of_the_base_class(cls, place):
    wanted = inspect.signature(getattr(PositionEncoding, place)).parameters
    assert list(inspect.signature(getattr(cls, place)).parameters) == list(wanted)
