import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from posjax.tasks import TASKS
from posjax.tasks.augment import (
    index_hints,
    padded,
    padded_product,
    random_spaces,
    read_product,
    remove_hints,
    remove_spaces,
)


@given(st.text("0123456789+=*"), st.floats(0, 1), st.integers(0, 2**32))
def test_spaces_come_out_again(text, probability, seed):
    spaced = random_spaces(text, np.random.default_rng(seed), probability)
    assert remove_spaces(spaced) == text
    assert spaced == random_spaces(text, np.random.default_rng(seed), probability)
    assert not spaced.endswith(" ")


def test_spaces_are_as_frequent_as_they_should_be():
    """One with p, a second one with p^2 / 10, a third one with p^3 / 1000."""
    spaced = random_spaces("1" * 50_000, np.random.default_rng(0), 0.5)
    gaps = np.array([len(gap) for gap in spaced.split("1")[:-1]])
    for at_least, want in ((1, 0.5), (2, 0.5 * 0.05), (3, 0.5 * 0.05 * 0.005)):
        deviation = np.sqrt(want / 50_000)
        np.testing.assert_allclose((gaps >= at_least).mean(), want, atol=5 * deviation)
    assert random_spaces("12", np.random.default_rng(0), 1.0).startswith(" 1")
    assert random_spaces("12+3", np.random.default_rng(0), 0.0) == "12+3"


NUMBERS = st.lists(st.text("0123456789", min_size=1, max_size=26), min_size=1, max_size=4)


@given(NUMBERS, st.integers(0, 2**32))
def test_hints_are_letters_in_their_order_and_come_out_again(numbers, seed):
    hinted = index_hints(numbers, np.random.default_rng(seed))
    assert hinted == index_hints(numbers, np.random.default_rng(seed))
    assert [remove_hints(text) for text in hinted] == numbers
    longest = max(hinted, key=len)
    for text in hinted:
        assert text[::2] == longest[::2][: len(text) // 2]
    order = [ord(letter) - ord("a") for letter in longest[::2]]
    assert all((b - a) % 26 == 1 for a, b in itertools.pairwise(order))


def test_every_letter_starts():
    generator = np.random.default_rng(0)
    starts = {index_hints(["7"], generator, "xyz")[0] for _ in range(50)}
    assert starts == {"x7", "y7", "z7"}


@given(st.integers(0, 9999), st.integers(0, 9999), st.integers(4, 15))
def test_products_can_be_read_again(first, second, width):
    question, answer = padded_product(first, second, width)
    assert (len(question), len(answer)) == (2 * width + 2, 2 * width)
    assert read_product(question, answer) == (first, second, first * second)
    assert int(answer[0]) == first * second % 10


def test_padding_by_hand():
    assert padded(7, 3) == "007"
    assert padded_product(99, 99, 2) == ("99*99=", "1089")


def test_is_no_task():
    assert "augment" not in TASKS
