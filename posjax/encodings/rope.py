"""Rotary Position Embedding (RoPE): query and key are turned by angles that grow with position."""

from typing import Literal

import jax.numpy as jnp
import numpy as np

from posjax.encodings.base import PositionEncoding
from posjax.types import Array, Num

__all__ = ["RoPE", "rotate"]


def rotate(
    x: Num[Array, "B T N H"],
    positions: Num[Array, "#B T"],
    *,
    base: float = 10_000.0,
    fraction: float = 1.0,
    layout: Literal["half", "interleaved"] = "half",
) -> Num[Array, "B T N H"]:
    """Turns pairs of channels by angles proportional to the position.

        angle_m = position * base^(-2m / R)                R = fraction * H,  m = 0 ... R / 2 - 1
        (a, b) -> (a cos(angle_m) - b sin(angle_m), b cos(angle_m) + a sin(angle_m))
        half:        (a, b) are channels m and m + R / 2
        interleaved: (a, b) are channels 2m and 2m + 1

    The score of a query at i and a key at j then depends on i - j only. Angles are float32, so that
    of position p is right to about p * 1e-7 radians.

    Args:
        base: greater than 1.
        fraction: the first R = int(fraction * H) channels are turned, with a full spectrum of
            frequencies; the others stay. R must be even.

    Returns:
        An array like x, in x's dtype.

    Raises:
        ValueError: R is odd or 0.

    >>> rotate(jnp.ones((1, 1, 1, 2)), jnp.array([[0]])).tolist()
    [[[[1.0, 1.0]]]]
    """
    size = x.shape[-1]
    turned = int(fraction * size)
    if turned < 2 or turned % 2:
        channels = f"fraction={fraction} of head size {size} is {turned} channels"
        raise ValueError(f"{channels}; RoPE turns pairs: it must be even and at least 2.")
    frequencies = jnp.asarray(base ** (-np.arange(0, turned, 2) / turned), jnp.float32)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    # The two members of a pair get an axis of their own: before the frequencies, or behind them.
    axis, pairs = (-2, (2, turned // 2)) if layout == "half" else (-1, (turned // 2, 2))
    first = x[..., :turned].astype(jnp.float32).reshape(*x.shape[:-1], *pairs)
    a, b = (jnp.take(first, member, axis=axis) for member in (0, 1))
    first = jnp.stack((a * cos - b * sin, b * cos + a * sin), axis=axis)
    first = first.reshape(*x.shape[:-1], turned).astype(x.dtype)
    return first if turned == size else jnp.concatenate((first, x[..., turned:]), axis=-1)


class RoPE(PositionEncoding):
    """Turns query and key in every layer, so that scores depend on relative positions (`rotate`).

        logit_ij = H^-0.5 rotate(q_i, i) . rotate(k_j, j)

    The paper pairs neighbouring channels (`layout="interleaved"`; GPT-J, Meta's Llama), most code
    the two halves of the head ("half"; GPT-NeoX, Hugging Face's Llama). Both are the same up to a
    permutation of channels of the query and key projections; loaded weights need the layout they
    were trained with. `fraction` below 1 is GPT-NeoX's partial rotary (0.25 in Pythia).

    Every position is defined; beyond the trained length the slow pairs reach angles never seen, and
    perplexity rises steeply.

    Args:
        base: the slowest pair turns once in about 2 pi base positions; above 1 (Llama 3: 500,000).
        fraction: share of each head's channels that are turned, above 0 and up to 1.

    References:
        Su, Lu, Pan, Murtadha, Wen, Liu, RoFormer: Enhanced Transformer with Rotary Position
        Embedding, arXiv:2104.09864, equations 14, 15 and 34.

    >>> x, p = jnp.ones((1, 2, 1, 4)), jnp.array([[0, 1]])
    >>> query, key = RoPE().apply({}, x, x, p, p, method="rotate")
    >>> query.shape
    (1, 2, 1, 4)
    """

    base: float = 10_000.0
    fraction: float = 1.0
    layout: Literal["half", "interleaved"] = "half"

    def __post_init__(self):
        if not self.base > 1:
            raise ValueError(f"RoPE base is {self.base}; it must be greater than 1.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"RoPE fraction is {self.fraction}; it must be above 0, at most 1.")
        if self.layout not in ("half", "interleaved"):
            wanted = '"half" or "interleaved"'
            raise ValueError(f"RoPE layout is {self.layout!r}; it must be {wanted}.")
        super().__post_init__()

    def rotate(self, query, key, query_indices, key_indices):
        """Query and key, turned by their own positions."""
        settings = {"base": self.base, "fraction": self.fraction, "layout": self.layout}
        return rotate(query, query_indices, **settings), rotate(key, key_indices, **settings)
