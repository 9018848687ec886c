"""What every task promises, and the machinery that all of them share."""

import dataclasses
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import posjax.tasks
from posjax.tasks import TASKS, FlipFlop, SelectiveCopy, Split, Task, Text, Vocabulary
from posjax.tasks.base import as_batch

DTYPES = {"inputs": "int32", "targets": "int32", "loss_weights": "float32", "scored": "bool"}


def make(name: str, tmp_path, **settings) -> Task:
    if name != "text":
        return TASKS[name](**settings)
    for number in range(10):
        content = bytes((7 * number + i * i) % 251 for i in range(300 + 10 * number))
        (tmp_path / f"{number}.bin").write_bytes(content)
    return Text(path=(str(tmp_path),), length=32, **settings)


def checksum(example) -> int:
    little = (example[k].astype(example[k].dtype.newbyteorder("<")) for k in sorted(example))
    return zlib.crc32(b"".join(array.tobytes() for array in little))


def equal(one, other) -> bool:
    return all(np.array_equal(one[key], other[key]) for key in one)


def test_tasks_are_found_by_their_files():
    assert list(TASKS.items()) == [
        ("flip_flop", FlipFlop),
        ("selective_copy", SelectiveCopy),
        ("text", Text),
    ]
    assert {"FlipFlop", "SelectiveCopy", "Text", "TASKS", "Task"} <= set(vars(posjax.tasks))


def test_import_needs_no_grain():
    code = "import sys, posjax.tasks; sys.exit('grain' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", TASKS)
def test_examples_have_the_promised_form(name, tmp_path):
    task = make(name, tmp_path)
    lengths = {"train": task.length} | {n: split.length for n, split in task.splits.items()}
    for split, length in lengths.items():
        example = task.example(1, split)
        assert {key: str(array.dtype) for key, array in example.items()} == DTYPES
        assert all(array.shape == (length,) for array in example.values())
        for key in ("inputs", "targets"):
            assert example[key].min() >= 0
            assert example[key].max() < task.vocabulary.size
        assert example["scored"].any()
        assert np.all(example["loss_weights"][example["scored"]] == 1)
        followed = np.flatnonzero(example["loss_weights"][:-1])
        assert np.array_equal(example["targets"][followed], example["inputs"][followed + 1])


@pytest.mark.parametrize("name", TASKS)
def test_examples_depend_on_index_split_and_seed_alone(name, tmp_path):
    task = make(name, tmp_path)
    first = task.example(5, seed=3)
    task.example(6, seed=3)
    assert equal(first, dataclasses.replace(task).example(5, "train", 3))
    assert equal(first, task.example(np.int64(5), seed=np.int64(3)))
    for other in (task.example(6, seed=3), task.example(5, seed=4), task.example(5)):
        assert not np.array_equal(first["inputs"], other["inputs"])


def test_random_numbers_of_examples_do_not_overlap():
    task = SelectiveCopy()
    streams = [
        task.generator(i, s, seed=0).random(64) for i in range(9) for s in ("train", "dense")
    ]
    assert len(np.unique(streams)) == 9 * 2 * 64


@pytest.mark.parametrize("name", ["flip_flop", "selective_copy"])
def test_evaluation_data_has_its_own_seed(name, tmp_path):
    task = make(name, tmp_path, evaluation_seed=1)
    splits = [task.example(0, split) for split in task.splits]
    assert all(
        equal(e, task.example(0, s, seed=9)) for s, e in zip(task.splits, splits, strict=True)
    )
    train = task.example(0, seed=1)
    assert not np.array_equal(train["inputs"], splits[0]["inputs"])
    other = make(name, tmp_path, evaluation_seed=2)
    assert not any(
        np.array_equal(e["inputs"], other.example(0, s)["inputs"])
        for s, e in zip(task.splits, splits, strict=True)
    )
    assert equal(task.example(0), other.example(0))


