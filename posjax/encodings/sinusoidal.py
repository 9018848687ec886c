"""Sinusoidal position encoding: sines and cosines of the position, added to the embeddings."""

from typing import Literal, Self

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.encodings.base import PositionEncoding
from posjax.types import Array, Float, Num

__all__ = ["Sinusoidal", "sinusoids"]


@checks.arguments(width=checks.size(2, multiple_of=2), base=checks.above(1))
def sinusoids(
    positions: Num[Array, "B T"],
    width: int,
    *,
    base: float = 10_000.0,
    layout: Literal["interleaved", "concatenated"] = "interleaved",
) -> Float[Array, "B T D"]:
    """Sines and cosines of every position.

        angle_m = position * base^(-2m / width)            m = 0 ... width / 2 - 1
        interleaved:  channels 2m and 2m + 1 are sin(angle_m) and cos(angle_m)
        concatenated: channels m and m + width / 2 are sin(angle_m) and cos(angle_m)

    Args:
        width: number of channels D, even.
        base: greater than 1.

    Returns:
        float32, between -1 and 1.

    Raises:
        ValueError: an odd width.

    >>> sinusoids(jnp.array([[0, 1]]), 4)[0, 0].tolist()
    [0.0, 1.0, 0.0, 1.0]
    """
    frequencies = jnp.asarray(base ** (-np.arange(0, width, 2) / width), jnp.float32)
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    waves = jnp.sin(angles), jnp.cos(angles)
    if layout == "concatenated":
        return jnp.concatenate(waves, axis=-1)
    return jnp.stack(waves, axis=-1).reshape(*positions.shape, width)


class Sinusoidal(PositionEncoding):
    """Adds sines and cosines of the position to the token embeddings, once.

        embedding_p + scale * sinusoids(p)            `sinusoids` has the formula

    The paper multiplies the token embeddings by sqrt(D) before the sum; here `scale` makes the
    waves smaller instead (D^-0.5 gives the paper's proportion if token embeddings have deviation
    D^-0.5). The paper's text interleaves sines and cosines, its code (tensor2tensor) concatenates
    them; the two differ by a permutation of channels, which matters for loaded weights only. The
    lowest frequency is 1 / base in that code; in the text, and here, it is base^(2 / D) / base.

    Every position is defined; beyond the trained length the model sees combinations of angles it
    has never seen, and perplexity rises at once (Press et al., Train Short, Test Long, figure 1).
    Tested against a float64 computation and, scaled and trained, against x-transformers.
    Parameter: trained_scale [], float32, only with `train_scale`.

    Args:
        base: the slowest wave is about 2 pi base positions long; above 1.
        scale: factor of the waves, above 0; None is D^-0.5.
        train_scale: whether the factor is a parameter, which starts at `scale`.

    References:
        Vaswani et al., Attention Is All You Need, arXiv:1706.03762, section 3.5.

    >>> Sinusoidal().apply({}, jnp.zeros((1, 1, 4)), jnp.array([[0]]), method="embed").tolist()
    [[[0.0, 1.0, 0.0, 1.0]]]
    """

    base: float = 10_000.0
    layout: Literal["interleaved", "concatenated"] = "interleaved"
    scale: float | None = 1.0
    train_scale: bool = False

    def __post_init__(self):
        checks.fields(self, base=checks.above(1), scale=checks.above(0))
        super().__post_init__()

    @classmethod
    def concatenated(cls) -> Self:
        """The layout of tensor2tensor and Transformer-XL: all sines, then all cosines."""
        return cls(layout="concatenated")

    @classmethod
    def learned_scale(cls) -> Self:
        """With a trained factor that starts at D^-0.5: x-transformers' scaled sinusoidal."""
        return cls(layout="concatenated", scale=None, train_scale=True)

    @nn.compact
    def embed(self, embeddings, indices):
        """The embeddings plus the waves, summed in float32."""
        width = embeddings.shape[-1]
        waves = sinusoids(indices, width, base=self.base, layout=self.layout)
        scale = width**-0.5 if self.scale is None else self.scale
        if self.train_scale:
            scale = self.param("trained_scale", nn.initializers.constant(scale), (), jnp.float32)
        return (embeddings.astype(jnp.float32) + scale * waves).astype(embeddings.dtype)
