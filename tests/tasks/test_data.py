import itertools

import grain
import numpy as np
import pytest

from posjax.tasks import FlipFlop, SelectiveCopy
from posjax.tasks.data import split_batches, train_dataset

TASK = FlipFlop(length=16)


def take(iterator, number: int) -> list[dict]:
    return list(itertools.islice(iterator, number))


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key]) for key in a)
        assert all(a[key].dtype == b[key].dtype for key in a)


def test_batch_k_holds_its_examples():
    batches = take(train_dataset(TASK, batch_size=3, seed=7), 4)
    for step, batch in enumerate(batches):
        examples = [TASK.example(3 * step + row, seed=7) for row in range(3)]
        stacked = {key: np.stack([e[key] for e in examples]) for key in examples[0]}
        assert_equal([batch], [stacked])


def test_the_seed_makes_the_data():
    one, same, other = (take(train_dataset(TASK, batch_size=2, seed=s), 3) for s in (1, 1, 2))
    assert_equal(one, same)
    assert not np.array_equal(one[0]["inputs"], other[0]["inputs"])


def test_training_data_does_not_repeat():
    batches = take(train_dataset(SelectiveCopy(), batch_size=8, seed=0), 40)
    rows = np.concatenate([batch["inputs"] for batch in batches])
    assert len(np.unique(rows, axis=0)) == 320


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_resuming_is_exact(stop):
    whole = take(train_dataset(TASK, batch_size=4, seed=0), 9)
    first = iter(train_dataset(TASK, batch_size=4, seed=0))
    take(first, stop)
    state = first.get_state()
    assert_equal(take(first, 2), whole[stop : stop + 2])
    second = iter(train_dataset(TASK, batch_size=4, seed=0))
    take(second, 3)
    second.set_state(state)
    assert_equal(take(second, 4), whole[stop : stop + 4])
    assert isinstance(second, grain.DatasetIterator)


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_shares_of_the_processes_are_the_global_batch(processes):
    whole = take(train_dataset(TASK, batch_size=6, seed=1), 3)
    shares = [
        take(train_dataset(TASK, batch_size=6, seed=1, process_index=p, process_count=processes), 3)
        for p in range(processes)
    ]
    joined = [
        {key: np.concatenate([share[key] for share in step]) for key in step[0]}
        for step in zip(*shares, strict=True)
    ]
    assert_equal(joined, whole)


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (8, 4), (3, 4), (1, 1)])
def test_split_batches_cover_the_split_once(size, batch_size):
    task = FlipFlop(length=16, examples=size)
    batches = list(split_batches(task, "dense", batch_size=batch_size))
    assert all(b["inputs"].shape == (batch_size, 16) for b, _ in batches)
    assert sum(valid for _, valid in batches) == size
    rows = np.concatenate([batch["inputs"][:valid] for batch, valid in batches])
    assert np.array_equal(rows, [task.example(i, "dense")["inputs"] for i in range(size)])
    for batch, valid in batches:
        assert batch["scored"][:valid].any(-1).all()
        assert not batch["scored"][valid:].any()
        assert not batch["loss_weights"][valid:].any()
        assert batch["scored"].dtype == bool


@pytest.mark.parametrize(("limit", "valid"), [(1, [1]), (4, [4]), (5, [4, 1]), (99, [4, 4, 2])])
def test_split_batches_can_be_fewer(limit, valid):
    task = FlipFlop(length=16, examples=10)
    batches = split_batches(task, "sparse", batch_size=4, limit=limit)
    assert [number for _, number in batches] == valid


def test_metrics_do_not_depend_on_the_batch_size():
    task = SelectiveCopy(examples=7)
    logits = np.random.default_rng(0).normal(size=(7, 64, 10)).astype(np.float32)
    pooled = []
    for batch_size in (7, 4, 2):
        total, start = 0, 0
        for batch, valid in split_batches(task, "in_distribution", batch_size=batch_size):
            rows = np.zeros((batch_size, 64, 10), np.float32)
            rows[:valid] = logits[start : start + valid]
            start += valid
            sums = task.metrics(rows, batch)
            total = total + np.array([[float(x) for x in pair] for pair in sums.values()])
        pooled.append(total.tolist())
    assert pooled[0] == pooled[1] == pooled[2]
    assert pooled[0][0][1] == 7 * 16
    assert pooled[0][1][1] == 7
