"""Randomized positions: a sorted random subset of a greater range, in place of 0 ... n - 1."""

from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.encodings.alibi import ALiBi
from posjax.encodings.base import PositionEncoding
from posjax.encodings.learned import Learned
from posjax.encodings.rope import RoPE
from posjax.encodings.wrapper import Wrapper
from posjax.positions import (
    LengthError,
    random_subset_positions,
    sorted_subset,
    spread_positions,
)
from posjax.types import Array, Bool, Int, PyTree

__all__ = ["Randomized"]


class Drawn(NamedTuple):
    """The indices of `Randomized`, for its own later places."""

    outside: Bool[Array, "B T"]  # positions that have no number
    inner: tuple[PyTree, ...]  # the indices of the encoding inside, for each draw


class Randomized(Wrapper):
    """Draws positions anew in every step: n of 0 ... max_length - 1, sorted; order stays.

        p_0 < p_1 < ... < p_{n-1}     a random subset of {0, ..., max_length - 1}
        the encoding inside sees p_i in place of i

    So positions up to max_length are trained by sequences of any length n. One draw serves the
    whole batch, as in the official code; every packed segment has one number for each token
    (`posjax.positions.random_subset_positions`). The official code draws once for the network with
    absolute encodings, and anew in every layer (shared by query and key) with RoPE, ALiBi and
    relative ones: `draws` gives each layer its own. For ALiBi and relative encodings it draws
    distances, the same for every query; here distances are differences of the drawn positions.

    The official evaluation is random too. Here it is always the same, from `evaluation_seed`:
    "random"; or evenly spread ("spread"); or positions as they are ("plain").

    Numbers depend on the length n of the sequence. So feeding tokens one by one needs a length
    known before, `evaluation_length` (unless evaluation is "plain"); without, a carry raises
    NotImplementedError. Sequences longer than max_length (or evaluation_length, if given) raise
    `posjax.positions.LengthError`; positions beyond them give NaN inside `jax.jit`. Tested against
    a transcription in numpy.

    Args:
        encoding: the encoding inside.
        max_length: L, the range of the drawn positions; at least 1.
        draws: independent draws; layer l uses draw l mod draws. 1 is one for the network; the
            number of layers is one for each (their layers differ then, which `scan_layers`
            refuses).
        evaluation: positions outside training.
        evaluation_length: n outside training, at most max_length; None: that of each sequence.
        evaluation_seed: of the evaluation "random".
        draw: which draw the layer uses; set by `layer`.

    References:
        Ruoss et al., Randomized Positional Encodings Boost Length Generalization of Transformers,
        arXiv:2305.16843, section 3.

    >>> tokens, p = jnp.zeros((1, 4), jnp.int32), jnp.arange(4)[None]
    >>> encoding = Randomized(max_length=20, evaluation="spread")
    >>> encoding.apply({}, tokens, p, method="positions")[0].inner[0].tolist()
    [[0, 5, 10, 15]]
    """

    encoding: PositionEncoding = RoPE()
    max_length: int = 2048
    draws: int = 1
    evaluation: Literal["random", "spread", "plain"] = "random"
    evaluation_length: int | None = None
    evaluation_seed: int = 0
    draw: int = 0

    def __post_init__(self):
        checks.fields(
            self,
            max_length=checks.at_least(1),
            draws=checks.at_least(1),
            evaluation_length=checks.at_least(1),
        )
        checks.integer("Randomized draw", self.draw, low=0, high=self.draws - 1)
        length = self.evaluation_length
        fits = length is None or length <= self.max_length
        wanted = f"at most max_length = {self.max_length}, or None"
        checks.require("Randomized evaluation_length", length, fits, wanted)
        super().__post_init__()

    @classmethod
    def per_layer(cls) -> Self:
        """RoPE with a draw for each of 5 layers, as the authors train it."""
        return cls(draws=5)

    @classmethod
    def alibi(cls) -> Self:
        """ALiBi in the form of the authors' code, with a draw for each of 5 layers."""
        return cls(encoding=ALiBi.asymmetric(), draws=5)

    @classmethod
    def learned(cls) -> Self:
        """A trained table of 2048 rows, with one draw for the network."""
        return cls(encoding=Learned(max_length=2048))

    @property
    def beyond(self) -> str:
        """There is no position beyond max_length; plain positions are those of the inner one."""
        return self.encoding.beyond if self.evaluation == "plain" else "raises"

    @property
    def decodes(self) -> bool:
        """Whether decoding works without knowing the final length."""
        known = self.evaluation == "plain" or self.evaluation_length is not None
        return known and self.encoding.decodes

    def layer(self, index, layers):
        """The layer's draw, around the encoding's own form for the layer."""
        new = super().layer(index, layers)
        return new if self.draws == 1 else new.clone(parent=None, draw=index % self.draws)

    def positions(self, tokens, positions, carry=None, *, segment_ids=None, deterministic=True):
        """The inner indices at the drawn positions, for each draw."""
        mode = self.evaluation if deterministic else "random"
        length = self.evaluation_length if deterministic else None
        if carry is not None and mode != "plain" and length is None:
            needs = "positions depend on the length of the sequence, which a carry leaves open"
            raise NotImplementedError(f"Randomized: {needs}; set evaluation_length.")
        outside = jnp.zeros(positions.shape, bool)
        if mode != "plain":
            field = "max_length" if length is None else "evaluation_length"
            outside = self._outside(field, positions, carry is None and segment_ids is None)
        before = (None,) * self.draws if carry is None else carry[1]
        settings = {"segment_ids": segment_ids, "deterministic": deterministic}
        draws = self._drawn(mode, positions, length, not deterministic)
        results = [
            self.encoding.positions(tokens, drawn, own, **settings)
            for drawn, own in zip(draws, before, strict=True)
        ]
        indices, carries = zip(*results, strict=True)
        return Drawn(outside, indices), (_next(positions, carry), carries)

    def inner_indices(self, indices):
        """The inner indices at the positions of the layer's draw."""
        return indices.inner[self.draw]

    def rotate(self, query, key):
        """As the encoding inside, at the drawn positions; NaN for queries that have none."""
        outside = query.indices.outside[:, :, None, None]
        x = jnp.where(outside, jnp.asarray(jnp.nan, query.x.dtype), query.x)
        return super().rotate(query._replace(x=x), key)

    def _drawn(
        self, mode: str, positions: Array, length: int | None, training: bool
    ) -> list[Array]:
        """The positions of each draw."""
        if mode == "plain":
            return [positions] * self.draws
        if mode == "spread":
            return [spread_positions(positions, self.max_length, length)] * self.draws
        key = self.make_rng("encoding") if training else jax.random.key(self.evaluation_seed)
        keys = jax.random.split(key, self.draws)
        return [self._random(key, positions, length) for key in keys]

    def _random(self, key: Array, positions: Array, length: int | None) -> Int[Array, "B T"]:
        if length is None:
            return random_subset_positions(key, positions, self.max_length)
        return sorted_subset(key, length, self.max_length).at[positions].get(mode="clip")

    def _outside(self, field: str, positions: Array, is_whole: bool) -> Bool[Array, "B T"]:
        """Which positions have no number; raises if they are known."""
        limit, length = getattr(self, field), positions.shape[1]
        if is_whole and length > limit:
            raise LengthError(f"Randomized {field} is {limit}; the sequence has {length} tokens.")
        outside = (positions < 0) | (positions >= limit)
        if not isinstance(outside, jax.core.Tracer) and np.any(outside):
            wrong = np.asarray(positions)[np.asarray(outside)][0]
            raise LengthError(f"Randomized {field} is {limit}; there is no position {wrong}.")
        return outside


def _next(positions: Array, carry: PyTree) -> Int[Array, "B"]:
    """The position after the last one."""
    if 0 in positions.shape:
        return jnp.zeros_like(positions, shape=positions.shape[:1]) if carry is None else carry[0]
    return positions[:, -1] + 1
