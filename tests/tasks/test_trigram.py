import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posjax.tasks import trigram as module
from posjax.tasks.trigram import Trigram

TEXT = b"the cat sat on the mat; the cat ran.\x00\xff"


def literal(data: bytes, context: bytes, byte: int) -> float:
    """p(byte | context), as the formulas in the class say, counting each time anew."""
    if context is None:
        return 1 / 256
    size = len(context)
    grams = [data[i : i + size + 1] for i in range(len(data) - size)]
    following = Counter(gram[-1] for gram in grams if gram[:-1] == context)
    shorter = literal(data, context[1:] if context else None, byte)
    if not following:
        return shorter
    different = len(following)
    return (following[byte] + different * shorter) / (following.total() + different)


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def windows(data: bytes, length: int) -> np.ndarray:
    number = len(data) // length
    return array(data)[: number * length].reshape(number, length)


@given(
    train=st.one_of(st.binary(min_size=1, max_size=30), st.text("ab", min_size=1).map(str.encode)),
    test=st.text("abz", min_size=6, max_size=12).map(str.encode),
)
def test_agrees_with_the_literal_form(train, test):
    whole = windows(test, 6)
    nats = Trigram.fit(array(train)).nats(whole[:, :-1], whole[:, 1:])
    expected = [
        [-math.log(literal(train, bytes(row[max(0, i - 1) : i + 1]), row[i + 1])) for i in range(5)]
        for row in whole
    ]
    np.testing.assert_allclose(nats, expected, rtol=1e-12)
    assert nats.dtype == np.float64


@pytest.mark.parametrize("context", [b"th", b"e ", b"zz", b"ez", b"\xff\xff", b"\x00\xff"])
def test_probabilities_sum_to_one(context):
    trigram = Trigram.fit(array(TEXT))
    inputs = np.tile(array(context), (256, 1))
    targets = np.stack([np.zeros(256, np.uint8), np.arange(256, dtype=np.uint8)], axis=1)
    assert np.exp(-trigram.nats(inputs, targets)[:, 1]).sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(trigram.bigrams.sum(-1), 1, rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 3, 36, 37, 38])
def test_counting_in_chunks_changes_nothing(chunk, monkeypatch):
    whole = Trigram.fit(array(TEXT))
    monkeypatch.setattr(module, "_CHUNK", chunk)
    parts = Trigram.fit(array(TEXT))
    assert np.array_equal(whole.counts, parts.counts)
    assert np.array_equal(whole.bigrams, parts.bigrams)


def test_what_was_read_is_predicted_well():
    rule = b"abcd" * 500
    rows = windows(rule[:80], 20)
    trigram = Trigram.fit(array(rule))
    assert trigram.nats(rows[:, :-1], rows[:, 1:]).max() < 0.01
    assert trigram.nats(rows[:, :-1], rows[:, :-1]).min() > 5
