"""Selective copy: drop the blanks, copy the rest in order."""

import string
from dataclasses import dataclass

import numpy as np

from posjax import checks
from posjax.tasks.base import Batch, Split, Task, Vocabulary, as_batch

__all__ = ["SelectiveCopy"]


@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(Task):
    """Copy the symbols that stand among blanks, and leave out the blanks.

    A sequence is `symbols` uniform symbols of an alphabet at uniformly random places among blanks,
    then a separator, then the answer: the symbols in their order. The model predicts the next
    token; loss and errors look at the answer alone. Other numbers of blanks than in training change
    how far a symbol stands from its place in the answer, while its rank among the symbols stays
    what it was. Guessing gives a token error of 1 - 1 / alphabet.

    The paper's sizes are blanks=256, dense_blanks=128, sparse_blanks=512. The defaults are smaller,
    for a CPU.

    References:
        Golovneva et al., Contextual Position Encoding: Learning to Count What's Important,
        arXiv:2405.18719.

    >>> task = SelectiveCopy(symbols=3, blanks=4)
    >>> example = task.example(0)
    >>> task.vocabulary.decode(example["inputs"])
    '..g..db|gd'
    >>> task.vocabulary.decode(example["targets"][example["scored"]])
    'gdb'
    """

    symbols: int = 16
    """How many symbols are to be copied."""
    alphabet: int = 8
    """How many different symbols there are."""
    blanks: int = 32
    """Blanks in a training sequence, and in the split in_distribution."""
    dense_blanks: int = 16
    """Blanks in the split dense."""
    sparse_blanks: int = 64
    """Blanks in the split sparse."""
    examples: int = 1024
    """Sequences in each evaluation split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        zero, one = checks.at_least(0), checks.at_least(1)
        checks.fields(
            self,
            symbols=one,
            alphabet=checks.at_least(2),
            blanks=zero,
            dense_blanks=zero,
            sparse_blanks=zero,
            examples=one,
        )

    @property
    def vocabulary(self) -> Vocabulary:
        """The alphabet, then the blank `.`, then the separator `|`."""
        letters = string.ascii_letters[: self.alphabet]
        letters += "".join(chr(0x100 + i) for i in range(self.alphabet - len(letters)))
        return Vocabulary((*letters, ".", "|"))

    @property
    def length(self) -> int:
        """Blanks, symbols, separator, and the answer without its last token, which is no input."""
        return self._length(self.blanks)

    @property
    def splits(self) -> dict[str, Split]:
        """The training density, fewer blanks, more blanks."""
        blanks = {
            "in_distribution": self.blanks,
            "dense": self.dense_blanks,
            "sparse": self.sparse_blanks,
        }
        return {
            name: Split(self.examples, self._length(n), f"{self.symbols} symbols among {n} blanks")
            for name, n in blanks.items()
        }

    def example(self, index: int, split: str = "train", seed: int = 0) -> Batch:
        """See `Task.example`; the last `symbols` positions are scored."""
        generator = self.generator(index, split, seed)
        length = self.length if split == "train" else self.splits[split].length
        places = length - self.symbols
        draws = generator.random(places + self.symbols)
        where = np.sort(np.argsort(draws[:places], kind="stable")[: self.symbols])
        answer = (draws[places:] * self.alphabet).astype(np.int32)
        tokens = np.full(places + 1 + self.symbols, self.alphabet, np.int32)
        tokens[where] = answer
        tokens[places] = self.alphabet + 1
        tokens[places + 1 :] = answer
        return as_batch(tokens[:-1], tokens[1:], scored=np.arange(length) >= places)

    def _length(self, blanks: int) -> int:
        return blanks + 2 * self.symbols
