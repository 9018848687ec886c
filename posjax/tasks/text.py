"""Language modelling of text, byte by byte."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.tasks.base import Batch, Metrics, Split, Task, Vocabulary, as_batch
from posjax.tasks.corpus import Corpus, load_corpus
from posjax.tasks.trigram import Trigram
from posjax.types import Array, Float

__all__ = ["Text"]

# Lengths of evaluation windows in halves of the training length.
_HALVES = {"1x": 2, "1.5x": 3, "2x": 4, "2.5x": 5}


@dataclass(frozen=True)
class _Bytes(Vocabulary):
    """The 256 bytes; text is decoded as UTF-8."""

    symbols: tuple[str, ...] = tuple(chr(i) for i in range(256))

    def _join(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@dataclass(frozen=True, kw_only=True)
class Text(Task):
    """Predict the next byte of real text, in windows up to 2.5 times as long as in training.

    A training example is a window of `length` bytes at a random place of the training bytes. Files
    are held out whole, see `posjax.tasks.corpus.load_corpus`; a single file is cut in two. The
    splits 1x, 1.5x, 2x and 2.5x predict exactly the same held-out bytes, in windows of 1, 1.5, 2
    and 2.5 times the training length that follow each other without overlap. The last window of a
    split is filled up with zero bytes, which have weight 0 and are not scored.

    Metrics: bits_per_byte, the mean of -log2 p(byte), and perplexity = 2 ** bits_per_byte, so per
    byte too. `baselines` gives both for a byte trigram model counted on the same training bytes.

    Settings are checked when the task is made, files when they are first needed.

    >>> Text().derive({"nats": float(np.log(2))})
    {'bits_per_byte': 1.0, 'perplexity': 2.0}
    """

    path: tuple[str, ...] = ()
    """Files and folders to read. None: the source code of this Python's standard library."""
    suffixes: tuple[str, ...] = ()
    """Only files of folders whose names end so, such as .py or .md; none: every file."""
    length: int = 256
    """Bytes of a training window; even."""
    validation_fraction: float = 0.1
    """Share of the bytes that is held out, in whole files."""
    validation_bytes: int = 200_000
    """At most so many of the held-out bytes are evaluated."""

    primary: ClassVar[str] = "bits_per_byte"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fields(
            self,
            length=checks.Limits(low=2, multiple_of=2),
            validation_fraction=checks.Limits(above=0, below=1),
        )
        for name in ("path", "suffixes"):
            value = getattr(self, name)
            are_names = isinstance(value, tuple) and all(isinstance(v, str) and v for v in value)
            checks.require(f"Text {name}", value, are_names, "a tuple of strings, none empty")
        checks.integer("Text validation_bytes", self.validation_bytes, low=self._longest + 1)

    @property
    def vocabulary(self) -> Vocabulary:
        """The 256 bytes."""
        return _Bytes()

    @property
    def splits(self) -> dict[str, Split]:
        """The same held-out bytes in windows of 1, 1.5, 2 and 2.5 times the training length."""
        predicted = self._validation.size - 1
        splits = {}
        for name, halves in _HALVES.items():
            length = self.length // 2 * halves
            text = f"{predicted} held-out bytes in windows of {length}"
            splits[name] = Split(-(-predicted // length), length, text)
        return splits

    def example(self, index: int, split: str = "train", seed: int = 0) -> Batch:
        """See `Task.example`; every byte is scored."""
        generator = self.generator(index, split, seed)
        if split == "train":
            length, data = self.length, self.corpus.train
            start = int(generator.random() * (data.size - length))
        else:
            length, data = self.splits[split].length, self._validation
            start = index * length
        window = np.zeros(length + 1, np.int32)
        found = data[start : start + length + 1]
        window[: found.size] = found
        return as_batch(window[:-1], window[1:], scored=np.arange(length) < found.size - 1)

    def metrics(self, logits: Float[Array, "B T V"], batch: Batch) -> Metrics:
        """See `Task.metrics`: `nats`, the sum of -log p(byte) in float32."""
        logits, scored = logits.astype(jnp.float32), batch["scored"]
        chosen = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - chosen
        total = jnp.sum(jnp.where(scored, nats, jnp.zeros_like(nats)))
        return {"nats": (total, jnp.sum(scored, dtype=jnp.float32))}

    def derive(self, pooled: dict[str, float]) -> dict[str, float]:
        """bits_per_byte = nats / log 2, and perplexity = exp(nats)."""
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(np.float64(pooled["nats"])))
        return {"bits_per_byte": float(pooled["nats"] / np.log(2)), "perplexity": perplexity}

    def baselines(self) -> dict[str, dict[str, dict[str, float]]]:
        """A smoothed byte trigram on the same windows; seconds to count, once for all splits."""
        trigram = Trigram.fit(self.corpus.train)
        return {"byte trigram": {name: self._evaluate(trigram, name) for name in self.splits}}

    def _evaluate(self, trigram: Trigram, split: str) -> dict[str, float]:
        examples = [self.example(index, split) for index in range(self.splits[split].size)]
        whole = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        nats = trigram.nats(whole["inputs"], whole["targets"])[whole["scored"]]
        return self.derive({"nats": float(nats.mean())})

    @cached_property
    def corpus(self) -> Corpus:
        """The bytes and their files, read once for each task object.

        Raises:
            ValueError: a path is missing or empty, or there is too little text for the lengths.
        """
        corpus = load_corpus(self.path, self.suffixes, self.validation_fraction)
        self._check_size("training", corpus.train.size, self.length)
        self._check_size("held-out", corpus.validation.size, self._longest)
        return corpus

    def _check_size(self, part: str, size: int, window: int) -> None:
        name = f"number of {part} bytes in path {self.path!r}"
        wanted = f"above {window} with length = {self.length}: give more text, or a smaller length"
        checks.require(name, size, size > window, wanted)

    @property
    def _validation(self) -> np.ndarray:
        return self.corpus.validation[: self.validation_bytes]

    @property
    def _longest(self) -> int:
        return self.length // 2 * max(_HALVES.values())

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone: a copy in another process reads the corpus itself."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
