import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from posjax.tasks import SelectiveCopy


@given(
    symbols=st.integers(1, 8),
    alphabet=st.integers(2, 70),
    blanks=st.integers(0, 12),
    split=st.sampled_from(["train", "in_distribution", "dense", "sparse"]),
    index=st.integers(0, 9),
    seed=st.integers(0, 2**64 - 1),
)
def test_the_answer_is_the_input_without_blanks(symbols, alphabet, blanks, split, index, seed):
    task = SelectiveCopy(
        symbols=symbols,
        alphabet=alphabet,
        blanks=blanks,
        dense_blanks=3,
        sparse_blanks=20,
        examples=10,
    )
    example = task.example(index, split, seed)
    text = task.vocabulary.decode([*example["inputs"], example["targets"][-1]])
    question, answer = text.split("|")
    assert question.replace(".", "") == answer
    assert len(answer) == symbols
    assert question.count(".") == {"dense": 3, "sparse": 20}.get(split, blanks)
    assert example["scored"].sum() == symbols
    scored = example["targets"][example["scored"]]
    assert task.vocabulary.decode(scored) == answer
    assert np.array_equal(example["loss_weights"], example["scored"])


def test_an_example_by_eye():
    task = SelectiveCopy(symbols=3, blanks=4)
    example = task.example(0)
    assert task.vocabulary.symbols == (*"abcdefgh", ".", "|")
    assert task.vocabulary.decode(example["inputs"]) == "..g..db|gd"
    assert task.vocabulary.decode(example["targets"]) == ".g..db|gdb"
    assert example["scored"].tolist() == [False] * 7 + [True] * 3


def test_lengths_of_the_published_sizes():
    task = SelectiveCopy(blanks=256, dense_blanks=128, sparse_blanks=512)
    assert task.length == 256 + 16 + 1 + 16 - 1
    assert {name: split.length for name, split in task.splits.items()} == {
        "in_distribution": 288,
        "dense": 160,
        "sparse": 544,
    }
    assert SelectiveCopy().length == 64


def test_symbols_and_places_are_uniform():
    task, number = SelectiveCopy(), 3000
    inputs = np.stack([task.example(i)["inputs"] for i in range(number)])
    question = inputs[:, :48]
    places = (question != 8).mean(0)
    assert np.abs(places - 1 / 3).max() < 4.5 * np.sqrt(2 / 9 / number)
    symbols = question[question != 8].reshape(number, 16)
    pairs = np.bincount(8 * symbols[:, 0] + symbols[:, 1], minlength=64) / number
    assert np.abs(pairs - 1 / 64).max() < 4.5 * np.sqrt(1 / 64 / number)
    each = np.bincount(symbols.ravel(), minlength=8) / symbols.size
    assert np.abs(each - 1 / 8).max() < 4.5 * np.sqrt(7 / 64 / symbols.size)


def test_large_alphabets_have_distinct_symbols():
    symbols = SelectiveCopy(alphabet=300).vocabulary.symbols
    assert len(set(symbols)) == len(symbols) == 302
