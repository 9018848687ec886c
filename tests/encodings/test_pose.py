import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import T5, PoSE, RoPE
from posjax.encodings.base import Side
from posjax.encodings.rope import rotate
from posjax.positions import LengthError, skip_positions

PLACES = jnp.broadcast_to(jnp.arange(7), (3, 7))
TOKENS = jnp.zeros_like(PLACES)


def train(encoding, seed=0, places=PLACES, **settings):
    rngs = {"encoding": jax.random.key(seed)}
    settings |= {"method": "positions", "deterministic": False, "rngs": rngs}
    return encoding.apply({}, TOKENS, places, **settings)[0]


def test_training_has_one_gap_in_each_row_and_stays_below_the_target():
    encoding = PoSE(target_length=1000)
    drawn = np.concatenate([train(encoding, seed) for seed in range(20)])
    assert (drawn[:, 0] == 0).all()
    steps = np.diff(drawn, axis=1)
    assert ((steps != 1).sum(axis=1) <= 1).all()
    assert (steps.argmax(axis=1) < 4).all()  # the first part has at most half of the tokens
    assert drawn.max() < 1000
    assert len(set(drawn[:, -1].tolist())) > 30


def test_evaluation_and_decoding_are_plain():
    indices, carry = PoSE().apply({}, TOKENS, PLACES, method="positions")
    np.testing.assert_array_equal(indices, PLACES)
    assert carry is None
    assert PoSE().decodes


def test_the_encoding_inside_sees_the_gap():
    encoding = PoSE.linear()
    x = jax.random.normal(jax.random.key(0), (3, 7, 2, 8))
    places = train(encoding)
    query, _ = encoding.apply({}, Side(x, places), Side(x, places), method="rotate")
    want = rotate(x, places.astype(jnp.float32) / 8)
    np.testing.assert_allclose(query, want, atol=1e-3)
    assert isinstance(PoSE(T5()).encoding, T5)


def test_the_first_part_may_move_too():
    first = np.asarray(
        [train(PoSE(target_length=100, shift_first=True), s)[0, 0] for s in range(9)]
    )
    assert first.any()
    plain = np.asarray([train(PoSE(target_length=100), s)[0, 0] for s in range(9)])
    assert not plain.any()


def test_a_sequence_as_long_as_the_target_stays_and_a_longer_one_raises():
    np.testing.assert_array_equal(train(PoSE(target_length=7)), PLACES)
    with pytest.raises(LengthError, match="target_length is 6; the sequence has 7 tokens"):
        train(PoSE(target_length=6))
    segments = jnp.array([[0, 0, 0, 0, 1, 1, 1]] * 3)
    packed = jnp.array([[0, 1, 2, 3, 0, 1, 2]] * 3)
    assert train(PoSE(target_length=6), places=packed, segment_ids=segments).max() < 6


def test_published_settings():
    assert PoSE.linear() == PoSE(RoPE.linear().clone(scaling=PoSE.linear().encoding.scaling))
    assert PoSE.linear().encoding.scaling.factor == PoSE().target_length / 2048
    assert PoSE.yarn().encoding.scaling.original_length == 2048


def test_official_arithmetic():
    """The authors' arithmetic, with numpy's random numbers, makes the same set of positions."""
    random = np.random.default_rng(0)
    target, length = 12, 7
    official = set()
    for _ in range(2000):
        places = np.arange(length)
        cut = random.integers(1, (length + 1) // 2, endpoint=True)
        places[cut:] += random.integers(0, target - length, endpoint=True)
        official.add(tuple(places.tolist()))
    keys = jax.random.split(jax.random.key(0), 2000)
    skip = jax.jit(jax.vmap(lambda key: skip_positions(key, PLACES[:1], target)[0]))
    assert {tuple(row) for row in skip(keys).tolist()} == official
