import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posjax.encodings import CONFLATOR, RoPE
from posjax.encodings.base import Side
from posjax.encodings.conflator import switching_positions
from posjax.positions import segment_positions, sequence_positions

RULES = pytest.mark.parametrize("rule", ["reset", "flip"])
# 0: the first language, 1: the second, -1: neither.
LANGUAGES = st.lists(st.sampled_from([0, 0, 1, 1, -1]), min_size=9, max_size=9)


def one_by_one(language, positions, rule):
    """The rule, one token after another; a position of 0 starts a new sequence."""
    indices, spoken, direction, last, index, anchor = [], None, 1, 0, 0, 0
    for own, position in zip(language, positions, strict=True):
        if position == 0:
            spoken, direction, index, anchor = None, 1, 0, 0
        else:
            if own != -1 and spoken is not None and own != spoken:
                direction, anchor = -direction, position
            index += direction * (position - last)
        spoken, last = spoken if own == -1 else own, position
        indices.append(index if rule == "flip" else position - anchor)
    return indices


@RULES
def test_by_hand(rule):
    language = jnp.array([[-1, 0, 0, -1, 1, -1, 1, 0, 1]])
    indices, carry = switching_positions(language, sequence_positions(1, 9), rule=rule)
    want = {"reset": [0, 1, 2, 3, 0, 1, 2, 0, 0], "flip": [0, 1, 2, 3, 2, 1, 0, 1, 0]}[rule]
    assert indices[0].tolist() == want
    assert (carry.language.tolist(), carry.index.tolist()) == ([1], [0])
    assert carry.direction.tolist() == [-1 if rule == "flip" else 1]


@RULES
@given(language=LANGUAGES, split=st.integers(1, 8))
def test_equals_the_rule_one_by_one_also_in_two_calls(rule, language, split):
    run = jax.jit(switching_positions, static_argnames="rule")
    language, positions = jnp.array([language]), jnp.arange(9)[None, :] * 2
    whole, end = run(language, positions, rule=rule)
    assert whole[0].tolist() == one_by_one(language[0].tolist(), range(0, 18, 2), rule)
    with jax.disable_jit():
        first, carry = switching_positions(language[:, :split], positions[:, :split], rule=rule)
        second, after = switching_positions(
            language[:, split:], positions[:, split:], carry, rule=rule
        )
    assert jnp.concatenate((first, second), axis=1).tolist() == whole.tolist()
    assert jax.tree.map(int, jax.tree.map(lambda x: x[0], after)) == jax.tree.map(
        lambda x: int(x[0]), end
    )


@RULES
def test_packed_sequences_know_nothing_of_each_other(rule):
    random = np.random.default_rng(0)
    language = jnp.asarray(random.integers(-1, 2, (4, 12)))
    segments = jnp.asarray(np.sort(random.integers(0, 4, (4, 12)), axis=1))
    places = segment_positions(segments)
    indices, _ = switching_positions(language, places, rule=rule)
    for row in range(4):
        want = one_by_one(language[row].tolist(), places[row].tolist(), rule)
        assert indices[row].tolist() == want


@RULES
def test_segments_are_enough_where_positions_do_not_restart(rule):
    tokens = jnp.array([[65, 200, 200, 65, 65, 200]])
    segments = jnp.array([[0, 0, 0, 1, 1, 1]])
    places = jnp.arange(6)[None, :] + 1
    apply = CONFLATOR(rule=rule).apply
    indices, _ = apply({}, tokens, places, segment_ids=segments, method="positions")
    want = {"reset": [1, 0, 1, 4, 5, 0], "flip": [1, 0, -1, 4, 5, 4]}[rule]
    assert indices[0].tolist() == want


def test_fractions_of_positions():
    language, positions = jnp.array([[0, 0, 1, 1]]), jnp.array([[0.0, 0.5, 1.0, 1.5]])
    assert switching_positions(language, positions)[0].tolist() == [[0.0, 0.5, 0.0, 0.5]]
    flipped, carry = switching_positions(language, positions, rule="flip")
    assert flipped.tolist() == [[0.0, 0.5, 0.0, -0.5]]
    assert carry.index.dtype == jnp.float32


def test_bytes_of_two_scripts():
    tokens = jnp.array([list("a, घर b".encode())])
    places = sequence_positions(*tokens.shape)
    indices, _ = CONFLATOR().apply({}, tokens, places, method="positions")
    assert indices[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0]
    own = CONFLATOR(second=(7,), neutral=())
    tokens = jnp.array([[7, 7, 1, 2, 7]])
    indices, _ = own.apply({}, tokens, places[:, :5], method="positions")
    assert indices[0].tolist() == [0, 1, 0, 1, 0]
    one = CONFLATOR(second=(), neutral=())
    assert one.apply({}, tokens, places[:, :5], method="positions")[0].tolist() == [[0, 1, 2, 3, 4]]


def test_turns_as_rope_by_its_indices():
    x, indices = jax.random.normal(jax.random.key(0), (1, 4, 2, 8)), jnp.array([[0, 1, 0, -5]])
    settings = {"base": 500.0, "layout": "interleaved"}
    ours = CONFLATOR(**settings).apply(
        {}, Side(x, indices), Side(x[:, :2], indices[:, :2]), method="rotate"
    )
    rope = RoPE(**settings).apply(
        {}, Side(x, indices), Side(x[:, :2], indices[:, :2]), method="rotate"
    )
    for a, b in zip(ours, rope, strict=True):
        np.testing.assert_array_equal(a, b)
    assert CONFLATOR.flip() == CONFLATOR(rule="flip")
