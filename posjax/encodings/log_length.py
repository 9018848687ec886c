"""Log-length scaling: logits grow with the logarithm of the number of visible tokens."""

import math
from typing import Self

import jax.numpy as jnp

from posjax import checks
from posjax.encodings.base import PositionEncoding
from posjax.types import Array, Float, Num

__all__ = ["LogLength", "log_factors"]


@checks.arguments(trained_length=checks.at_least(2), minimum=checks.at_least(0))
def log_factors(
    positions: Num[Array, "B T"], trained_length: int, minimum: float = 0.0
) -> Float[Array, "B T"]:
    """max(minimum, ln(i + 1) / ln(trained_length)) in float32.

    >>> log_factors(jnp.array([[0, 15, 63, 255]]), 16).tolist()
    [[0.0, 1.0, 1.5, 2.0]]
    """
    factors = jnp.log(positions.astype(jnp.float32) + 1) / math.log(trained_length)
    return jnp.maximum(factors, minimum)


class LogLength(PositionEncoding):
    """Multiplies the query at position i by ln(i + 1) / ln(trained_length) (log-n scaling).

        logit_ij = c_i H^-0.5 q_i . k_j        c_i = ln(i + 1) / ln(trained_length)

    A query at position i sees i + 1 keys; their softmax spreads as the logarithm of their number
    grows, and the factor undoes that. The paper multiplies all logits of a sequence of n tokens by
    ln n; by position it is the same for the last token, and works with causal attention and a
    cache. The factor is 1 at the trained length, and 0 at position 0, which sees itself only. As in
    the official code of BiPE (`log_scale`; there i is the number of the segment) and, with
    `minimum=1.0`, of SelfExtend: no less than 1, for a trained model. It acts on the query alone,
    so it joins others: "log_length+rope".

    Every length is defined. Tested against a transcription of the formula.

    Args:
        trained_length: the length at which the factor is 1; at least 2.
        minimum: factors are at least this; 0 or more.

    References:
        Chiang, Cholak, Overcoming a Theoretical Limitation of Self-Attention, arXiv:2202.12172.

    >>> from posjax.encodings.base import Side
    >>> side = Side(jnp.ones((1, 3, 1, 2)), jnp.array([[1, 7, 63]]))
    >>> query, _ = LogLength(trained_length=8).apply({}, side, side, method="rotate")
    >>> [f"{channel:.2f}" for channel in query[0, :, 0, 0]]
    ['0.33', '1.00', '2.00']
    """

    trained_length: int = 1024
    minimum: float = 0.0

    def __post_init__(self):
        checks.fields(self, trained_length=checks.at_least(2), minimum=checks.at_least(0))
        super().__post_init__()

    @classmethod
    def clipped(cls) -> Self:
        """Nothing changes up to the trained length."""
        return cls(minimum=1.0)

    def rotate(self, query, key):
        """The query times its factor, and the key as it is."""
        factors = log_factors(query.indices, self.trained_length, self.minimum)
        scaled = query.x.astype(jnp.float32) * factors[:, :, None, None]
        return scaled.astype(query.x.dtype), key.x
