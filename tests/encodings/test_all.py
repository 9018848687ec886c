"""Promises of every encoding. A new file in posjax/encodings joins by itself.

Each encoding is in a small transformer of two layers with grouped heads, so that all hooks are
called as users call them; attention runs in blocks smaller than the sequence.
"""

import dataclasses
import functools
import inspect
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import posjax.encodings
import posjax.kernels.blocks
from posjax import dot_product_attention
from posjax.encodings import registry
from posjax.encodings.base import PositionEncoding, Side
from posjax.encodings.distance import DistanceBias, TrainedBias
from posjax.encodings.rotary import Rotary
from posjax.encodings.stream import StreamEncoding, stream_of
from posjax.models import Transformer, TransformerConfig, init_cache
from posjax.positions import LengthError, segment_positions, sequence_positions
from tests.goldens import values as goldens

VARIANTS = [name for name in registry.names() if "." in name]
FILES = [name for name in registry.names() if name not in VARIANTS and name != "nope"]
FILES += registry.COMPOSITIONS
# All tests of a name run one after another, and share what they have compiled.
every = pytest.mark.parametrize("name", FILES + VARIANTS, indirect=True, scope="module")
# Variants differ in settings; what costs a long compilation runs once for each file.
each_file = pytest.mark.parametrize("name", FILES, indirect=True, scope="module")

TOKENS = jnp.array([list(b"12+34.580=x90-"), list(b"x7.a\n2509=b. 3")])  # numbers cross the middle
BATCH, LENGTH = TOKENS.shape
HALF = LENGTH // 2
SMALL = TransformerConfig(layers=2, heads=4, kv_heads=2, width=16, head_size=8, mlp_ratio=1.0)


@pytest.fixture(scope="module")
def name(request):
    """The name of an encoding; what was compiled for it is forgotten afterwards."""
    yield request.param
    run.clear_cache()
    whole.cache_clear()
    variables_of.cache_clear()
    gradients.cache_clear()
    gradient.clear_cache()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two blocks for LENGTH tokens, the last one padded."""
    sizes = posjax.kernels.blocks.Blocks(8, 8)
    monkeypatch.setattr(posjax.kernels.blocks, "blockwise_sizes", lambda queries, keys: sizes)


def model(name, **settings):
    """Dense, which compiles fast; "xla" where blocks matter."""
    encoding = registry.create(name)
    # A variant's settings show in one layer, unless something flows to the next one.
    flows = isinstance(encoding, StreamEncoding)
    same = encoding.layer(0, 2) == encoding.layer(1, 2) and not flows
    layers = 1 if name in VARIANTS and same else SMALL.layers
    settings = {"implementation": "reference", "layers": layers} | settings
    return Transformer(dataclasses.replace(SMALL, **settings), vocab_size=128, encoding=encoding)


@functools.partial(jax.jit, static_argnums=0, static_argnames="keep")
def run(model, variables, tokens, cache=None, *, positions=None, segment_ids=None, keep=False):
    return model.apply(
        variables, tokens, cache=cache, positions=positions, segment_ids=segment_ids, keep=keep
    )


@functools.cache
def whole(name):
    """The output for all tokens, and what is kept for decoding."""
    return run(model(name), variables_of(name), TOKENS, keep=True)


@functools.cache
def variables_of(name):
    """Random values, because tables that start at 0 or near it would hide mistakes."""
    random = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype)  # noqa: E731
    return jax.tree.map(draw, shapes(model(name)))


@functools.cache
def gradients(name, implementation):
    """Of all parameters, and the output."""
    return gradient(model(name, implementation=implementation), variables_of(name), TOKENS)


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, variables, tokens):
    def loss(variables):
        output = model.apply(variables, tokens)
        return jnp.sum(jnp.sin(output)), output

    return jax.grad(loss, has_aux=True)(variables)


def shapes(model):
    """The shapes of the model's parameters."""
    return jax.eval_shape(model.init, jax.random.key(0), TOKENS)


