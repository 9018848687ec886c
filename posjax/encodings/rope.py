"""Rotary Position Embedding (RoPE): query and key are turned by angles that grow with position."""

from typing import Self

import jax.numpy as jnp

from posjax import checks
from posjax.encodings.rotary import Layout, Rotary, Turn, lengths, turn
from posjax.frequencies import (
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    NTKAware,
    Scaling,
    YaRN,
    rope_frequencies,
)
from posjax.types import Array, Num

__all__ = ["RoPE", "rope_turn", "rotate"]


@checks.arguments(base=checks.above(1), fraction=checks.Limits(above=0, high=1))
def rotate(
    x: Num[Array, "B T N H"],
    positions: Num[Array, "#B T"],
    *,
    base: float = 10_000.0,
    fraction: float = 1.0,
    layout: Layout = "half",
    scaling: Scaling | None = None,
    length: Num[Array, "#B"] | None = None,
) -> Num[Array, "B T N H"]:
    """Turns pairs of channels by angles proportional to the position (`rotary.turn`).

        angle_m = position * base^(-2m / R)                R = fraction * H,  m = 0 ... R / 2 - 1

    The score of a query at i and a key at j then depends on i - j only. Angles are float32, so that
    of position p is right to about p * 1e-7 radians.

    Args:
        base: greater than 1.
        fraction: the first R = int(fraction * H) channels are turned, with a full spectrum of
            frequencies; the others stay. R must be even.
        scaling: changes the frequencies, see `posjax.frequencies`.
        length: for scalings that depend on it; give query and key the same. None: the `lengths` of
            these positions.

    Returns:
        An array like x, in x's dtype.

    Raises:
        ValueError: R is odd or 0.

    >>> rotate(jnp.ones((1, 1, 1, 2)), jnp.array([[0]])).tolist()
    [[[[1.0, 1.0]]]]
    """
    of_x = rope_turn(positions, x.shape[-1], base, fraction, scaling, length)
    return turn(x, *of_x, layout=layout)


@checks.arguments(
    head_size=checks.size(),
    base=checks.above(1),
    fraction=checks.Limits(above=0, high=1),
)
def rope_turn(
    positions: Num[Array, "#B T"],
    head_size: int,
    base: float = 10_000.0,
    fraction: float = 1.0,
    scaling: Scaling | None = None,
    length: Num[Array, "#B"] | None = None,
) -> Turn:
    """The turn of `rotate`, whose arguments these are.

    >>> rope_turn(jnp.array([[3]]), 2).angles.tolist()
    [[[[3.0]]]]
    """
    turned = int(fraction * head_size)
    if turned < 2 or turned % 2:
        channels = f"fraction={fraction} of head size {head_size} is {turned} channels"
        raise ValueError(f"{channels}; RoPE turns pairs: it must be even and at least 2.")
    frequencies, factor = rope_frequencies(turned, base), 1.0
    if scaling is not None:
        length = lengths(positions) if length is None else length
        frequencies, factor = scaling(turned, base, length)
    frequencies = jnp.asarray(frequencies, jnp.float32).reshape(-1, 1, 1, turned // 2)
    return Turn(positions.astype(jnp.float32)[:, :, None, None] * frequencies, factor)


class RoPE(Rotary):
    """Turns query and key in every layer, so that scores depend on relative positions (`rotate`).

        logit_ij = H^-0.5 rotate(q_i, i) . rotate(k_j, j)

    The paper pairs neighbouring channels (`layout="interleaved"`; GPT-J, Meta's Llama), most code
    the two halves of the head ("half"; GPT-NeoX, Hugging Face's Llama). Both are the same up to a
    permutation of channels of the query and key projections; loaded weights need the layout they
    were trained with. `fraction` below 1 is GPT-NeoX's partial rotary (0.25 in Pythia).

    Every position is defined; beyond the trained length the slow pairs reach angles never seen, and
    perplexity rises steeply. A `scaling` avoids that, at best after some training with it: `linear`
    (Position Interpolation), `ntk`, `dynamic`, `yarn`, `longrope` and `llama3` are
    `posjax.frequencies` with published settings. All work with a cache, because keys are cached
    before they are turned; for `dynamic` and `longrope` see the warning there.

    Tested live against Hugging Face's and x-transformers' code, all scalings included.

    Args:
        base: the slowest pair turns once in about 2 pi base positions; above 1 (Llama 3: 500,000).
        fraction: share of each head's channels that are turned, above 0 and up to 1.
        layout: which channels are a pair.
        scaling: a change of the frequencies; None for none.

    References:
        Su, Lu, Pan, Murtadha, Wen, Liu, RoFormer: Enhanced Transformer with Rotary Position
        Embedding, arXiv:2104.09864, equations 14, 15 and 34.

    >>> from posjax.encodings.base import Side
    >>> side = Side(jnp.ones((1, 2, 1, 4)), jnp.array([[0, 1]]))
    >>> query, key = RoPE().apply({}, side, side, method="rotate")
    >>> query.shape
    (1, 2, 1, 4)
    >>> RoPE.yarn().scaling.factor
    16.0
    """

    base: float = 10_000.0
    fraction: float = 1.0
    layout: Layout = "half"
    scaling: Scaling | None = None

    def __post_init__(self):
        checks.fields(self, base=checks.above(1), fraction=checks.Limits(above=0, high=1))
        super().__post_init__()

    @classmethod
    def interleaved(cls) -> Self:
        """Neighbouring channels are pairs, as in the paper."""
        return cls(layout="interleaved")

    @classmethod
    def partial(cls) -> Self:
        """A quarter of the channels is turned, as in Pythia."""
        return cls(fraction=0.25)

    @classmethod
    def linear(cls) -> Self:
        """Position Interpolation (arXiv:2306.15595) to 4 times the trained length."""
        return cls(scaling=Linear())

    @classmethod
    def ntk(cls) -> Self:
        """A greater base (see arXiv:2309.00071), for 4 times the trained length."""
        return cls(scaling=NTKAware())

    @classmethod
    def dynamic(cls) -> Self:
        """A base that grows with the length (see arXiv:2309.00071), beyond 2048."""
        return cls(scaling=DynamicNTK())

    @classmethod
    def yarn(cls) -> Self:
        """YaRN (arXiv:2309.00071) for 65,536 positions after training on 4096 (Llama 2)."""
        return cls(scaling=YaRN())

    @classmethod
    def longrope(cls) -> Self:
        """LongRoPE (arXiv:2402.13753), 4096 to 131,072 positions; fill in a model's factors."""
        return cls(scaling=LongRoPE())

    @classmethod
    def llama3(cls) -> Self:
        """Llama 3.1 (arXiv:2407.21783): from 8192 to 65,536 positions and beyond."""
        return cls(base=500_000.0, scaling=Llama3())

    def turns(self, query, key):
        """The angles of their own positions; the lengths are those of the keys."""
        reads_length = self.scaling is not None and self.scaling.reads_length
        length = lengths(key.indices) if reads_length else None
        settings = self.base, self.fraction, self.scaling, length
        size = query.x.shape[-1]
        return tuple(rope_turn(side.indices, size, *settings) for side in (query, key))
