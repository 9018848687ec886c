"""Temperature: logits, bias included, are divided by tau, for contexts beyond training."""

import jax.numpy as jnp

from posjax.biases.scaled import ScaledBias
from posjax.encodings.base import PositionEncoding
from posjax.encodings.t5 import T5
from posjax.encodings.wrapper import Wrapper

__all__ = ["Temperature"]


class Temperature(Wrapper):
    """Divides the logits of another encoding by a temperature, its bias included.

        logit_ij = (H^-0.5 q_i . k_j + inner bias_ij) / tau

    Longer sequences spread attention thinner; a tau below 1 sharpens it again, without training.
    `posjax.alignment` finds the tau at which attention at the new length is as sharp as it was at
    the trained one. The inner encoding sees queries and their products without tau, so the gates
    of CoPE count as before. Wrap a whole combination, not a part of it: only the bias of the
    encoding inside is divided.

    Beyond the trained length it does what the encoding inside does. Tested against a
    transcription of the formula. An encoding without a softmax (stick-breaking) is refused.

    Args:
        encoding: the encoding inside.
        temperature: tau, above 0.

    References:
        Chi, Fan, Rudnicky, Attention Alignment and Flexible Positional Embeddings Improve
        Transformer Length Extrapolation, arXiv:2311.00684.

    >>> from posjax.encodings import ALiBi
    >>> from posjax.encodings.base import Side
    >>> side = Side(jnp.ones((1, 2, 1, 4)), jnp.arange(2)[None])
    >>> sharper = Temperature(ALiBi(), temperature=0.8)
    >>> sharper.apply({}, side, side, method="rotate")[0][0, 0, 0].tolist()
    [1.25, 1.25, 1.25, 1.25]
    >>> sharper.apply({}, side, side, method="bias").factor
    1.25
    """

    encoding: PositionEncoding = T5()
    temperature: float = 0.8

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"Temperature temperature is {self.temperature}; it must be above 0.")
        super().__post_init__()

    def rotate(self, query, key):
        """As the encoding inside; then the query over tau."""
        query, key = self.encoding.rotate(query, key)
        return _times(query, 1 / self.temperature), key

    def bias(self, query, key, shared=None):
        """The inner bias over tau."""
        query = query._replace(x=_times(query.x, self.temperature))
        bias = self.encoding.bias(query, key, shared)
        factor = 1 / self.temperature
        return None if bias is None else ScaledBias(bias, factor, query_factor=factor)


def _times(query, factor: float):
    return (query.astype(jnp.float32) * factor).astype(query.dtype)
