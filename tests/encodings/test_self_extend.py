import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import posjax.kernels.blocks
from posjax import dot_product_attention
from posjax.biases.grouped import GroupedBias
from posjax.encodings import Combine, LogLength, RoPE, SelfExtend
from posjax.encodings.base import Side
from posjax.encodings.self_extend import group_shifts

DATA = np.load(pathlib.Path(__file__).parent.parent / "data" / "self_extend.npz")
ENCODING = SelfExtend(group=4, window=8)
LENGTH = DATA["query"].shape[1]
PLACES = jnp.arange(LENGTH)[None]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    sizes = posjax.kernels.blocks.Blocks(8, 8)
    monkeypatch.setattr(posjax.kernels.blocks, "blockwise_sizes", lambda queries, keys: sizes)


def attend(encoding, query, key, value, indices=PLACES, implementation="xla", rows=slice(None)):
    """Attention of some rows of the query to all keys."""
    own = jax.tree.map(lambda x: x[:, rows], indices)
    query, key = encoding.apply({}, Side(query[:, rows], own), Side(key, indices), method="rotate")
    bias = encoding.apply({}, Side(query, own), Side(key, indices), method="bias")
    settings = {"query_positions": PLACES[:, rows], "implementation": implementation}
    return dot_product_attention(query, key, value, bias, is_causal=True, **settings)


def literal(query, key, value, group, window, places):
    """The formula, pair by pair, in float64; grouped heads."""

    def turned(x, position):
        half = len(x) // 2
        turn = (x[:half] + 1j * x[half:]) * np.exp(
            1j * position * 10_000.0 ** (-np.arange(half) / half)
        )
        return np.concatenate((turn.real, turn.imag))

    query, key, value = (np.asarray(x, np.float64)[0] for x in (query, key, value))
    output = np.zeros_like(query)
    for i, n in np.ndindex(query.shape[:2]):
        k = n * key.shape[1] // query.shape[1]
        logits = np.full(len(key), -np.inf)
        for j in range(i + 1):
            of_query, of_key = places[i], places[j]
            if of_query - of_key >= window:
                of_query, of_key = of_query // group + window - window / group, of_key // group
            logits[j] = turned(query[i, n], of_query) @ turned(key[j, k], of_key)
        weights = np.exp((logits - logits.max()) / np.sqrt(query.shape[-1]))
        output[i, n] = weights / weights.sum() @ value[:, k]
    return output[None]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_equals_the_official_code(implementation):
    inputs = DATA["query"], DATA["key"], DATA["value"]
    got = attend(ENCODING, *map(jnp.asarray, inputs), implementation=implementation)
    np.testing.assert_allclose(got, DATA["output"], atol=2e-5)
    plain = attend(ENCODING.clone(window=32), *map(jnp.asarray, inputs))
    assert np.abs(plain - DATA["output"]).max() > 0.1


def test_a_decoded_token_equals_the_official_code():
    inputs = (jnp.asarray(DATA[name]) for name in ("query", "key", "value"))
    got = attend(ENCODING, *inputs, rows=slice(LENGTH - 1, LENGTH))
    np.testing.assert_allclose(got, DATA["last"], atol=2e-5)


def test_with_log_scaled_queries_equals_the_official_code():
    encoding = Combine((LogLength(trained_length=6, minimum=1.0), ENCODING))
    inputs = (jnp.asarray(DATA[name]) for name in ("query", "key", "value"))
    got = attend(encoding, *inputs, indices=(PLACES, PLACES))
    np.testing.assert_allclose(got, DATA["scaled"], atol=2e-5)


