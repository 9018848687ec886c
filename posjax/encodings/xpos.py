"""xPos: RoPE whose pairs also fade with the distance, the fast ones most."""

import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.encodings.rotary import Layout, Rotary, check_pairs, lengths, turn_at
from posjax.frequencies import rope_frequencies
from posjax.types import Array, Float, Num

__all__ = ["XPos", "xpos_scales"]


@checks.arguments(channels=checks.size(0), scale_base=checks.above(0))
def xpos_scales(
    positions: Num[Array, "B T"], channels: int, scale_base: float = 512.0
) -> Float[Array, "B T m"]:
    """Factors of the pairs of a query; a key's are divided by them.

        zeta_m = (2m + 0.4 H) / (1.4 H)         m = 0 ... H / 2 - 1,  H = channels
        scale_m = zeta_m^(position / scale_base)

    Float32 holds it and its inverse up to position 32,000 * scale_base / 512 with room to spare;
    from 35,600 on the smallest ones are 0.

    >>> print(xpos_scales(jnp.array([[0, 512]]), 4).round(3))
    [[[1.    1.   ]
      [0.286 0.643]]]
    """
    logarithm = np.log((np.arange(0, channels, 2) + 0.4 * channels) / (1.4 * channels))
    power = positions.astype(jnp.float32)[:, :, None] / scale_base
    return jnp.exp(power * jnp.asarray(logarithm, jnp.float32)[None, None, :])


class XPos(Rotary):
    """RoPE, with each pair of channels weighted by a factor that falls with the distance.

        logit_ij = H^-0.5 sum over m of zeta_m^((i - j) / scale_base) (RoPE's term of pair m)
        query at i:  turned by i, times zeta_m^((i - c) / scale_base)
        key at j:    turned by j, divided by zeta_m^((j - c) / scale_base)

    zeta as in `xpos_scales`, below 1. Only i - j matters, so any reference c gives the same logits.
    Published code uses half of the current length, which a cache of turned keys does not allow;
    here keys are cached unturned, and `centred=True` does the same. The default is c = 0, so that a
    key never changes: exact up to position 32,000 with scale_base 512 (centred: rows of 64,000), in
    float32 and in bfloat16, which has the same range; float16 ends at 4,000.

    Every position is defined, and far keys fade, which is meant to help beyond the trained length.
    The factor is above 1 for keys after the query: meant for causal attention. The paper's block-
    wise attention for long rows is `local_window_size`.

    Tested live against x-transformers' code (interleaved layout, as in torchscale), and against the
    formula.

    Args:
        base: of RoPE's frequencies; above 1.
        scale_base: distance over which pair m fades by zeta_m; above 0.
        centred: c is half of the row's current length instead of 0.
        layout: which channels are a pair, see `posjax.encodings.rotary.turn`.

    References:
        Sun et al., A Length-Extrapolatable Transformer, arXiv:2212.10554, section 3.

    >>> from posjax.encodings.base import Side
    >>> side = Side(jnp.ones((1, 1, 1, 4)), jnp.array([[512]]))
    >>> query, key = XPos().apply({}, side, side, method="rotate")
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

    def turns(self, query, key):
        """RoPE's angles; scales rise with the query's position and fall with the key's."""
        size = query.x.shape[-1]
        check_pairs("XPos", size)
        centre = lengths(key.indices)[:, None] // 2 if self.centred else 0
        frequencies = rope_frequencies(size, self.base)

        def turn_of(positions, sign):
            scales = xpos_scales(sign * (positions - centre), size, self.scale_base)
            return turn_at(positions, frequencies, scales[:, :, None, :])

        return turn_of(query.indices, 1), turn_of(key.indices, -1)
