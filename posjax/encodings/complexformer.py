"""ComplexFormer's attention: heads bend the phase difference of content before adding RoPE's."""

import flax.linen as nn
import jax.numpy as jnp

from posjax import checks
from posjax.encodings.rotary import Layout, Rotary, Turn, check_pairs, turn_at
from posjax.frequencies import rope_frequencies
from posjax.types import Array, Float, Num

__all__ = ["ComplexFormer", "phases"]


@checks.arguments()
def phases(x: Num[Array, "B T N H"], layout: Layout = "half") -> Float[Array, "B T N m"]:
    """The angle of each pair (a, b) of channels, atan2(b, a) in (-pi, pi]; 0 if a = b = 0.

    Returns:
        Float32. The gradient is 0 if a = b = 0.

    >>> phases(jnp.array([[[[0.0, 0.0, 2.0, 0.0]]]])).round(3).tolist()[0][0][0][1]
    0.0
    """
    x = x.astype(jnp.float32)
    middle = x.shape[-1] // 2
    halves = x[..., :middle], x[..., middle:]
    a, b = halves if layout == "half" else (x[..., ::2], x[..., 1::2])
    is_zero = (a == 0) & (b == 0)
    return jnp.where(is_zero, 0.0, jnp.arctan2(b, jnp.where(is_zero, 1.0, a)))


class ComplexFormer(Rotary):
    """Adds an adapted phase difference of query and key to RoPE's, in each head.

        logit_ij = H^-0.5 sum over m of |q_im| |k_jm| cos(adapt_n(s) + (i - j) base^(-2m / H))
        s = phase(q_im) - phase(k_jm)                  each pair of channels is a complex number
        adapt_n(s) = scale_n s + shift_n

    The paper (Complex Multi-Head Attention) was withdrawn by its authors and is no longer
    available. From its abstract we take the polar form of query and key for each head, and the
    factor exp(i (Adapt(s) + (i - j) phase)). **The form of Adapt is a guess**, as are its starting
    values, its one scale and shift for all pairs of a head, RoPE's frequencies and the pairs of
    channels. An affine form splits into a turn of the query and a turn of the key. At the start,
    scale 1 and shift 0, this is exactly RoPE. Otherwise the logits jump when a phase passes from pi
    to -pi, unless scale_n is a whole number.

    Tested against a transcription of the formula, and against RoPE. There is no code to compare
    with.

    Parameters, float32: scale [K], shared by the heads of a group, since a key is turned once;
    shift [N].

    Every position is defined, as in RoPE.

    Args:
        base: of RoPE's frequencies; above 1.
        layout: which channels are a pair, see `posjax.encodings.rotary.turn`.

    References:
        Shao et al., ComplexFormer: Disruptively Advancing Transformer Inference Ability via
        Head-Specific Complex Vector Attention, arXiv:2505.10222 (withdrawn), abstract.

    >>> import jax
    >>> from posjax.encodings.base import Side
    >>> query, key = (Side(jnp.ones((1, 1, n, 4)), jnp.array([[3]])) for n in (2, 1))
    >>> variables = ComplexFormer().init(jax.random.key(0), query, key, method="rotate")
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'scale': (1,), 'shift': (2,)}}
    """

    base: float = 10_000.0
    layout: Layout = "half"

    def __post_init__(self):
        checks.fields(self, base=checks.above(1))
        super().__post_init__()

    @nn.compact
    def turns(self, query, key):
        """RoPE's angles plus those by which the adapted phases differ from the phases."""
        heads, kv_heads = query.x.shape[2], key.x.shape[2]
        check_pairs("ComplexFormer", query.x.shape[-1])
        scale = self.param("scale", nn.initializers.ones, (kv_heads,), jnp.float32)
        shift = self.param("shift", nn.initializers.zeros, (heads,), jnp.float32)
        query_scale = jnp.repeat(scale, heads // kv_heads)
        of_query = self._adapted(query, query_scale, shift)
        return of_query, self._adapted(key, scale, jnp.zeros_like(scale))

    def _adapted(self, side, scale: Float[Array, "N"], shift: Float[Array, "N"]) -> Turn:
        plain = turn_at(side.indices, rope_frequencies(side.x.shape[-1], self.base))
        # The pair has its phase already; the rest of scale * phase is added.
        bent = (scale - 1)[None, None, :, None] * phases(side.x, self.layout)
        return Turn(plain.angles + bent + shift[None, None, :, None])
