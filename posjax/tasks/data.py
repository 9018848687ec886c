"""Feeding tasks to a training loop, with Grain."""

from collections.abc import Iterator
from dataclasses import dataclass

import grain
import numpy as np

from posjax import checks
from posjax.tasks.base import Batch, Task

__all__ = ["split_batches", "train_dataset"]

# Examples are cheap, and the processor has a model to train: a few batches ahead are enough.
_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)

# Data does not end; Grain wants a number.
_EXAMPLES = 2**48


@dataclass(frozen=True)
class _Example:
    """Maps the number of an example in a process's share to the example of the global stream."""

    task: Task
    seed: int
    first: int
    rows: int
    batch_size: int

    def __call__(self, local: int) -> Batch:
        step, row = divmod(int(local), self.rows)
        return self.task.example(step * self.batch_size + self.first + row, seed=self.seed)


@checks.arguments(batch_size=checks.size(), process_count=checks.at_least(1))
def train_dataset(
    task: Task, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset:
    """Training batches without end: batch k holds the examples k * batch_size + [0, batch_size).

    An element is a pure function of (task, seed, k). Iterators resume exactly with `get_state` and
    `set_state`. Each process reads its own rows; the shares in the order of the processes are the
    global batch.

    Args:
        batch_size: sequences over all processes together.

    Returns:
        A dataset of batches (`posjax.tasks.base.Batch`) of shape [batch_size / process_count, T].

    Raises:
        ValueError: numbers that do not fit, or a task that cannot make its first example.

    >>> from posjax.tasks import FlipFlop
    >>> dataset = train_dataset(FlipFlop(length=8), batch_size=4, seed=0)
    >>> next(iter(dataset))["inputs"].shape
    (4, 8)
    """
    checks.integer("process_index", process_index, low=0, high=process_count - 1)
    wanted = f"a multiple of process_count = {process_count}"
    checks.require("batch_size", batch_size, batch_size % process_count == 0, wanted)
    task.example(0, seed=seed)  # What cannot be read is reported here, not from a thread.
    rows = batch_size // process_count
    example = _Example(task, seed, process_index * rows, rows, batch_size)
    dataset = grain.MapDataset.range(_EXAMPLES).map(example).batch(rows, drop_remainder=True)
    return dataset.to_iter_dataset(_READ)


@checks.arguments(batch_size=checks.size(), limit=checks.at_least(1))
def split_batches(
    task: Task, split: str, *, batch_size: int, limit: int | None = None
) -> Iterator[tuple[Batch, int]]:
    """The batches of an evaluation split in order, all of one shape.

    Args:
        limit: at most so many examples.

    Yields:
        A batch of shape [batch_size, T], and the number of its examples. The last batch is filled
        up with rows of zeros, which have no weight and are not scored.

    Raises:
        ValueError: no such split, or numbers below 1.
    """
    checks.choice("split", split, task.splits)
    size = min(task.splits[split].size, limit or task.splits[split].size)
    return _batches(task, split, size, batch_size)


def _batches(task: Task, split: str, size: int, batch_size: int) -> Iterator[tuple[Batch, int]]:
    for start in range(0, size, batch_size):
        examples = [task.example(i, split) for i in range(start, min(start + batch_size, size))]
        batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        padding = batch_size - len(examples)
        yield {k: np.pad(v, ((0, padding), (0, 0))) for k, v in batch.items()}, len(examples)
