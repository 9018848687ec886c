"""The hooks of every encoding, with right and with wrong arguments."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import RoPE, registry
from posjax.encodings.base import PositionEncoding, Side, Sizes
from posjax.encodings.stream import StreamEncoding, stream_of

B, T, N, K, H, D = 2, 6, 4, 2, 8, 16
SIZES = Sizes(N, K, H)
TOKENS = np.arange(B * T, dtype=np.int32).reshape(B, T)
PLACES = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
X = np.ones((B, T, D), np.float32)
NAMES = [name for name in registry.all_names() if name != "nope"]


class Calls(nn.Module):
    """All hooks in the order in which a model calls them, each with its arguments."""

    encoding: PositionEncoding

    @nn.compact
    def __call__(self, seen):
        encoding, stream = self.encoding, stream_of(self.encoding)

        def call(name, *arguments, **settings):
            seen[name] = arguments, settings
            owner = encoding if hasattr(encoding, name) else stream
            return getattr(owner, name)(*arguments, **settings)

        positions = functools.partial(call, "positions", TOKENS, PLACES)
        indices, carry = positions(None, segment_ids=None, deterministic=True)
        if encoding.decodes and carry is not None:
            seen["carry"] = carry
        x = call("embed", X, indices)
        shared = call("shared", SIZES)
        state = call("init_state", indices, SIZES)
        inputs = call("stream_inputs", x)
        x = call("update_stream", x, inputs, indices, np.arange(T, dtype=np.int32))
        memory = call("cache", x, SIZES, state)
        query, key, value = (jnp.ones((B, T, heads, H)) for heads in (N, K, K))
        query, key = Side(query, indices, memory), Side(key, indices, memory, value)
        turned = call("rotate", query, key)
        assert [x.shape for x in turned] == [query.x.shape, key.x.shape]
        call("bias", query._replace(x=turned[0]), key._replace(x=turned[1]), shared)
        extra = call("extra_values", memory)
        mixed = None if extra is None else jnp.ones((B, T, N, extra.shape[-1]))
        call("update_state", state, x, mixed)


@functools.cache
def encoding_of(name):
    return registry.create(name).layer(0, 2)


@functools.cache
def arguments_of(name) -> dict[str, tuple]:
    """Right arguments of each hook, as arrays of NumPy."""
    seen, shapes = {}, {}

    def run():
        Calls(encoding_of(name)).init(jax.random.key(0), seen)
        shapes.update(seen)
        leaves, shapes["tree"] = jax.tree.flatten({key: seen[key] for key in seen})
        shapes["others"] = [x if not hasattr(x, "shape") else None for x in leaves]
        return [x for x in leaves if hasattr(x, "shape")]

    arrays = iter(jax.eval_shape(run))
    ones = [np.ones(x.shape, x.dtype) for x in arrays]
    fill = iter(ones)
    leaves = [next(fill) if x is None else x for x in shapes["others"]]
    return jax.tree.unflatten(shapes["tree"], leaves)


def owner_of(name, hook):
    """The encoding, or one with neutral hooks of the stream."""
    encoding = encoding_of(name)
    return encoding if hasattr(encoding, hook) else StreamEncoding(parent=None)


def refuse(name, hook, arguments, settings):
    owner_of(name, hook).apply({}, *arguments, **settings, method=hook)


def run(name, hook, *arguments):
    """The result of a hook."""
    owner = owner_of(name, hook)
    return owner.init_with_output(jax.random.key(0), *arguments, method=hook)[0]


def other(index, value):
    """A change of one positional argument."""
    return lambda arguments: (*arguments[:index], value, *arguments[index + 1 :])


def of_side(index, **fields):
    """A change of the query (0) or the key (1); functions are called with the array."""

    def change(arguments):
        side = arguments[index]
        new = {name: x(getattr(side, name)) if callable(x) else x for name, x in fields.items()}
        return (*arguments[:index], side._replace(**new), *arguments[index + 1 :])

    return change


SIDES = {
    "a number as query": (other(0, 3), "query is 3; it must be an instance of Side"),
    "nothing as key": (other(1, None), "key is None; it must be an instance of Side"),
    "x of three axes": (of_side(0, x=X), r"query.x has shape \(2, 6, 16\); it must be \[B, T, N"),
    "x that is a word": (of_side(1, x="x"), "key.x is 'x'; it must be an array"),
    "flags as x": (of_side(0, x=lambda x: x > 0), "query.x has dtype bool"),
    "another batch": (of_side(1, x=lambda x: x[:1], value=None), r"key.x has shape \(1, 6, 2, 8\)"),
    "other channels": (of_side(1, x=lambda x: x[..., :4]), r"key.x has shape \(2, 6, 2, 4\)"),
    "heads that do not divide": (
        of_side(1, x=np.ones((B, T, 3, H), np.float32), value=None),
        "key.x has 3 heads; it must have a divisor of query.x's 4",
    ),
    "values of other tokens": (
        of_side(1, value=lambda x: x[:, :4]),
        r"key.value has shape \(2, 4, 2, 8\); it must be \[2, 6, 2, E\]",
    ),
    "a word as indices": (of_side(0, indices="a"), "query.indices is 'a'; it must be an array"),
    "flags as indices": (of_side(0, indices=PLACES > 0), "query.indices has dtype bool"),
    "indices of fewer tokens": (
        of_side(0, indices=PLACES[:, :4]),
        r"query.indices has shape \(2, 4\); it must begin with \[1 or 2, 6\]",
    ),
    "indices of more rows": (
        of_side(1, indices=np.ones((3, T), np.int32)),
        r"key.indices has shape \(3, 6\); it must begin with \[1 or 2, 6\]",
    ),
    "memory of fewer tokens": (of_side(1, memory=X[:, :4]), r"key.memory has shape \(2, 4, 16\)"),
}
SIZES_AND_OTHERS = {
    "a tuple as sizes": ((N, K, H), r"sizes is \(4, 2, 8\); it must be an instance of Sizes"),
    "no heads": (Sizes(0, K, H), "sizes.heads is 0; it must be at least 1"),
    "a fraction of channels": (Sizes(N, K, 8.0), "sizes.head_size is 8.0; it must be an integer"),
    "heads that do not divide": (Sizes(N, 3, H), "sizes.kv_heads is 3; it must be a divisor of s"),
}
WRONG = {
    "positions": {
        "fractions as tokens": (other(0, TOKENS * 0.5), "tokens has dtype float"),
        "a row of tokens": (other(0, TOKENS[0]), r"tokens has shape \(6,\); it must be \[B, T\]"),
        "fewer positions": (
            other(1, PLACES[:, :4]),
            r"positions has shape \(2, 4\); it must be \[1 or 2, 6\]",
        ),
        "more rows": (other(1, np.ones((3, T), np.int32)), r"positions has shape \(3, 6\)"),
        "flags as positions": (other(1, PLACES > 0), "positions has dtype bool"),
        "no positions": (other(1, None), "positions is None; it must be an array"),
        "carry of more rows": (other(2, np.ones(3)), r"carry has shape \(3,\); it must begin with"),
    },
    "embed": {
        "integers": (other(0, X.astype(np.int32)), "embeddings has dtype int32"),
        "two axes": (other(0, X[0]), r"embeddings has shape \(6, 16\); it must be \[B, T, D\]"),
        "indices of fewer tokens": (
            other(1, PLACES[:, :4]),
            r"indices has shape \(2, 4\); it must begin with \[1 or 2, 6\]",
        ),
        "indices of more rows": (other(1, np.ones((3, T), np.int32)), r"indices has shape \(3, 6"),
        "flags as indices": (other(1, PLACES > 0), "indices has dtype bool"),
    },
    "shared": {case: (other(0, sizes), words) for case, (sizes, words) in SIZES_AND_OTHERS.items()},
    "cache": {case: (other(1, sizes), words) for case, (sizes, words) in SIZES_AND_OTHERS.items()}
    | {
        "two axes": (other(0, X[0]), r"inputs has shape \(6, 16\); it must be \[B, T, D\]"),
        "a state of fewer tokens": (other(2, X[:, :4]), r"state has shape \(2, 4, 16\)"),
    },
    "rotate": SIDES,
    "bias": SIDES,
    "init_state": {"a tuple as sizes": (other(1, (N, K, H)), "sizes is")},
    "stream_inputs": {"two axes": (other(0, X[0]), "stream has shape")},
    "update_stream": {
        "fewer rows": (other(3, np.arange(4)), r"rows has shape \(4,\); it must be \[6\]"),
        "fractions as rows": (other(3, np.arange(6.0)), "rows has dtype float64"),
        "inputs of more rows": (other(1, np.ones((3, T, D))), r"inputs has shape \(3, 6, 16\)"),
    },
    "extra_values": {"a row": (other(0, np.ones(3)), r"memory has shape \(3,\); it must begin")},
    "update_state": {
        "a change of two axes": (other(1, X[0]), r"change has shape \(6, 16\)"),
        "averages of other rows": (other(2, np.ones((3, T, N, 2), np.float32)), "mixed has shape"),
    },
}
NAMED = {
    "a word": ({"deterministic": "False"}, "deterministic is 'False'; it must be True or False"),
    "a number": ({"deterministic": 0}, "deterministic is 0; it must be True or False"),
    "flags": ({"segment_ids": PLACES > 0}, "segment_ids has dtype bool"),
    "fewer segments": ({"segment_ids": PLACES[:, :4]}, r"segment_ids has shape \(2, 4\)"),
}


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_are_refused_and_right_ones_are_not(name):
    right = arguments_of(name)  # calls every hook
    for hook, cases in WRONG.items():
        arguments, settings = right[hook]
        # Variants have the hooks of their file: one case of each shows that.
        for change, words in list(cases.values())[: 1 if "." in name else None]:
            with pytest.raises(ValueError, match=words):
                refuse(name, hook, change(arguments), settings)
    arguments, settings = right["positions"]
    for change, words in NAMED.values():
        with pytest.raises(ValueError, match=words):
            refuse(name, "positions", arguments, settings | change)


@pytest.mark.parametrize("name", [name for name in NAMES if "." not in name])
def test_one_row_of_indices_and_other_numbers_of_keys(name):
    """As when decoding: one query, and the same positions in every row."""
    encoding = encoding_of(name)
    right = arguments_of(name)
    first = functools.partial(jax.tree.map, lambda x: x[:, :1])

    def calls():
        found = {}
        for hook in ("rotate", "bias"):
            query, key, *rest = right[hook][0]
            query = Side(query.x[:, :1], first(query.indices), first(query.memory))
            found[hook] = run(name, hook, query, key, *rest)
        plain = isinstance(right["embed"][0][1], np.ndarray)
        if plain and encoding.decodes:
            query, key, *rest = right["rotate"][0]
            sides = (side._replace(indices=side.indices[:1]) for side in (query, key))
            found["one row"] = run(name, "rotate", *sides, *rest)
            found["embed"] = run(name, "embed", X, right["embed"][0][1][:1])
        return found

    found = jax.eval_shape(calls)
    assert [x.shape for x in found["rotate"]] == [(B, 1, N, H), (B, T, K, H)]
    if "embed" in found:
        assert [x.shape for x in found["one row"]] == [(B, T, N, H), (B, T, K, H)]
        assert found["embed"].shape == X.shape


def test_hooks_of_a_subclass_are_checked_and_stay_compact():
    class Scaled(RoPE):
        @nn.compact
        def rotate(self, query, key, power=1):
            """Takes one more argument than its base."""
            scale = self.param("scale", nn.initializers.ones, ())
            query, key = super().rotate(query, key)
            return query * scale**power, key

    side = Side(jnp.ones((1, 2, 1, 4)), jnp.arange(2)[None])
    variables = Scaled().init(jax.random.key(0), side, side, method="rotate")
    assert list(variables["params"]) == ["scale"]
    Scaled().apply(variables, side, side, power=2, method="rotate")
    with pytest.raises(ValueError, match="key is None; it must be an instance of Side"):
        Scaled().apply(variables, side, None, power=2, method="rotate")
    with pytest.raises(TypeError):
        Scaled().apply(variables, side, other=2, method="rotate")


def test_sizes_may_be_symbols():
    batch, length = jax.export.symbolic_shape("batch, length")
    x = jax.ShapeDtypeStruct((batch, length, 2, 4), jnp.float32)
    places = jax.ShapeDtypeStruct((1, length), jnp.int32)
    turn = lambda x, p: RoPE().apply({}, Side(x, p), Side(x, p), method="rotate")  # noqa: E731
    exported = jax.export.export(jax.jit(turn))(x, places)
    assert exported.call(jnp.ones((2, 3, 2, 4)), jnp.arange(3)[None])[0].shape == (2, 3, 2, 4)
    wrong = jax.ShapeDtypeStruct((1, batch), jnp.int32)
    with pytest.raises(ValueError, match=r"query\.indices has shape"):
        jax.export.export(jax.jit(turn))(x, wrong)
