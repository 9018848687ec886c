"""Attention with Linear Biases (ALiBi): logits fall with the distance, at each head's own slope."""

import dataclasses
from typing import Self

import jax.numpy as jnp

from posjax import checks
from posjax.biases.relative import RelativeBias
from posjax.encodings.base import PositionEncoding
from posjax.types import Array, Float, Num, PyTree

__all__ = ["ALiBi", "LinearDistance", "alibi_slopes"]


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The slope of each head.

        2^(-8 n / N) for n = 1 ... N                   where N = heads is a power of 2
        slopes(C) + every other one of slopes(2 C)     for other N; C is the power of 2 below N

    The second line is the official code's.

    Raises:
        ValueError: fewer than 1 head.

    >>> alibi_slopes(4)
    (0.25, 0.0625, 0.015625, 0.00390625)
    """
    checks.integer("heads", heads, low=1)
    power = 1 << (heads.bit_length() - 1)
    slopes = tuple(2.0 ** (-8 * n / power) for n in range(1, power + 1))
    return slopes if power == heads else slopes + alibi_slopes(2 * power)[::2][: heads - power]


@dataclasses.dataclass(frozen=True)
class LinearDistance:
    """slope * (left_bonus [j < i] - |i - j|) for each head, as a function for `RelativeBias`.

    i is the position of the query, j that of the key. The slopes are constants of the compiled
    program, so no gradient is computed for them.
    """

    slopes: tuple[float, ...]
    left_bonus: float = 0.0

    def __call__(
        self, params: PyTree, query_positions: Num[Array, "#B T"], key_positions: Num[Array, "#B S"]
    ) -> Float[Array, "#B N T S"]:
        """The bias in float32; `params` is not used."""
        distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
        slopes = jnp.asarray(self.slopes, jnp.float32)[None, :, None, None]
        steps = -jnp.abs(distance).astype(jnp.float32)
        if self.left_bonus:
            steps += jnp.where(distance > 0, self.left_bonus, 0.0)
        return slopes * steps


class ALiBi(PositionEncoding):
    """Subtracts the distance, times a fixed slope for each head, from the logits.

        logit_ij = H^-0.5 q_i . k_j - slope_n |i - j|                        slopes: `alibi_slopes`
        logit_ij = H^-0.5 q_i . k_j - slope_n (|i - j| - left_bonus [j < i])

    The same in every layer, not trained, and not multiplied by the attention's scale. With causal
    attention j <= i, so this is the paper's -slope (i - j); the official code adds slope * j
    instead, which is the same to softmax. The paper defines causal attention only. Without it, the
    first line is the symmetric form, which cannot tell left from right; Ruoss et al. break the
    symmetry with left_bonus = 0.5 (`ALiBi.asymmetric()`), as in their code.

    Every length is defined: far keys just fade, which keeps perplexity level beyond the trained
    length. Tested live against Hugging Face's BLOOM, and the asymmetric form against a
    transcription of its code.

    Args:
        left_bonus: distance that keys before the query are spared; 0 or more. Not 0, it also
            separates a query's own key from the one before under causal attention.

    References:
        Press, Smith, Lewis, Train Short, Test Long: Attention with Linear Biases Enables Input
        Length Extrapolation, arXiv:2108.12409, section 3.
        Ruoss et al., Randomized Positional Encodings Boost Length Generalization of Transformers,
        arXiv:2305.16843 (the asymmetric form).

    >>> x, p = jnp.ones((1, 3, 1, 4)), jnp.array([[0, 1, 2]])
    >>> bias = ALiBi().apply({}, x, x, x, p, p, method="bias")
    >>> bias.function.slopes
    (0.00390625,)
    """

    left_bonus: float = 0.0

    def __post_init__(self):
        checks.fields(self, left_bonus=checks.at_least(0))
        super().__post_init__()

    @classmethod
    def asymmetric(cls) -> Self:
        """Keys before the query are half a step nearer, so that an encoder sees the direction."""
        return cls(left_bonus=0.5)

    def bias(self, query, key, value, query_indices, key_indices, memory=None, shared=None):
        """The linear bias for query's heads."""
        function = LinearDistance(alibi_slopes(query.shape[2]), self.left_bonus)
        return RelativeBias(function, None, query_indices, key_indices, distance_only=True)
