"""Indices of tokens."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posjax.positions import (
    LengthError,
    check_length,
    digit_run_positions,
    segment_positions,
    sequence_positions,
)


def test_sequence_positions_start_at_the_offset():
    assert sequence_positions(2, 3, offset=5).tolist() == [[5, 6, 7], [5, 6, 7]]


def test_segment_positions_restart_in_every_run_of_an_id():
    ids = jnp.array([[1, 1, 2, 2, 2, 1], [3, 3, 3, 3, 3, 3]])
    assert segment_positions(ids).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


def test_digit_runs_of_a_sum():
    text = "98282+3859172=2787472"
    positions, run = digit_run_positions(jnp.array([[c.isdigit() for c in text]]))
    assert positions[0].tolist() == [1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]
    assert run.tolist() == [7]


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 12), st.integers(0, 5))
def test_digit_runs_in_two_calls_equal_one_call(digits, cut, before):
    digits, run = jnp.array([digits]), jnp.array([before])
    want, want_run = digit_run_positions(digits, run)
    first, run = digit_run_positions(digits[:, :cut], run)
    second, run = digit_run_positions(digits[:, cut:], run)
    np.testing.assert_array_equal(jnp.concatenate([first, second], axis=1), want)
    assert run.tolist() == want_run.tolist()


def test_a_sequence_longer_than_a_table_is_named():
    check_length(8, 8, "Learned")
    with pytest.raises(
        LengthError, match=r"Learned has max_length=8, but the sequence has 9 tokens.*>= 9"
    ):
        check_length(9, 8, "Learned")
