import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posjax.tasks import FlipFlop

WRITE, READ, IGNORE = 0, 1, 2


def memory(text: str) -> list[tuple[str, str]]:
    """(bit after a read, last bit written) for every read, by walking through the string."""
    stored, reads = None, []
    for instruction, bit in zip(text[::2], text[1::2], strict=True):
        if instruction == "w":
            stored = bit
        elif instruction == "r":
            reads.append((bit, stored))
    return reads


@given(
    length=st.integers(2, 40).map(lambda n: 2 * n),
    p_ignore=st.floats(0, 1),
    split=st.sampled_from(["train", "in_distribution", "dense", "sparse"]),
    index=st.integers(0, 9),
    seed=st.integers(0, 2**64 - 1),
)
def test_strings_belong_to_the_language(length, p_ignore, split, index, seed):
    task = FlipFlop(length=length, p_ignore=p_ignore)
    example = task.example(index, split, seed)
    text = task.vocabulary.decode(example["inputs"])
    assert len(text) == length == task.length
    assert set(text[::2]) <= set("wri")
    assert set(text[1::2]) <= set("01")
    assert text[0] == "w"
    assert text[-2] == "r"
    reads = memory(text)
    assert all(bit == stored for bit, stored in reads)
    assert example["scored"].sum() == len(reads) == text.count("r")
    answers = task.vocabulary.decode(example["targets"][example["scored"]])
    assert answers == "".join(bit for bit, _ in reads)


def test_an_example_by_eye():
    task = FlipFlop(length=16, p_ignore=0.3)
    example = task.example(4)
    assert task.vocabulary.decode(example["inputs"]) == "w1r1w0w1r1i1i0r1"
    assert task.vocabulary.decode(example["targets"][:-1]) == "1r1w0w1r1i1i0r1"
    assert np.flatnonzero(example["scored"]).tolist() == [2, 8, 14]
    assert example["inputs"][:4].tolist() == [0, 4, 1, 4]


def test_the_last_read_is_scored_and_nothing_follows_the_last_bit():
    for loss in ("clean", "full"):
        example = FlipFlop(length=8, loss=loss).example(0)
        assert example["scored"][-2:].tolist() == [True, False]
        assert example["loss_weights"][-2:].tolist() == [1, 0]


def test_loss_modes_differ_in_the_loss_alone():
    clean, full = (FlipFlop(length=32, loss=loss).example(0) for loss in ("clean", "full"))
    assert np.array_equal(clean["loss_weights"], clean["inputs"] == READ)
    assert full["loss_weights"].tolist() == [1] * 31 + [0]
    assert all(np.array_equal(clean[key], full[key]) for key in ("inputs", "targets", "scored"))


def close(count: float, number: int, probability: float) -> bool:
    """Within 4.5 standard deviations of a binomial distribution."""
    deviation = np.sqrt(number * probability * (1 - probability))
    return abs(count - number * probability) <= 4.5 * deviation


@pytest.mark.parametrize(
    ("split", "p_ignore"), [("in_distribution", 0.8), ("dense", 0.1), ("sparse", 0.98)]
)
def test_instructions_and_bits_have_the_right_frequencies(split, p_ignore):
    task = FlipFlop()
    assert f"FFL({p_ignore})" in task.splits[split].description
    tokens = np.stack([task.example(i, split)["inputs"] for i in range(500)])
    inner, bits = tokens[:, 2:-2:2], tokens[:, 1::2]
    p_other = (1 - p_ignore) / 2
    assert close((inner == IGNORE).sum(), inner.size, p_ignore)
    assert close((inner == WRITE).sum(), inner.size, p_other)
    assert close((inner == READ).sum(), inner.size, p_other)
    pairs = (inner[:, :-1:2] == IGNORE) & (inner[:, 1::2] == IGNORE)
    assert close(pairs.sum(), pairs.size, p_ignore**2)
    for kind in (WRITE, IGNORE):
        chosen = bits[tokens[:, ::2] == kind]
        assert close((chosen == 4).sum(), chosen.size, 0.5)
    assert close((inner[:, 0] == IGNORE).sum(), len(inner), p_ignore)
    assert close((inner[:, -1] == IGNORE).sum(), len(inner), p_ignore)


def test_training_has_the_training_frequency():
    task = FlipFlop(p_ignore=0.3)
    inner = np.stack([task.example(i)["inputs"] for i in range(200)])[:, 2:-2:2]
    assert close((inner == IGNORE).sum(), inner.size, 0.3)
