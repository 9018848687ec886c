import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import ALiBi, Combine, Learned, Randomized, RoPE
from posjax.encodings.alibi import alibi_slopes
from posjax.encodings.base import Side
from posjax.encodings.rope import rotate
from posjax.models import Transformer, TransformerConfig, init_cache
from posjax.positions import LengthError

X = jax.random.normal(jax.random.key(0), (2, 6, 2, 8))
TOKENS = jnp.zeros((2, 6), jnp.int32)
PLACES = jnp.broadcast_to(jnp.arange(6), (2, 6))
TRAIN = {"deterministic": False, "rngs": {"encoding": jax.random.key(7)}}


def indices_of(encoding, places=PLACES, carry=None, **settings):
    tokens = jnp.zeros(places.shape, jnp.int32)
    return encoding.apply({}, tokens, places, carry, method="positions", **settings)[0]


def subset(key, length, max_length):
    """The draw, literally: the first numbers of a random order, sorted."""
    return np.sort(np.asarray(jax.random.permutation(key, max_length))[:length])


def test_training_draws_a_sorted_subset_for_the_whole_batch():
    first, other = (
        indices_of(Randomized(max_length=30), deterministic=False, rngs={"encoding": key}).inner[0]
        for key in jax.random.split(jax.random.key(0))
    )
    for drawn in (first, other):
        assert (np.diff(drawn, axis=1) > 0).all()
        np.testing.assert_array_equal(drawn[0], drawn[1])
        assert drawn.min() >= 0
        assert drawn.max() < 30
    assert not np.array_equal(first, other)


def test_evaluation_is_the_same_every_time_and_follows_the_seed():
    encoding = Randomized(max_length=30, evaluation_seed=5)
    key = jax.random.split(jax.random.key(5), 1)[0]
    np.testing.assert_array_equal(indices_of(encoding).inner[0][1], subset(key, 6, 30))
    np.testing.assert_array_equal(indices_of(encoding).inner[0], indices_of(encoding).inner[0])
    other = indices_of(encoding.clone(evaluation_seed=6))
    assert not np.array_equal(other.inner[0], indices_of(encoding).inner[0])


def test_plain_evaluation_is_the_encoding_inside():
    indices = indices_of(Randomized(evaluation="plain"))
    np.testing.assert_array_equal(indices.inner[0], PLACES)
    far = indices_of(Randomized(max_length=3, evaluation="plain"), PLACES + 10)
    assert not far.outside.any()


@pytest.mark.parametrize("max_length", [6, 40])
def test_all_of_the_range_is_what_a_full_length_draws(max_length):
    drawn = indices_of(Randomized(max_length=max_length), **TRAIN).inner[0]
    assert np.array_equal(drawn, PLACES) == (max_length == 6)


def test_the_encoding_inside_sees_the_drawn_positions():
    encoding = Randomized(max_length=30)
    indices = indices_of(encoding, **TRAIN)
    query, key = encoding.apply({}, Side(X, indices), Side(X, indices), method="rotate")
    np.testing.assert_array_equal(query, rotate(X, indices.inner[0]))
    np.testing.assert_array_equal(key, rotate(X, indices.inner[0]))
    alibi = Randomized.alibi().layer(3, 5)
    indices = indices_of(alibi)
    bias = alibi.apply({}, Side(X, indices), Side(X, indices), method="bias")
    dense = bias.dense(X, X, scale=1, allowed=None, query_positions=None, key_positions=None)
    places = np.asarray(indices.inner[3])
    for n, i, j in np.ndindex(2, 6, 6):
        distance = int(places[0, i]) - int(places[0, j])
        want = -alibi_slopes(2)[n] * (abs(distance) - 0.5 * (distance > 0))
        np.testing.assert_allclose(dense[0, n, i, j], want, rtol=1e-6)
    learned = Randomized(Learned(max_length=30), max_length=30)
    indices, table = indices_of(learned), jax.random.normal(jax.random.key(1), (30, 4))
    variables = {"params": {"encoding": {"table": table}}}
    embedded = learned.apply(variables, jnp.zeros((2, 6, 4)), indices, method="embed")
    np.testing.assert_array_equal(embedded, table[indices.inner[0]])


