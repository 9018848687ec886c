"""p-RoPE: RoPE that leaves its slowest pairs of channels unturned."""

from typing import Literal, Self

import numpy as np

from posjax import checks
from posjax.encodings.rotary import Layout, Rotary, check_pairs, turn_at
from posjax.frequencies import rope_frequencies

__all__ = ["PRoPE", "p_rope_frequencies"]


@checks.arguments(
    channels=checks.size(0, multiple_of=2),
    base=checks.above(1),
    fraction=checks.between(0, 1),
)
def p_rope_frequencies(
    channels: int, base: float, fraction: float, turned: Literal["fast", "slow"] = "fast"
) -> np.ndarray:
    """RoPE's frequencies with all but `fraction` of them set to 0, [channels / 2].

    >>> p_rope_frequencies(8, 10_000.0, 0.75).round(4).tolist()
    [1.0, 0.1, 0.01, 0.0]
    """
    pairs = channels // 2
    kept = int(fraction * channels // 2)
    index = np.arange(pairs)
    is_kept = index < kept if turned == "fast" else index >= pairs - kept
    return np.where(is_kept, rope_frequencies(channels, base), 0.0)


class PRoPE(Rotary):
    """RoPE on the fastest pairs only; the slowest stay still and carry content at any distance.

        angle_m = position * base^(-2m / H)     m = 0 ... floor(fraction * H / 2) - 1
        angle_m = 0                             for the slower pairs

    fraction = 1 is RoPE and 0 no encoding. Unlike `RoPE(fraction=...)`, the paper's "partial", it
    does not fit a whole spectrum into fewer channels. The paper's listing rounds the number of
    pairs down, and so does later code. Hugging Face's rope type "proportional" is the same method.

    Every position is defined, but the kept pairs turn as in RoPE, and the paper did not test longer
    contexts than trained ones. Tested live against Hugging Face's code.

    Args:
        base: above 1; 10,000 in the paper.
        fraction: the paper's p, share of pairs that are turned, 0 to 1.
        pairs: which pairs turn: the fast ones, or the slow ones (the paper's control "reversed").
        layout: which channels are a pair, see `posjax.encodings.rotary.turn`.

    References:
        Barbero, Vitvitskyi, Perivolaropoulos, Pascanu, Veličković, Round and Round We Go! What
        makes Rotary Positional Encodings useful?, arXiv:2410.06205, section 6.

    >>> import jax.numpy as jnp
    >>> from posjax.encodings.base import Side
    >>> side = Side(jnp.ones((1, 1, 1, 8)), jnp.array([[1000]]))
    >>> query, _ = PRoPE().apply({}, side, side, method="rotate")
    >>> query[0, 0, 0, 3::4].tolist()
    [1.0, 1.0]
    """

    base: float = 10_000.0
    fraction: float = 0.75
    pairs: Literal["fast", "slow"] = "fast"
    layout: Layout = "half"

    def __post_init__(self):
        checks.fields(self, base=checks.above(1), fraction=checks.between(0, 1))
        super().__post_init__()

    @classmethod
    def reversed(cls) -> Self:
        """The paper's control: the fastest pairs stay still instead of the slowest."""
        return cls(pairs="slow")

    @classmethod
    def proportional(cls) -> Self:
        """The setting of Gemma 4's full-attention layers, under Hugging Face's name for p-RoPE."""
        return cls(base=1_000_000.0, fraction=0.25)

    def turn_of(self, side):
        """RoPE's angles for the pairs that turn, 0 for the others."""
        size = side.x.shape[-1]
        check_pairs("PRoPE", size)
        return turn_at(side.indices, p_rope_frequencies(size, self.base, self.fraction, self.pairs))