@pytest.mark.parametrize(("group", "window"), [(1, 1), (2, 2), (3, 6), (4, 16)])
def test_is_the_formula_at_given_positions(group, window):
    inputs = [jnp.asarray(DATA[name])[:, :14] for name in ("query", "key", "value")]
    places = jnp.arange(14) + jnp.where(jnp.arange(14) < 6, 0, 11)
    encoding = SelfExtend(group=group, window=window)
    indices = places[None]
    sides = (Side(x, indices) for x in inputs[:2])
    query, key = encoding.apply({}, *sides, method="rotate")
    bias = encoding.apply({}, Side(query, indices), Side(key, indices), method="bias")
    got = dot_product_attention(query, key, inputs[2], bias, is_causal=True)
    want = literal(*inputs, group, window, np.asarray(places))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_groups_of_one_are_rope():
    inputs = [jnp.asarray(DATA[name]) for name in ("query", "key", "value")]
    got = attend(SelfExtend(group=1, window=2), *inputs)
    np.testing.assert_allclose(got, attend(RoPE(), *inputs), atol=2e-5)


def test_gradients_are_those_of_the_dense_form():
    inputs = [jnp.asarray(DATA[name]) for name in ("query", "key", "value")]

    def loss(inputs, implementation):
        return jnp.sum(jnp.sin(attend(ENCODING, *inputs, implementation=implementation)))

    def dense(inputs):
        query, key, value = inputs
        shifts = group_shifts(PLACES, 4, 8)
        turn = lambda x, p: RoPE().apply({}, Side(x, p), Side(x, p), method="rotate")[0]  # noqa: E731
        key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
        near = jnp.einsum("btnh,bsnh->bnts", turn(query, PLACES), turn(key, PLACES))
        far_query, far_key = (
            turn(x, PLACES + s) for x, s in zip((query, key), shifts, strict=True)
        )
        far = jnp.einsum("btnh,bsnh->bnts", far_query, far_key)
        distance = PLACES[0][:, None] - PLACES[0][None, :]
        logits = jnp.where(distance[None, None] < 8, near, far) * 8**-0.5
        logits = jnp.where(distance[None, None] >= 0, logits, -1e30)
        return jnp.sum(jnp.sin(jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), value)))

    want = jax.jit(jax.grad(dense))(inputs)
    for implementation in ("reference", "xla"):
        got = jax.jit(jax.grad(loss), static_argnums=1)(inputs, implementation)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_distances_go_on_without_a_jump_and_slowly():
    places = jnp.arange(100)[None]
    shift, of_key = group_shifts(places, 4, 16)
    far = (places + shift)[0, -1] - (places + of_key)[0]
    distance = 99 - jnp.arange(100)
    assert np.diff(far[::-1][16:]).max() == 1
    assert int(far[distance == 16][0]) == 16
    assert far[0] == 99 // 4 + 12


def test_distances_stay_within_the_trained_length_up_to_the_stated_one():
    """(L - window) G + window tokens, up to the rounding of one group."""
    trained, group, window = 40, 4, 16
    tokens = (trained - window) * group + window
    for length, fits in ((tokens, True), (tokens + 2 * group, False)):
        query, key = group_shifts(jnp.array([[0, length - 1]]), group, window)
        farthest = int(length - 1 + query[0, 1] - key[0, 0])
        assert (farthest <= trained) == fits


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query_features": jnp.ones((1, 3, 2, 4))}, r"query_features has shape \(1, 3, 2, 4\)"),
        ({"key_features": jnp.ones((1, 2, 1, 4))}, r"key_features has shape \(1, 2, 1, 4\)"),
        ({"query_positions": jnp.ones((1, 2))}, r"query_positions has shape \(1, 2\)"),
        ({"key_positions": jnp.ones((3,))}, r"key_positions has shape \(3,\)"),
        ({"window": 0}, "window is 0; it must be at least 1"),
    ],
)
def test_descriptions_that_do_not_fit(changes, words):
    x, places = jnp.ones((1, 3, 1, 4)), jnp.arange(3)[None]
    fields = {"query_features": x, "key_features": x} | {
        "query_positions": places,
        "key_positions": places,
        "window": 2,
    }
    with pytest.raises(ValueError, match=words):
        dot_product_attention(x, x, x, GroupedBias(**fields | changes), is_causal=True)
    with pytest.raises(ValueError, match="needs is_causal=True"):
        dot_product_attention(x, x, x, GroupedBias(**fields))
