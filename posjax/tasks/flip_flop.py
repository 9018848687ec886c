"""Flip-flop language modelling: remember the last bit written."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from posjax import checks
from posjax.tasks.base import (
    Batch,
    Split,
    Task,
    Vocabulary,
    as_batch,
)

__all__ = ["FlipFlop"]

_WRITE, _READ, _IGNORE, _ZERO = 0, 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class FlipFlop(Task):
    """The flip-flop language FFL(p_ignore): after a read comes the bit of the most recent write.

    A string of `length` tokens alternates instruction and bit. The first instruction is w (write),
    the last is r (read), and those between are independent: i (ignore) with probability p_ignore, w
    and r with (1 - p_ignore) / 2 each. Bits after w and i are uniform.

    The inputs are the whole string, so T is `length`. Nothing follows the last bit: its position
    has weight 0. Scored are the positions whose input is r, so `token_error` is the benchmark's
    glitch rate: wrong bits / reads, pooled over all reads of a split. It has the name that the
    error of scored tokens has in every task, because it is the same function.

    References:
        Liu et al., Exposing Attention Glitches with Flip-Flop Language Modeling, arXiv:2306.00946.

    >>> task = FlipFlop(length=16)
    >>> example = task.example(0)
    >>> task.vocabulary.decode(example["inputs"])
    'w1i1i1w0i0i1i1r0'
    >>> task.vocabulary.decode(example["targets"][example["scored"]])
    '0'
    """

    length: int = 512
    """Tokens of a string, two for each instruction; even."""
    p_ignore: float = 0.8
    """Probability of an ignore in training, and in the split in_distribution."""
    sparse_p_ignore: float = 0.98
    """Probability of an ignore in the split sparse."""
    dense_p_ignore: float = 0.1
    """Probability of an ignore in the split dense."""
    loss: Literal["clean", "full"] = "clean"
    """clean: train on the bits after reads; full: on all tokens, unpredictable ones too."""
    examples: int = 1024
    """Sequences in each evaluation split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        share = checks.between(0, 1)
        checks.fields(
            self,
            length=checks.Limits(low=4, multiple_of=2),
            p_ignore=share,
            sparse_p_ignore=share,
            dense_p_ignore=share,
            examples=checks.at_least(1),
        )

    @property
    def vocabulary(self) -> Vocabulary:
        """The five tokens w, r, i, 0, 1."""
        return Vocabulary(("w", "r", "i", "0", "1"))

    @property
    def splits(self) -> dict[str, Split]:
        """The training distribution, more instructions that matter, fewer of them."""
        return {
            name: Split(self.examples, self.length, f"FFL({p})")
            for name, p in self._p_ignore().items()
            if name != "train"
        }

    def example(self, index: int, split: str = "train", seed: int = 0) -> Batch:
        """See `Task.example`; the positions of reads are scored."""
        generator = self.generator(index, split, seed)
        p_ignore = self._p_ignore()[split]
        kind, bit = generator.random((2, self.length // 2))
        instructions = np.where(kind < p_ignore + (1 - p_ignore) / 2, _WRITE, _READ)
        instructions[kind < p_ignore] = _IGNORE
        instructions[0], instructions[-1] = _WRITE, _READ
        bits = (bit < 0.5).astype(np.int32)
        steps = np.arange(len(bits))
        last_write = np.maximum.accumulate(np.where(instructions == _WRITE, steps, 0))
        bits = np.where(instructions == _READ, bits[last_write], bits)

        tokens = np.stack([instructions, _ZERO + bits], axis=1).reshape(-1)
        scored = tokens == _READ
        loss = scored if self.loss == "clean" else np.arange(self.length) < self.length - 1
        return as_batch(tokens, np.append(tokens[1:], _ZERO), scored, loss)

    def _p_ignore(self) -> dict[str, float]:
        return {
            "train": self.p_ignore,
            "in_distribution": self.p_ignore,
            "dense": self.dense_p_ignore,
            "sparse": self.sparse_p_ignore,
        }
