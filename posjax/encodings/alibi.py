"""Attention with Linear Biases (ALiBi): logits fall with the distance, faster in some heads."""

import dataclasses
from typing import Self

import jax.numpy as jnp

from posjax import checks
from posjax.encodings.distance import DistanceBias, OfDistance
from posjax.types import Array, Float, Num

__all__ = ["ALiBi", "LinearDistance", "alibi_slopes"]


@checks.arguments(heads=checks.size())
def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The slope of each head.

        2^(-8 n / N) for n = 1 ... N                   if N = heads is a power of 2
        slopes(C) + every other one of slopes(2 C)     for other N; C is the power of 2 below N

    The second line is from the official code.

    Raises:
        ValueError: fewer than 1 head.

    >>> alibi_slopes(4)
    (0.25, 0.0625, 0.015625, 0.00390625)
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = tuple(2.0 ** (-8 * n / power) for n in range(1, power + 1))
    return slopes if power == heads else slopes + alibi_slopes(2 * power)[::2][: heads - power]


@dataclasses.dataclass(frozen=True)
class LinearDistance:
    """slope * (left_bonus [distance > 0] - |distance|) for each head.

    The slopes are constants of the compiled program, so no gradient is computed for them.
    """

    slopes: tuple[float, ...]
    left_bonus: float = 0.0

    def __post_init__(self):
        checks.fields(self, slopes=checks.at_least(0), left_bonus=checks.at_least(0))

    def __call__(self, params: None, distance: Num[Array, "#B 1 T S"]) -> Float[Array, "#B N T S"]:
        """The bias in float32."""
        steps = -jnp.abs(distance).astype(jnp.float32)
        if self.left_bonus:
            steps += jnp.where(distance > 0, self.left_bonus, 0.0)
        return jnp.asarray(self.slopes, jnp.float32)[None, :, None, None] * steps


class ALiBi(DistanceBias):
    """Subtracts the distance, times a fixed slope for each head, from the logits.

        logit_ij = H^-0.5 q_i . k_j - slope_n |i - j|                        slopes: `alibi_slopes`
        logit_ij = H^-0.5 q_i . k_j - slope_n (|i - j| - left_bonus [j < i])

    It is the same in every layer, not trained, and not multiplied by the attention's scale. With
    causal attention j <= i, so this is the paper's -slope (i - j); the official code adds slope * j
    instead, which softmax cannot tell apart. The paper defines causal attention only. Otherwise the
    first line is symmetric and cannot tell left from right; Ruoss et al. break the symmetry with
    left_bonus = 0.5 (`ALiBi.asymmetric()`), as in their code.

    Every length is defined: far keys fade, which keeps perplexity level beyond the trained length.
    Tested against Hugging Face's BLOOM, and the asymmetric form against a transcription of its
    code.

    Args:
        left_bonus: steps by which keys before the query are nearer; 0 or more. Above 0 it changes
            causal attention too: the query's own key gets no bonus.

    References:
        Press, Smith, Lewis, Train Short, Test Long: Attention with Linear Biases Enables Input
        Length Extrapolation, arXiv:2108.12409, section 3.
        Ruoss et al., Randomized Positional Encodings Boost Length Generalization of Transformers,
        arXiv:2305.16843 (the asymmetric form).

    >>> from posjax.encodings.base import Side
    >>> x, p = jnp.ones((1, 3, 1, 4)), jnp.array([[0, 1, 2]])
    >>> bias = ALiBi().apply({}, Side(x, p), Side(x, p), method="bias")
    >>> bias.function.function.slopes
    (0.00390625,)
    """

    left_bonus: float = 0.0

    def __post_init__(self):
        checks.fields(self, left_bonus=checks.at_least(0))
        super().__post_init__()

    @classmethod
    def asymmetric(cls) -> Self:
        """Keys before the query are half a step nearer, so an encoder sees directions.

        The form of the code of Ruoss et al., arXiv:2305.16843.
        """
        return cls(left_bonus=0.5)

    def function(self, heads):
        """The linear bias."""
        return OfDistance(LinearDistance(alibi_slopes(heads), self.left_bonus))
