import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError
from hypothesis import given
from hypothesis import strategies as st

from posjax.encodings import Abacus
from posjax.positions import LengthError, segment_positions, sequence_positions


def tokens_of(*texts):
    return jnp.array([list(text.encode()) for text in texts])


def positions(tokens, places=None, carry=None, encoding=None, **settings):
    places = sequence_positions(*tokens.shape) if places is None else places
    encoding = Abacus() if encoding is None else encoding
    rngs = settings.pop("rngs", None)
    return encoding.apply({}, tokens, places, carry, method="positions", rngs=rngs, **settings)


def test_the_papers_form_by_hand():
    indices, carry = positions(tokens_of("98282+3859172=2787472"))
    one_to_seven = [1, 2, 3, 4, 5, 6, 7]
    assert indices[0].tolist() == [1, 2, 3, 4, 5, 0, *one_to_seven, 0, *one_to_seven]
    assert carry.tolist() == [7]


@given(st.text("059+= ", min_size=1, max_size=12))
def test_equals_runs_found_by_grouping(text):
    want = [
        place if digit else 0
        for digit, run in itertools.groupby(text, str.isdigit)
        for place, _ in enumerate(run, 1)
    ]
    padded = tokens_of(text.ljust(12, "+"))
    assert positions(padded)[0][0, : len(text)].tolist() == want


@pytest.mark.parametrize("split", [1, 3, 7])
def test_a_number_goes_on_in_the_next_call(split):
    tokens = tokens_of("12+34567", "123456=8")
    places = sequence_positions(2, 8)
    whole, end = positions(tokens)
    first, carry = positions(tokens[:, :split], places[:, :split])
    second, after = positions(tokens[:, split:], places[:, split:], carry)
    np.testing.assert_array_equal(jnp.concatenate((first, second), axis=1), whole)
    np.testing.assert_array_equal(after, end)


def test_a_number_ends_with_its_segment():
    segments = jnp.array([[0, 0, 0, 1, 1, 1]])
    indices, carry = positions(tokens_of("412345"), segment_positions(segments))
    assert indices.tolist() == [[1, 2, 3, 1, 2, 3]]
    assert carry.tolist() == [3]


def test_training_shifts_all_digits_of_a_batch_by_one_offset():
    tokens = tokens_of("12+3", "+456")
    still, end = positions(tokens)
    seen = set()
    for seed in range(40):
        rngs = {"encoding": jax.random.key(seed)}
        encoding = Abacus(max_offset=3)
        indices, carry = positions(tokens, encoding=encoding, deterministic=False, rngs=rngs)
        offset = int(indices[0, 0]) - 1
        np.testing.assert_array_equal(indices, jnp.where(still > 0, still + offset, 0))
        np.testing.assert_array_equal(carry, end)
        seen.add(offset)
    assert seen == {0, 1, 2, 3}


def test_random_offsets_need_their_stream():
    with pytest.raises(InvalidRngError, match="encoding"):
        positions(tokens_of("1"), deterministic=False)
    settings = {"encoding": Abacus(max_offset=0), "deterministic": False}
    assert positions(tokens_of("1"), **settings)[0].tolist() == [[1]]


def test_own_digit_tokens():
    tokens = jnp.array([[3, 4, 13, 14, 5]])
    indices, _ = positions(tokens, encoding=Abacus(digits=tuple(range(4, 14))))
    assert indices.tolist() == [[0, 1, 2, 0, 1]]


def test_adds_rows_and_row_zero_to_all_others():
    encoding = Abacus(max_length=4, max_offset=0)
    table = jnp.array([[1.0], [10.0], [20.0], [30.0]])
    indices, _ = positions(tokens_of("+12="))
    out = encoding.apply({"params": {"table": table}}, jnp.ones((1, 4, 1)), indices, method="embed")
    assert out[0, :, 0].tolist() == [2, 11, 21, 2]


def test_a_number_longer_than_the_table():
    encoding = Abacus(max_length=4, max_offset=0)
    variables = {"params": {"table": jnp.ones((4, 2))}}
    embed = lambda i: encoding.apply(variables, jnp.ones((1, 4, 2)), i, method="embed")  # noqa: E731
    with pytest.raises(LengthError, match=r"position 4 is not in a table of 4 rows, 0 \.\.\. 3"):
        embed(positions(tokens_of("1234"))[0])
    out = jax.jit(embed)(positions(tokens_of("1234"))[0])
    assert np.isfinite(out[0, :3]).all()
    assert np.isnan(out[0, 3]).all()


def test_starts_with_the_deviation_asked_for():
    x, indices = jnp.zeros((1, 1, 32)), jnp.zeros((1, 1), jnp.int32)
    params = Abacus(initial_deviation=0.1).init(jax.random.key(0), x, indices, method="embed")
    table = params["params"]["table"]
    assert (table.shape, table.dtype) == ((1024, 32), jnp.float32)
    np.testing.assert_allclose(jnp.std(table), 0.1, rtol=0.05)
