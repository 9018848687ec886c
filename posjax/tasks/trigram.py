"""A smoothed byte trigram model: what counting alone can predict."""

from dataclasses import dataclass

import numpy as np

from posjax import checks

__all__ = ["Trigram"]

_CHUNK = 2**23


@dataclass(frozen=True, eq=False)
class Trigram:
    """Interpolated Witten-Bell trigrams of bytes.

    With n the count of a context's continuations, and d the number of different ones:

        p(z | x y) = (n(x y z) + d(x y) p(z | y)) / (n(x y) + d(x y)),
        p(z | y)   = (n(y z) + d(y) p(z)) / (n(y) + d(y)),
        p(z)       = (n(z) + d / 256) / (n + d),

    and a context that was never seen leaves all to the shorter one. There is nothing to tune.

    References:
        Witten and Bell, The Zero-Frequency Problem: Estimating the Probabilities of Novel Events in
        Adaptive Text Compression, IEEE Transactions on Information Theory 37(4), 1991, method C.

    >>> trigram = Trigram.fit(np.frombuffer(b"abcabcabd", np.uint8))
    >>> window = np.frombuffer(b"abc", np.uint8)[None]
    >>> np.exp(-trigram.nats(window[:, :-1], window[:, 1:])).round(3).tolist()
    [[0.808, 0.585]]
    """

    counts: np.ndarray  # [65536, 256], n(x y z)
    bigrams: np.ndarray  # [256, 256], p(z | y)

    def __post_init__(self):
        for name, rows, kind in (("counts", 256**2, np.integer), ("bigrams", 256, np.floating)):
            checks.shape(f"Trigram {name}", getattr(self, name), (rows, 256))
            checks.dtype(f"Trigram {name}", getattr(self, name), kind)

    @classmethod
    def fit(cls, data: np.ndarray) -> "Trigram":
        """Counts the trigrams, bigrams and bytes of `data` (uint8, one axis)."""
        checks.shape("data", data, ("bytes",))
        checks.dtype("data", data, (np.dtype(np.uint8),))
        counts = np.zeros(256**3, np.int64)
        for start in range(0, max(data.size - 2, 0), _CHUNK):
            chunk = data[start : start + _CHUNK + 2].astype(np.int32)
            counts += np.bincount(_code(chunk[:-2], chunk[1:-1], chunk[2:]), minlength=256**3)
        pairs = np.zeros(256**2, np.int64)
        for start in range(0, max(data.size - 1, 0), _CHUNK):
            chunk = data[start : start + _CHUNK + 1].astype(np.int32)
            pairs += np.bincount(_code(chunk[:-1], chunk[1:]), minlength=256**2)
        singles = np.bincount(data, minlength=256)
        unigrams = _interpolate(singles, np.full(256, 1 / 256))
        bigrams = _interpolate(pairs.reshape(256, 256), unigrams)
        return cls(counts.reshape(256**2, 256), bigrams)

    def nats(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """-log p(target) at each position of windows [B, T], given their inputs up to there.

        What stands before a window is not known to it: the bigram predicts its first target.

        Returns:
            float64, in the shape of `targets`.

        Raises:
            ValueError: arrays of other shapes, or of other numbers than bytes.
        """
        checks.shape("inputs", inputs, ("batch", "length"))
        checks.shape("targets", targets, inputs.shape)
        for name, x in (("inputs", inputs), ("targets", targets)):
            checks.dtype(name, x, np.integer)
            wanted = "bytes, from 0 to 255"
            checks.require(name, x, x.size == 0 or 0 <= x.min() <= x.max() <= 255, wanted)
        context = _code(inputs[:, :-1].astype(np.int32), inputs[:, 1:])
        seen, which = np.unique(context, return_inverse=True)
        table = _interpolate(self.counts[seen], self.bigrams[seen % 256])
        probability = self.bigrams[inputs, targets]
        probability[:, 1:] = table[which.reshape(context.shape), targets[:, 1:]]
        return -np.log(probability)


def _code(first: np.ndarray, *rest: np.ndarray) -> np.ndarray:
    """Bytes as the digits of one number."""
    for digit in rest:
        first = first * 256 + digit
    return first


def _interpolate(counts: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """(n + d * shorter) / (sum n + d) over the last axis, and `shorter` where nothing was seen."""
    total = counts.sum(-1, keepdims=True)
    different = (counts > 0).sum(-1, keepdims=True)
    smoothed = (counts + different * shorter) / np.maximum(total + different, 1)
    return np.where(total > 0, smoothed, shorter)
