import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posjax.tasks import Text, Vocabulary
from posjax.tasks.base import as_batch

LENGTH = 16


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        (tmp_path / f"{number}.txt").write_bytes(bytes(range(number, number + 200)))
    return tmp_path


def windows(task: Text, split: str) -> list[dict]:
    return [task.example(i, split) for i in range(task.splits[split].size)]


def test_splits_predict_the_same_bytes_in_order(folder):
    task = Text(path=(str(folder),), length=LENGTH, validation_fraction=0.3)
    held_out = task.corpus.validation
    assert held_out.size == 600
    for (name, split), length in zip(task.splits.items(), (16, 24, 32, 40), strict=True):
        assert split.length == length
        examples = windows(task, name)
        predicted = np.concatenate([e["targets"][e["scored"]] for e in examples])
        assert np.array_equal(predicted, held_out[1:])
        given = np.concatenate([e["inputs"][e["scored"]] for e in examples])
        assert np.array_equal(given, held_out[:-1])
        assert all(np.array_equal(e["loss_weights"], e["scored"]) for e in examples)


@pytest.mark.parametrize("limit", [41, 80, 81, 82])
def test_evaluation_is_bounded(folder, limit):
    task = Text(path=(str(folder),), length=LENGTH, validation_fraction=0.3, validation_bytes=limit)
    for name in task.splits:
        assert sum(e["scored"].sum() for e in windows(task, name)) == limit - 1


def test_training_windows_are_anywhere_in_the_training_bytes(tmp_path):
    (tmp_path / "one").write_bytes(bytes(range(100)))
    task = Text(path=(str(tmp_path / "one"),), length=8, validation_fraction=0.4)
    examples = [task.example(i) for i in range(1000)]
    starts = np.array([e["inputs"][0] for e in examples])
    assert sorted(set(starts)) == list(range(52))
    steps = np.arange(8)
    assert all(np.array_equal(e["inputs"], e["inputs"][0] + steps) for e in examples)
    assert all(np.array_equal(e["targets"], e["inputs"] + 1) for e in examples)
    assert all(e["scored"].all() for e in examples)


def test_bytes_are_decoded_as_utf8():
    vocabulary = Text().vocabulary
    assert isinstance(vocabulary, Vocabulary)
    assert vocabulary.size == 256
    assert vocabulary.decode("Grüße, 世界\n".encode()) == "Grüße, 世界\n"
    assert vocabulary.decode([0xFF, 65]) == "\N{REPLACEMENT CHARACTER}A"


def test_nats_by_hand():
    probabilities = np.full((2, 3, 256), 0.25 / 255, np.float32)
    probabilities[..., 7] = 0.75
    targets = np.array([[7, 7, 1], [7, 1, 1]])
    batch = as_batch(targets, targets, np.array([[1, 1, 1], [1, 0, 0]]))
    logits = jnp.log(probabilities) + 100
    total, count = jax.jit(Text().metrics)(logits, batch)["nats"]
    assert count == 4
    np.testing.assert_allclose(total, -3 * math.log(0.75) - math.log(0.25 / 255), rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_padding_does_not_poison_the_sum(value):
    targets = np.zeros((2, 3), int)
    logits = np.zeros((2, 3, 256), np.float32)
    logits[1] = value
    batch = as_batch(targets, targets, np.array([[1, 1, 1], [0, 0, 0]]))
    total, _ = Text().metrics(jnp.asarray(logits, jnp.bfloat16), batch)["nats"]
    np.testing.assert_allclose(total, 3 * math.log(256), rtol=1e-6)


@given(st.floats(0, 20))
def test_bits_and_perplexity(nats):
    result = Text().derive({"nats": nats})
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2))
    assert result["perplexity"] == pytest.approx(2 ** result["bits_per_byte"])


def test_divergence_is_reported_as_infinite():
    assert Text().derive({"nats": 1e4})["perplexity"] == math.inf


def test_baseline_is_evaluated_on_the_same_bytes(folder):
    task = Text(path=(str(folder),), length=LENGTH, validation_fraction=0.3)
    (name, table), *rest = task.baselines().items()
    assert (name, rest) == ("byte trigram", [])
    assert list(table) == list(task.splits)
    for result in table.values():
        assert set(result) == {"bits_per_byte", "perplexity"}
        assert 0 < result["bits_per_byte"] < 2
    longer = [table[split]["bits_per_byte"] for split in task.splits]
    assert longer == sorted(longer, reverse=True)


def test_pickles_and_hashes_hold_the_settings_alone(folder):
    task = Text(path=(str(folder),), length=LENGTH)
    before = hash(task)
    assert task.corpus.train.size > 1000
    assert hash(task) == before
    data = pickle.dumps(task)
    assert len(data) < 500
    copy = pickle.loads(data)
    assert copy == task
    assert np.array_equal(copy.example(3)["inputs"], task.example(3)["inputs"])


def test_the_corpus_is_read_once_and_late(folder, monkeypatch):
    task = Text(path=(str(folder),), length=LENGTH)
    assert Text(path=("nowhere",)).length == 256
    first = task.corpus
    monkeypatch.setattr("posjax.tasks.text.load_corpus", None)
    assert task.corpus is first
    assert task.example(0)["inputs"].shape == (LENGTH,)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (399, "number of held-out bytes .* is 39; it must be above 40 with length = 16"),
        (409, "held-out .* is 40"),
        (410, None),
    ],
)
def test_too_little_to_evaluate(tmp_path, size, words):
    (tmp_path / "a").write_bytes(b"x" * size)
    task = Text(path=(str(tmp_path / "a"),), length=16)
    if words is None:
        assert task.splits["2.5x"].size == 1
        return
    with pytest.raises(ValueError, match=words) as error:
        _ = task.splits
    assert str(tmp_path / "a") in str(error.value)


def test_too_little_to_train(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    task = Text(path=(str(tmp_path),), length=16, validation_fraction=0.9)
    with pytest.raises(ValueError, match=r"number of training bytes .* is 10; it must be above 16"):
        task.example(0)


def test_default_text_is_the_standard_library():
    task = Text()
    assert task.corpus.train.size > 1_000_000
    assert task.corpus.validation.size > 200_000
    sizes = {name: split.size * split.length for name, split in task.splits.items()}
    assert all(199_999 <= size < 199_999 + 640 for size in sizes.values())
    text = task.vocabulary.decode(task.corpus.train)
    assert "def " in text
