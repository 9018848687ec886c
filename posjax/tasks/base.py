"""The contract of a task: vocabulary, examples addressed by index, evaluation splits, metrics."""

import abc
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.types import Array, Float

__all__ = [
    "Batch",
    "Metrics",
    "Split",
    "Task",
    "Vocabulary",
    "as_batch",
]

# The arrays of one example, [T], or of a batch of them, [B, T]:
#   inputs        int32    what the model reads
#   targets       int32    the token to predict at each position; any id where nothing is asked
#   loss_weights  float32  weight of each position in the training loss
#   scored        bool     positions that the metrics look at
Batch = dict[str, Any]

Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a task; the id of a token is its place in `symbols`.

    >>> Vocabulary(("a", "b", "|")).decode([0, 2, 1])
    'a|b'
    """

    symbols: tuple[str, ...]

    def __post_init__(self):
        checks.fields(self)
        wanted = "a tuple of one or more strings"
        checks.require("Vocabulary symbols", self.symbols, len(self.symbols) > 0, wanted)

    @property
    def size(self) -> int:
        """The number of tokens, V."""
        return len(self.symbols)

    def decode(self, ids: Iterable[int]) -> str:
        """Writes token ids as text.

        Raises:
            ValueError: an id is no token.
        """
        is_sequence = isinstance(ids, Iterable) and not isinstance(ids, str)
        array = np.asarray(ids if hasattr(ids, "dtype") or not is_sequence else list(ids))
        holds = array.ndim == 1 and (array.size == 0 or np.issubdtype(array.dtype, np.integer))
        checks.require("ids", ids, holds, "a sequence of token ids")
        wrong = (array < 0) | (array >= self.size)
        if wrong.any():
            checks.integer("token id", int(array[wrong][0]), low=0, high=self.size - 1)
        return self._join(array.tolist())

    def _join(self, ids: list[int]) -> str:
        return "".join(self.symbols[i] for i in ids)


@dataclass(frozen=True)
class Split:
    """One evaluation set of a task: `size` examples of `length` input tokens."""

    size: int
    length: int
    description: str


@dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """Data to train a model on, and how it is scored.

    A task is a frozen dataclass: its fields are its settings, in config files and on the command
    line. A new task is one module in this folder with one subclass, which gives `vocabulary`,
    `length`, `splits` and `example`. The rest has defaults: errors of the scored tokens, and no
    baselines.

    Examples are a pure function of (settings, split, seed, index): the same arguments give the same
    bits on every machine and in every order. So training data is fresh at every index, has no
    epochs, and resumes anywhere. Evaluation data has its own seed, so all runs are scored on the
    same sequences.

    Raises:
        ValueError: a setting is out of its range; raised when the task is made.
    """

    evaluation_seed: int = 0
    """Seed of the evaluation data; not the training seed, so all runs see the same sequences."""

    primary: ClassVar[str] = "token_error"
    """The metric that is shown first and drawn; smaller is better."""

    def __post_init__(self) -> None:
        checks.fields(self, evaluation_seed=checks.between(0, 2**64 - 1))

    @property
    @abc.abstractmethod
    def vocabulary(self) -> Vocabulary:
        """The tokens."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """T, the number of input tokens of a training example."""

    @property
    @abc.abstractmethod
    def splits(self) -> dict[str, Split]:
        """The evaluation sets by name, in the order of display. "train" is not among them."""

    @abc.abstractmethod
    def example(self, index: int, split: str = "train", seed: int = 0) -> Batch:
        """Example number `index` of `split`, as numpy arrays of shape [T] (see `Batch`).

        Args:
            index: from 0; without end for "train", below the split's size otherwise.
            split: "train" or a name in `splits`.
            seed: of the training data; evaluation splits take `evaluation_seed` instead.

        Raises:
            ValueError: no such split or index.
        """

    def metrics(self, logits: Float[Array, "B T V"], batch: Batch) -> Metrics:
        """Sums and counts of each metric over a batch; a pooled metric is total sum / total count.

        The default is two errors of the most likely token under teacher forcing: `token_error`,
        wrong scored tokens / scored tokens, and `sequence_error`, sequences with a wrong token /
        sequences with a scored one. A row without scored tokens (padding) counts for nothing.

        Returns:
            (sum, count) by name, float32 scalars.
        """
        scored = batch["scored"]
        wrong = scored & (jnp.argmax(logits, axis=-1) != batch["targets"])
        return {
            "token_error": (_count(wrong), _count(scored)),
            "sequence_error": (_count(jnp.any(wrong, -1)), _count(jnp.any(scored, -1))),
        }

    def derive(self, pooled: dict[str, float]) -> dict[str, float]:
        """The metrics to report, from the pooled ones; the default reports them as they are."""
        return pooled

    def baselines(self) -> dict[str, dict[str, dict[str, float]]]:
        """Results of reference methods: name -> split -> metric -> value; none by default."""
        return {}

    def generator(self, index: int, split: str, seed: int) -> np.random.Generator:
        """The random numbers of an example: Philox with key (seed, crc32(split)), counter `index`.

        Streams of different arguments never overlap. Draw with `.random()` only: other methods of
        numpy's generator may change from version to version, and the data with them.

        Raises:
            ValueError: no such split, index or seed.
        """
        size = 2**64
        if split != "train":
            size, seed = self._split(split).size, self.evaluation_seed
        checks.integer(f"index in split {split!r}", index, low=0, high=size - 1)
        checks.integer("seed", seed, low=0, high=2**64 - 1)
        key = np.array([seed, zlib.crc32(split.encode())], np.uint64)
        counter = np.array([0, 0, 0, index], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def _split(self, name: str) -> Split:
        splits = self.splits
        checks.choice("split", name, ("train", *splits))
        return splits[name]


def _count(values: Array) -> Float[Array, ""]:
    return jnp.sum(values, dtype=jnp.float32)


@checks.arguments()
def as_batch(
    inputs: np.ndarray, targets: np.ndarray, scored: np.ndarray, loss: np.ndarray | None = None
) -> Batch:
    """An example in the types of `Batch`; without `loss`, its weights are those of `scored`."""
    return {
        "inputs": np.asarray(inputs, np.int32),
        "targets": np.asarray(targets, np.int32),
        "loss_weights": np.asarray(scored if loss is None else loss, np.float32),
        "scored": np.asarray(scored, np.bool_),
    }