# True when the tasks were released: after a change, old results cannot be compared any more.
@pytest.mark.parametrize(
    ("name", "settings", "train", "splits"),
    [
        ("selective_copy", {}, 216253833, [198737682, 3196452873, 3456535082]),
        ("flip_flop", {}, 2076647483, [3559983441, 1933574087, 97819704]),
        ("flip_flop", {"loss": "full"}, 3515501759, [3749416887, 230054290, 4227189482]),
        ("text", {}, 193468467, [3296068911, 4206026014, 752712739, 1504974367]),
    ],
)
def test_data_never_changes_silently(name, settings, train, splits, tmp_path):
    task = make(name, tmp_path, **settings)
    assert checksum(task.example(3, seed=1)) == train
    assert [checksum(task.example(4, split)) for split in task.splits] == splits


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"index": -1}, "index .* is -1; it must be from 0"),
        ({"index": 2**64}, "index .* is 18446744073709551616"),
        ({"index": 0, "seed": -1}, "seed is -1"),
        ({"index": 0, "seed": 2**64}, "seed is 18446744073709551616"),
        ({"index": 0, "split": "tain"}, "split is 'tain'; it must be \"train\", "),
    ],
)
def test_bad_examples_are_refused(name, arguments, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        make(name, tmp_path).example(**arguments)


@pytest.mark.parametrize("name", TASKS)
def test_splits_end_at_their_size(name, tmp_path):
    task = make(name, tmp_path)
    for split, description in task.splits.items():
        task.example(description.size - 1, split)
        words = f"index in split '{split}' .* {description.size - 1}\\."
        with pytest.raises(ValueError, match=words):
            task.example(description.size, split)


def batch_of(targets, scored):
    return as_batch(np.zeros_like(targets), targets, scored)


def logits_for(tokens, vocabulary=4):
    return jnp.asarray(np.eye(vocabulary, dtype=np.float32)[np.asarray(tokens)])


TARGETS = np.array([[0, 1, 2], [3, 2, 1], [1, 1, 1]])
SCORED = np.array([[0, 1, 1], [1, 1, 1], [0, 0, 0]], bool)


@pytest.mark.parametrize(
    ("changes", "tokens", "sequences"),
    [
        ({}, (0, 5), (0, 2)),
        ({(0, 1): 3}, (1, 5), (1, 2)),
        ({(0, 0): 3}, (0, 5), (0, 2)),
        ({(2, 0): 3, (2, 2): 0}, (0, 5), (0, 2)),
        ({(1, 0): 0, (1, 2): 0}, (2, 5), (1, 2)),
        ({(0, 2): 0, (1, 0): 0}, (2, 5), (2, 2)),
    ],
    ids=["right", "one", "not scored", "padding", "two in a row", "two rows"],
)
def test_errors_by_hand(changes, tokens, sequences):
    predicted = TARGETS.copy()
    for place, token in changes.items():
        predicted[place] = token
    batch = batch_of(TARGETS, SCORED)
    result = jax.jit(SelectiveCopy().metrics)(logits_for(predicted), batch)
    assert result["token_error"] == tokens
    assert result["sequence_error"] == sequences
    assert {value.dtype for pair in result.values() for value in pair} == {jnp.dtype("float32")}


def test_all_wrong_is_one():
    result = FlipFlop().metrics(logits_for((TARGETS + 1) % 4), batch_of(TARGETS, SCORED))
    assert {name: float(s / n) for name, (s, n) in result.items()} == {
        "token_error": 1.0,
        "sequence_error": 1.0,
    }


def test_empty_batch_counts_for_nothing():
    for task in (SelectiveCopy(), Text()):
        result = task.metrics(logits_for(TARGETS), batch_of(TARGETS, np.zeros_like(SCORED)))
        assert all(float(s) == float(n) == 0 for s, n in result.values())


def test_a_new_task_needs_four_members():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Ones(Task):
        length: int = 3

        @property
        def vocabulary(self):
            return Vocabulary(("0", "1"))

        @property
        def splits(self):
            return {"same": Split(2, self.length, "ones")}

        def example(self, index, split="train", seed=0):
            self.generator(index, split, seed)
            ones = np.ones(self.length)
            return as_batch(ones, ones, ones)

    task = Ones(length=2)
    assert task.example(1, "same")["inputs"].tolist() == [1, 1]
    assert task.baselines() == {}
    assert task.derive({"token_error": 0.5}) == {"token_error": 0.5}
    with pytest.raises(TypeError, match="abstract"):
        Task()


@given(st.lists(st.integers(0, 2)))
def test_decoding_joins_symbols(ids):
    assert Vocabulary(("a", "bc", "|")).decode(ids) == "".join(["a", "bc", "|"][i] for i in ids)


@pytest.mark.parametrize("bad", [-1, 3])
def test_decoding_refuses_what_is_no_token(bad):
    with pytest.raises(ValueError, match=f"token id is {bad}; it must be from 0 to 2"):
        Vocabulary(("a", "b", "c")).decode([0, bad])