def test_each_layer_has_a_draw_of_its_own():
    encoding = Randomized(max_length=500, draws=3)
    indices = indices_of(encoding, **TRAIN)
    assert len({tuple(x[0].tolist()) for x in indices.inner}) == 3
    for layer in range(5):
        own = encoding.layer(layer, 5)
        query, _ = own.apply({}, Side(X, indices), Side(X, indices), method="rotate")
        np.testing.assert_array_equal(query, rotate(X, indices.inner[layer % 3]))
    alone = Randomized()
    assert alone.layer(2, 3) == alone


def test_packed_sequences_draw_as_many_numbers_as_they_have_tokens():
    places = jnp.array([[0, 1, 2, 3, 0, 1]])
    for evaluation in ("random", "spread"):
        encoding = Randomized(max_length=50, evaluation=evaluation)
        packed = indices_of(encoding, places).inner[0]
        for part in (slice(0, 4), slice(4, 6)):
            alone = indices_of(encoding, places[:, part]).inner[0]
            np.testing.assert_array_equal(packed[:, part], alone)


@pytest.mark.parametrize("evaluation", ["random", "spread"])
def test_a_known_length_makes_steps_equal_to_the_whole(evaluation):
    encoding = Randomized(max_length=50, evaluation=evaluation, evaluation_length=8)
    whole = indices_of(encoding)
    assert encoding.decodes
    carry, parts = None, []
    for start, end in ((0, 3), (3, 4), (4, 6)):
        part, carry = encoding.apply(
            {}, TOKENS[:, start:end], PLACES[:, start:end], carry, method="positions"
        )
        parts.append(part.inner[0])
    np.testing.assert_array_equal(jnp.concatenate(parts, axis=1), whole.inner[0])
    assert carry[0].tolist() == [6, 6]
    full = jnp.arange(8)[None]
    np.testing.assert_array_equal(indices_of(encoding, full).inner[0][0, :6], whole.inner[0][0])


def test_steps_need_a_known_length():
    encoding = Randomized()
    assert not encoding.decodes
    _, carry = encoding.apply({}, TOKENS, PLACES, method="positions")
    with pytest.raises(NotImplementedError, match="set evaluation_length"):
        encoding.apply({}, TOKENS, PLACES, carry, method="positions")
    assert Randomized(evaluation="plain").decodes


def test_a_model_decodes_within_the_known_length():
    encoding = Randomized(max_length=16, evaluation_length=12)
    config = TransformerConfig(layers=1, heads=1, width=8, implementation="reference")
    model = Transformer(config, vocab_size=5, encoding=encoding)
    tokens = jnp.array([[1, 2, 3, 4]])
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    run = jax.jit(lambda tokens, cache: model.apply(variables, tokens, cache=cache))
    _, cache = run(tokens[:, :3], init_cache(model, variables, 1, 12))
    last, _ = run(tokens[:, 3:], cache)
    np.testing.assert_allclose(last[:, 0], model.apply(variables, tokens)[:, -1], atol=1e-5)
    with pytest.raises(LengthError, match="evaluation_length is 12; the sequence has 13 tokens"):
        init_cache(model, variables, 1, 13)


def test_there_is_nothing_beyond_the_range():
    encoding = Randomized(max_length=5)
    assert encoding.beyond == "raises"
    with pytest.raises(LengthError, match="max_length is 5; the sequence has 6 tokens"):
        indices_of(encoding)
    with pytest.raises(LengthError, match="max_length is 5; there is no position 9"):
        indices_of(encoding, PLACES[:, :2] + 9)

    @jax.jit
    def turned(places):
        indices = indices_of(encoding, places)
        return encoding.apply(
            {}, Side(X[:, :3], indices), Side(X[:, :3], indices), method="rotate"
        )[0]

    query = turned(jnp.array([[3, 4, 5], [0, 1, -1]]))
    assert np.isnan(query).all(axis=(2, 3)).tolist() == [[False, False, True]] * 2
    assert not np.isnan(query[:, :2]).any()


def test_parts_of_a_combination_keep_their_carries():
    inner = Combine((RoPE(), ALiBi()))
    encoding = Randomized(inner, draws=2, max_length=20, evaluation_length=10)
    call = functools.partial(encoding.apply, {}, method="positions")
    whole, _ = call(TOKENS, PLACES)
    first, carry = call(TOKENS[:, :2], PLACES[:, :2])
    second, _ = call(TOKENS[:, 2:], PLACES[:, 2:], carry)
    joined = jax.tree.map(lambda a, b: jnp.concatenate((a, b), axis=1), first, second)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)
