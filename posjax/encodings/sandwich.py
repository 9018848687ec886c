"""Sandwich: inner products of sinusoidal embeddings, added to the logits."""

import dataclasses

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.biases.products import sinusoid_frequencies
from posjax.encodings.distance import DistanceBias
from posjax.types import Array, Float, Num

__all__ = ["CosineSum", "Sandwich"]


@dataclasses.dataclass(frozen=True)
class CosineSum:
    """(N / 8n) sum_m cos((i - j) base^(-2m / width)) for query position i and key position j.

    Computed as a product of the sinusoids of i and j, both relative to the first query, so that
    angles are as exact as distances.
    """

    heads: int
    width: int = 128
    base: float = 10_000.0

    def __post_init__(self):
        checks.fields(
            self,
            heads=checks.size(),
            width=checks.Limits(low=2, multiple_of=2),
            base=checks.above(1),
        )

    def __call__(
        self, params: None, query_positions: Num[Array, "#B T"], key_positions: Num[Array, "#B S"]
    ) -> Float[Array, "#B N T S"]:
        """The bias in float32."""
        frequencies = sinusoid_frequencies(self.width, self.base)[None, None, :]

        def waves(positions: Array) -> Array:
            distance = (positions - query_positions[:, :1]).astype(jnp.float32)
            angles = jax.lax.stop_gradient(distance)[:, :, None] * frequencies
            return jnp.concatenate((jnp.sin(angles), jnp.cos(angles)), axis=-1)

        query, key = waves(query_positions), jnp.swapaxes(waves(key_positions), 1, 2)
        total = jnp.matmul(query, key, precision=jax.lax.Precision.HIGHEST)
        ratios = [8 * head / self.heads for head in range(1, self.heads + 1)]
        return total[:, None] / jnp.asarray(ratios, jnp.float32)[None, :, None, None]


class Sandwich(DistanceBias):
    """Adds the product of two positions' sinusoidal embeddings, compressed for each head.

        logit_ij = H^-0.5 q_i . k_j + (N / 8n) sum_m cos((i - j) base^(-2m / width))
                                                      head n = 1 ... N,  m = 0 ... width / 2 - 1

    The logits of embeddings with sinusoids, without the cross terms of content and position. It is
    the same in every layer, not trained, and not multiplied by the attention's scale. `width` has
    nothing to do with the model's. NVIDIA NeMo counts m = 1 ... width / 2 and subtracts width / 2,
    which softmax does not notice.

    Every distance is defined: the sum falls roughly with its logarithm (it oscillates a little).
    Without causal attention it is symmetric. Tested against a transcription of the formula and of
    the product of embeddings.

    Args:
        width: d-bar of the paper, twice the number of cosines; even and at least 2.
        base: of the frequencies; greater than 1.

    References:
        Chi, Fan, Rudnicky, Ramadge, Dissecting Transformer Length Extrapolation via the Lens of
        Receptive Field Analysis, arXiv:2212.10356 (the section on Sandwich).

    >>> from posjax.encodings.base import Side
    >>> x, p = jnp.ones((1, 3, 2, 4)), jnp.array([[0, 1, 2]])
    >>> bias = Sandwich().apply({}, Side(x, p), Side(x, p), method="bias")
    >>> [[round(x, 2) for x in head] for head in bias.function(None, p, p)[0, :, 2].tolist()]
    [[14.35, 15.52, 16.0], [7.17, 7.76, 8.0]]
    """

    width: int = 128
    base: float = 10_000.0

    def __post_init__(self):
        width = checks.Limits(low=2, multiple_of=2)
        checks.fields(self, width=width, base=checks.above(1))
        super().__post_init__()

    def function(self, heads):
        """The sum of cosines."""
        return CosineSum(heads, self.width, self.base)
