"""Sandwich: the inner products of sinusoidal embeddings alone, added to the logits."""

import dataclasses

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.biases.products import sinusoid_frequencies
from posjax.biases.relative import RelativeBias
from posjax.encodings.base import PositionEncoding
from posjax.types import Array, Float, Num, PyTree

__all__ = ["CosineSum", "Sandwich"]


@dataclasses.dataclass(frozen=True)
class CosineSum:
    """(1 / ratio_n) sum_m cos((i - j) base^(-2m / width)), as a function for `RelativeBias`.

    i is the position of the query, j that of the key; m = 0 ... width / 2 - 1. Computed as a
    product of the sinusoids of i and j, both taken relative to the first query, so that angles are
    as exact as distances.
    """

    ratios: tuple[float, ...]
    width: int = 128
    base: float = 10_000.0

    def __call__(
        self, params: PyTree, query_positions: Num[Array, "#B T"], key_positions: Num[Array, "#B S"]
    ) -> Float[Array, "#B N T S"]:
        """The bias in float32; `params` is not used."""
        start = query_positions[:, :1]
        waves = [self._waves(x - start) for x in (query_positions, key_positions)]
        total = jnp.matmul(
            waves[0], jnp.swapaxes(waves[1], 1, 2), precision=jax.lax.Precision.HIGHEST
        )
        return total[:, None] / jnp.asarray(self.ratios, jnp.float32)[None, :, None, None]

    def _waves(self, distance: Num[Array, "#B T"]) -> Float[Array, "#B T E"]:
        frequencies = sinusoid_frequencies(self.width, self.base)[None, None, :]
        distance = jax.lax.stop_gradient(distance.astype(jnp.float32))
        angles = distance[:, :, None] * frequencies
        return jnp.concatenate((jnp.sin(angles), jnp.cos(angles)), axis=-1)


class Sandwich(PositionEncoding):
    """Adds the product of two positions' sinusoidal embeddings, compressed for each head.

        logit_ij = H^-0.5 q_i . k_j + (N / 8n) sum_m cos((i - j) base^(-2m / width))
                                                      head n = 1 ... N,  m = 0 ... width / 2 - 1

    This is what remains of logits of embeddings with sinusoids when the cross terms of content and
    position are dropped. The same in every layer, not trained, not multiplied by the attention's
    scale. `width` has nothing to do with the model's. NVIDIA NeMo counts m = 1 ... width / 2 and
    subtracts width / 2, which softmax does not notice.

    Every distance is defined: the sum falls roughly with its logarithm (it oscillates a little).
    Not causal, it is symmetric. Tested against a transcription of the formula and of the product of
    embeddings.

    Args:
        width: d-bar of the paper, twice the number of cosines; even and at least 2.
        base: of the frequencies; greater than 1.

    References:
        Chi, Fan, Rudnicky, Ramadge, Dissecting Transformer Length Extrapolation via the Lens of
        Receptive Field Analysis, arXiv:2212.10356 (the section on Sandwich).

    >>> x, p = jnp.ones((1, 3, 2, 4)), jnp.array([[0, 1, 2]])
    >>> bias = Sandwich().apply({}, x, x, x, p, p, method="bias")
    >>> [[round(x, 2) for x in head] for head in bias.function(None, p, p)[0, :, 2].tolist()]
    [[14.35, 15.52, 16.0], [7.17, 7.76, 8.0]]
    """

    width: int = 128
    base: float = 10_000.0

    def __post_init__(self):
        width = checks.Limits(low=2, multiple_of=2)
        checks.fields(self, width=width, base=checks.above(1))
        super().__post_init__()

    def bias(self, query, key, value, query_indices, key_indices, memory=None, shared=None):
        """The bias for query's heads."""
        heads = query.shape[2]
        ratios = tuple(8 * head / heads for head in range(1, heads + 1))
        function = CosineSum(ratios, self.width, self.base)
        return RelativeBias(function, None, query_indices, key_indices, distance_only=True)