def of_encoding(tree):
    """The encoding's own parameters: name without the layer -> values."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = [part.key for part in path]
        if "encoding" in keys:
            inside = "/".join(keys[keys.index("encoding") :])
            found.setdefault(inside, []).append(leaf)
    return found


def assert_close(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance), a, b)


def assert_gradient(value, want):
    """Within 1e-5 of the largest entry: a gradient is a sum over all tokens."""
    atol = 1e-5 * max(1, np.abs(want).max())
    np.testing.assert_allclose(value, want, rtol=1e-4, atol=atol)


@every
def test_is_a_configuration(name):
    """Equal settings are equal and hash alike; without parts every field has a default."""
    a, b = registry.create(name), registry.create(name)
    assert isinstance(a, PositionEncoding)
    assert a == b
    assert hash(a) == hash(b)
    assert "." in name or "+" in name or registry.spec_of(a) == name
    own = [f for f in dataclasses.fields(a) if f.init and f.name not in ("parent", "name")]
    written = [word for word in inspect.get_annotations(type(a)) if word in {f.name for f in own}]
    assert [f.name for f in own] == written  # a family puts none before them
    assert "+" in name or all(f.default is not dataclasses.MISSING for f in own)


@every
def test_implementations_agree_in_values_and_gradients(name):
    dense, output = gradients(name, "reference")
    goldens.compare({"gradients": dense, "logits": output}, f"encoding {name}", "reference")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(dense))
    for inside, values in of_encoding(dense).items():
        assert any(np.any(x) for x in values), inside
    if name in VARIANTS and type(registry.create(name)).bias is PositionEncoding.bias:
        return  # its attention is that of the file's encoding
    blockwise, same = gradients(name, "xla")
    assert_close(output, same, 1e-5)
    jax.tree.map(assert_gradient, blockwise, dense)


@each_file
def test_vmap_is_a_batch(name):
    variables = variables_of(name)
    one = lambda tokens: model(name).apply(variables, tokens[None])[0]  # noqa: E731
    assert_close(jax.jit(jax.vmap(one))(TOKENS), whole(name)[0])


@pytest.mark.standard_promotion  # Flax's LayerNorm mixes dtypes
@each_file
def test_bfloat16_is_near(name):
    exact, _ = whole(name)
    narrow = model(name, dtype="bfloat16")
    output, cache = run(narrow, variables_of(name), TOKENS, keep=True)
    kept = cache.layers[0].attention
    assert kept.key.dtype == kept.value.dtype == jnp.bfloat16
    np.testing.assert_allclose(output, exact, atol=0.03 * np.abs(exact).max())


@every
def test_packed_and_padded_sequences_are_as_if_alone(name):
    """Positions are given; they start again in each segment, also behind padding."""
    index = jnp.broadcast_to(jnp.arange(LENGTH), TOKENS.shape)
    two = index // HALF
    padded = jnp.pad(TOKENS[:, :HALF], ((0, 0), (3, LENGTH - HALF - 3)))
    behind = (index >= 3).astype(jnp.int32) + (index >= 3 + HALF).astype(jnp.int32)
    outputs = [
        run(
            model(name),
            variables_of(name),
            tokens,
            positions=segment_positions(segments),
            segment_ids=segments,
        )
        for tokens, segments in ((TOKENS, two), (padded, behind))
    ]
    first, second = (
        run(model(name), variables_of(name), TOKENS[:, part])
        for part in (slice(0, HALF), slice(HALF, None))
    )
    assert_close(outputs[0], jnp.concatenate((first, second), axis=1))
    assert_close(outputs[1][:, 3 : 3 + HALF], first)


@every
def test_prompt_and_steps_are_one_call(name):
    decoder, variables = model(name, implementation="xla"), variables_of(name)
    empty = init_cache(decoder, variables, BATCH, LENGTH)
    if not decoder.encoding.decodes:
        with pytest.raises(NotImplementedError):
            run(decoder, variables, TOKENS[:, :HALF], empty)
        return
    output, cache = run(decoder, variables, TOKENS[:, :HALF], empty)
    outputs = [output]
    for index in range(HALF, LENGTH):
        output, cache = run(decoder, variables, TOKENS[:, index : index + 1], cache)
        outputs.append(output)
    output, state = whole(name)
    assert_close(jnp.concatenate(outputs, axis=1), output)
    assert_close(cache, state)


@each_file
def test_sharded_over_heads_and_data_is_unsharded(name):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads = {"query": P(None, "tensor"), "key": P(None, "tensor"), "value": P(None, "tensor")}

    def place(path, x):
        keys = [part.key for part in path]
        spec = heads.get(keys[-2], P()) if "attention" in keys and keys[-1] == "kernel" else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    want_grads, want = gradients(name, "xla")
    with jax.set_mesh(mesh):
        variables = jax.tree_util.tree_map_with_path(place, variables_of(name))
        tokens = jax.device_put(TOKENS, NamedSharding(mesh, P("data")))
        grads, output = gradient(model(name, implementation="xla"), variables, tokens)
    kernel = grads["params"]["layer_0"]["attention"]["query"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[1] == SMALL.heads // 2
    assert_close(jax.device_get(output), want)
    jax.tree.map(assert_gradient, jax.device_get(grads), jax.device_get(want_grads))


@every
def test_training_has_its_random_stream(name):
    streams = {"encoding": jax.random.key(0)}
    train = functools.partial(model(name).apply, deterministic=False, rngs=streams)
    assert jax.eval_shape(train, variables_of(name), TOKENS).shape == (*TOKENS.shape, 128)


class Scores(nn.Module):
    """One attention call with an encoding, causal or not."""

    encoding: PositionEncoding

    @nn.compact
    def __call__(self, x, tokens, is_causal):
        encoding, sizes, length = self.encoding, SMALL.sizes, tokens.shape[1]
        indices, _ = encoding.positions(tokens, sequence_positions(BATCH, length))
        x = encoding.embed(x, indices)
        stream = stream_of(encoding)
        x = stream.update_stream(x, stream.stream_inputs(x), indices, jnp.arange(length))
        memory = encoding.cache(x, sizes, stream.init_state(indices, sizes))
        query = nn.DenseGeneral((sizes.heads, sizes.head_size))(x)
        key, value = (nn.DenseGeneral((sizes.kv_heads, sizes.head_size))(x) for _ in range(2))
        query, key = Side(query, indices, memory), Side(key, indices, memory, value)
        turned = encoding.rotate(query, key)
        query, key = query._replace(x=turned[0]), key._replace(x=turned[1])
        bias = encoding.bias(query, key, encoding.shared(sizes))
        return dot_product_attention(*turned, value, bias, is_causal=is_causal)


@every
def test_both_directions_work_or_are_refused(name):
    encoding = registry.create(name).layer(0, 2)
    call = functools.partial(
        Scores(encoding).init, jax.random.key(0), jnp.ones((BATCH, LENGTH, 16))
    )
    jax.eval_shape(lambda: call(TOKENS, True))
    if encoding.is_causal_only:
        with pytest.raises(ValueError, match="causal"):
            jax.eval_shape(lambda: call(TOKENS, False))
    else:
        jax.eval_shape(lambda: call(TOKENS, False))


@every
def test_a_bias_of_the_distance_only_is_one(name, monkeypatch):
    """Moving all positions changes nothing, as the kernels for distances take for granted."""
    seen = []
    monkeypatch.setitem(globals(), "dot_product_attention", lambda *x, **_: seen.append(x) or x[0])
    module = Scores(registry.create(name).layer(0, 2))
    x = jnp.ones((BATCH, LENGTH, 16))
    jax.eval_shape(lambda: module.init(jax.random.key(0), x, TOKENS, True))
    bias = seen[0][3]
    for part in getattr(bias, "parts", [bias]):
        if getattr(part, "distance_only", False):
            random = functools.partial(jax.random.normal, jax.random.key(1))
            params = jax.tree.map(lambda x: random(jnp.shape(x)), part.params)  # noqa: B023
            i, j = jnp.array([[7, 2, 5]]), jnp.array([[0, 3, 5, 9]])
            want = part.function(params, i, j)
            np.testing.assert_array_equal(part.function(params, i + 100, j + 100), want)


@every
def test_far_positions_do_what_the_encoding_says(name):
    """The second half of the tokens moves far away, twice."""
    far = [
        sequence_positions(BATCH, LENGTH) + jnp.where(jnp.arange(LENGTH) < HALF, 0, gap)[None]
        for gap in (5_000, 9_000)
    ]
    # One segment: the program is that of packed sequences.
    one = jnp.zeros_like(TOKENS)
    try:
        near, farther = (
            run(model(name), variables_of(name), TOKENS, positions=p, segment_ids=one)[:, HALF:]
            for p in far
        )
    except LengthError:
        near = farther = jnp.full((1,), jnp.nan)
    beyond = registry.create(name).beyond
    if beyond == "clips":
        assert_close(near, farther)
    # Digit runs, which only Abacus counts, stay where they are.
    assert np.isnan(near).any() == (beyond == "raises" and not name.startswith("abacus"))


@every
def test_each_layer_makes_its_own_parameters(name):
    params = shapes(model(name, layers=2))["params"]
    alike = registry.create(name).layer(0, 2) == registry.create(name).layer(1, 2)
    assert not alike or params["layer_0"] == params["layer_1"]


@each_file
def test_scanned_layers_are_the_layers(name):
    encoding = registry.create(name)
    scanned = model(name, scan_layers=True)
    if encoding.layer(0, 2) != encoding.layer(1, 2):
        with pytest.raises(ValueError, match="scan_layers"):
            shapes(scanned)
        return
    params = dict(variables_of(name)["params"])
    layers = [params.pop(f"layer_{index}") for index in range(2)]
    params["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    output = run(scanned, {"params": params}, TOKENS)
    assert_close(output, whole(name)[0])


@pytest.mark.slow
@each_file
def test_long_sequences_need_no_square_array(name, monkeypatch):
    """Forward and backward at 16,384 tokens, compiled: fewer bytes than pairs of tokens."""
    monkeypatch.undo()
    length = 16_384
    config = {"heads": 2, "kv_heads": 1, "implementation": "xla"}
    large = model(name, **config)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    try:
        variables = jax.eval_shape(large.init, jax.random.key(0), tokens)
    except LengthError:
        assert large.encoding.beyond == "raises"
        return
    loss = lambda variables, tokens: jnp.sum(large.apply(variables, tokens))  # noqa: E731
    compiled = jax.jit(jax.grad(loss)).lower(variables, tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length**2


def test_works_in_nnx():
    linen = model("rope+cope+learned+t5")
    made = nnx.bridge.lazy_init(nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)), TOKENS)
    output = nnx.jit(lambda made: made(TOKENS))(made)
    variables = {"params": nnx.to_pure_dict(nnx.state(made, nnx.Param))}
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes(linen))
    assert_close(output, run(linen, variables, TOKENS), 1e-6)


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


def test_every_encoding_is_exported():
    classes = registry.classes().values()
    lines = [f"from {c.__module__} import {c.__name__} as {c.__name__}" for c in classes]
    text = Path(posjax.encodings.__file__).read_text()
    missing = "\n".join(line for line in lines if line not in text)
    assert not missing, f"posjax/encodings/__init__.py needs\n{missing}"


@pytest.mark.parametrize("module", [posjax, posjax.encodings])
@pytest.mark.parametrize(
    ("old", "name"),
    [
        ("CMHA", "complexformer"),
        ("LearnableFourier", "fourier"),
        ("LearnedAbsolute", "learned"),
        ("T5Bias", "t5"),
    ],
)
def test_old_names_warn(module, old, name):
    with pytest.warns(DeprecationWarning, match=f"{old} is now called"):
        assert getattr(module, old) is type(registry.create(name))


def test_classes_are_named_after_their_files():
    for name in registry.names():
        if "." not in name and name != "nope":
            assert type(registry.create(name)).__name__.lower() == name.replace("_", "")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rop", 'did you mean "rope"'),
        ("RoPE", 'did you mean "rope"'),
        ("alibbi", 'did you mean "alibi"'),
        ("cope.papr", 'did you mean "cope.paper"'),
        ("abacus+ropee", 'did you mean "rope"'),
        ("qqq", '"qqq"; known are abacus, '),
        ("", '""; known are'),
    ],
)
def test_an_unknown_name_says_the_nearest(name, words):
    with pytest.raises(ValueError, match=words):
        registry.create(name)


@pytest.mark.parametrize("cls", registry.classes().values())
def test_has_the_arguments_of_the_base_class(cls):
    for base in (PositionEncoding, StreamEncoding, Rotary, TrainedBias, DistanceBias):
        for hook, value in vars(base).items():
            # `positions` may pass keywords on as they are.
            is_hook = inspect.isfunction(value) and hook != "positions" and hook[0] != "_"
            if is_hook and issubclass(cls, base):
                wanted = list(inspect.signature(value).parameters)
                assert list(inspect.signature(getattr(cls, hook)).parameters) == wanted, hook
