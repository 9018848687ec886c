"""xPos: RoPE whose pairs also fade with the distance, the fast ones most."""

import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.encodings.base import PositionEncoding
from posjax.encodings.rope import Layout, check_pairs, lengths, turn
from posjax.frequencies import rope_frequencies
from posjax.types import Array, Float, Num

__all__ = ["XPos", "xpos_scales"]


def xpos_scales(
    positions: Num[Array, "B T"], channels: int, scale_base: float = 512.0
) -> Float[Array, "B T m"]:
    """What the pairs of a query are multiplied by; a key's are divided by it.

        zeta_m = (2m + 0.4 H) / (1.4 H)         m = 0 ... H / 2 - 1,  H = channels
        scale_m = zeta_m^(position / scale_base)

    Float32 holds it and its inverse with room to spare up to position 32,000 * scale_base / 512;
    from 35,600 on the smallest are 0.

    >>> print(xpos_scales(jnp.array([[0, 512]]), 4).round(3))
    [[[1.    1.   ]
      [0.286 0.643]]]
    """
    logarithm = np.log((np.arange(0, channels, 2) + 0.4 * channels) / (1.4 * channels))
    power = positions.astype(jnp.float32)[:, :, None] / scale_base
    return jnp.exp(power * jnp.asarray(logarithm, jnp.float32)[None, None, :])


class XPos(PositionEncoding):
    """RoPE, with each pair of channels weighted by a factor that falls with the distance.

        logit_ij = H^-0.5 sum over m of zeta_m^((i - j) / scale_base) (RoPE's term of pair m)
        query at i:  turned by i, times zeta_m^((i - c) / scale_base)
        key at j:    turned by j, divided by zeta_m^((j - c) / scale_base)

    zeta as in `xpos_scales`, below 1. Only i - j matters, so any reference c gives the same logits.
    Published code takes half of the current length, which it cannot do with a cache of turned keys;
    here keys are cached unturned, and `centred=True` is that. The default is c = 0, so that a key
    is turned alike at all times: right up to position 32,000 with scale_base 512 (centred: rows of
    64,000), in float32 and in bfloat16, which has the same range; float16 ends at 4,000.

    Every position is defined, and far keys fade, which is meant to help beyond the trained length.
    The factor is above 1 for keys after the query: meant for causal attention. The paper's block-
    wise attention for long rows is `local_window_size`.

    Tested against x-transformers' code live (interleaved layout, which torchscale has too), and
    against the formula.

    Args:
        base: of RoPE's frequencies; above 1.
        scale_base: distance over which pair m fades by zeta_m; above 0.
        centred: c is half of the row's current length instead of 0.
        layout: which channels are a pair, see `posjax.encodings.rope.turn`.

    References:
        Sun et al., A Length-Extrapolatable Transformer, arXiv:2212.10554, section 3.

    >>> x, p = jnp.ones((1, 1, 1, 4)), jnp.array([[512]])
    >>> query, key = XPos().apply({}, x, x, p, p, method="rotate")
    >>> float(jnp.sum(query * key).round(3))
    4.0
    """

    base: float = 10_000.0
    scale_base: float = 512.0
    centred: bool = False
    layout: Layout = "half"

    def __post_init__(self):
        checks.fields(self, base=checks.above(1), scale_base=checks.above(0))
        super().__post_init__()

    def rotate(self, query, key, query_indices, key_indices, query_memory=None, key_memory=None):
        """Query and key, turned and scaled by their own positions."""
        size = query.shape[-1]
        check_pairs("XPos", size)
        centre = lengths(key_indices)[:, None] // 2 if self.centred else 0
        frequencies = jnp.asarray(rope_frequencies(size, self.base), jnp.float32)

        def turned(x, positions, sign):
            angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]
            scales = xpos_scales(sign * (positions - centre), size, self.scale_base)
            return turn(x, angles, scale=scales[:, :, None, :], layout=self.layout)

        return turned(query, query_indices, 1), turned(key, key_indices, -1)
