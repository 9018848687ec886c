"""TAPE: rotary positions that every layer updates by the content of the tokens."""

import math
from typing import ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.encodings.base import Sizes
from posjax.encodings.stream import StreamEncoding
from posjax.types import Array, Float, Num

__all__ = ["TAPE", "multiply_pairs", "rotary_state"]


@checks.arguments(heads=checks.size(), head_size=checks.size(), base=checks.above(1))
def rotary_state(
    positions: Num[Array, "B T"], heads: int, head_size: int, base: float = 10_000.0
) -> Float[Array, "B T K 2 pairs"]:
    """Cosines and sines of RoPE's angles, the same for every head: the state before any layer.

    >>> rotary_state(jnp.array([[0]]), 1, 4).tolist()
    [[[[[1.0, 1.0], [0.0, 0.0]]]]]
    """
    if head_size % 2:
        raise ValueError(
            f"head_size is {head_size}; TAPE turns pairs of channels: it must be even."
        )
    frequencies = jnp.asarray(base ** (-np.arange(0, head_size, 2) / head_size), jnp.float32)
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    state = jnp.stack((jnp.cos(angles), jnp.sin(angles)), axis=2)[:, :, None]
    return jnp.broadcast_to(state, (*positions.shape, heads, *state.shape[3:]))


@checks.arguments()
def multiply_pairs(
    x: Num[Array, "B T N H"], state: Float[Array, "B T K 2 pairs"]
) -> Num[Array, "B T N H"]:
    """Multiplies channel pairs (m, m + H / 2) by the state as complex numbers; keeps x's dtype."""
    state = jnp.repeat(state.astype(jnp.float32), x.shape[2] // state.shape[2], axis=2)
    cos, sin = state[..., 0, :], state[..., 1, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1).astype(x.dtype)


class TAPE(StreamEncoding):
    """Starts as RoPE and lets attention and MLP change each token's rotation from layer to layer.

        e           = (cos, sin) of RoPE's angles for every head       before the first layer
        logit_ij    = H^-0.5 (e_i q_i) . (e_j k_j)                     products of complex numbers
        e_i        += r * sum_j weight_ij e_j                          r_k: row sums of `attention`
        e_i        += down^T (silu(x_i inputs) * (up^T e_i))           matrices over the heads

    weight_ij are the layer's attention weights, x_i is what the layer's MLP adds to the residual
    stream. Both updates act on heads only, so a rotation of all states by one angle commutes with
    them, and all of it depends on relative positions only. `up` and `attention` start at 0, so the
    model starts as RoPE. Once updated, states are no longer rotations: their lengths change.

    The paper's attention update mixes heads by a matrix; the official code scales each head by the
    sum of the matrix's row. The code's form is the default, `mix_heads` is the other. The code has
    no decoding and no grouped heads. Here states are cached, and if heads are grouped there is
    one state for each key head: the mean over its group of the attention update. Exact against a
    transcription of the official layer.

    Every position is defined. In training all positions are shifted by one random number (rng
    stream "encoding"), so angles beyond the trained length have been seen.

    Parameters of each layer, float32: attention [K, K], up [K, P], inputs [D, P], down [P, K].

    Args:
        size: P, the width of the MLP over heads.
        max_shift: greatest training shift; the paper's code has twice the trained length; 0: none.
        base: of RoPE's angles, above 1.
        mix_heads: mix heads in the attention update, as the paper writes it.

    References:
        Zhu, Wang, Cai, Li, Wang, Wang, Rethinking Addressing in Language Models via Contextualized
        Equivariant Positional Encoding, arXiv:2501.00712, section 3.

    >>> TAPE().apply({}, jnp.array([[0, 1]]), Sizes(2, 2, 8), method="init_state").shape
    (1, 2, 2, 2, 4)
    """

    size: int = 48
    max_shift: int = 2048
    base: float = 10_000.0
    mix_heads: bool = False
    beyond: ClassVar = "extrapolates"

    def __post_init__(self):
        checks.fields(
            self, size=checks.at_least(1), max_shift=checks.at_least(0), base=checks.above(1)
        )
        super().__post_init__()

    @classmethod
    def mixed(cls) -> Self:
        """The attention update that mixes heads, as the paper writes it."""
        return cls(mix_heads=True)

    def positions(self, tokens, positions, carry=None, *, segment_ids=None, deterministic=True):
        """Positions, in training shifted by one number for the whole batch."""
        if self.max_shift and not deterministic:
            positions += jax.random.randint(self.make_rng("encoding"), (), 0, self.max_shift + 1)
        return positions, carry

    def init_state(self, indices, sizes: Sizes):
        """RoPE's angles."""
        return rotary_state(indices, sizes.kv_heads, sizes.head_size, self.base)

    def cache(self, inputs, sizes, state=None):
        """The state of the tokens as they enter the layer."""
        return state

    def rotate(self, query, key):
        """Query and key, multiplied by their states."""
        return multiply_pairs(query.x, query.memory), multiply_pairs(key.x, key.memory)

    def extra_values(self, memory):
        """The states of the keys as values, [B, S, K, H]."""
        return memory.reshape(*memory.shape[:3], math.prod(memory.shape[3:]))

    @nn.compact
    def update_state(self, state, change, mixed):
        """The state after the layer's attention and MLP."""
        heads = state.shape[2]
        zeros, normal = nn.initializers.zeros, nn.initializers.normal(0.02)
        mix = self.param("attention", zeros, (heads, heads), jnp.float32)
        up = self.param("up", zeros, (heads, self.size), jnp.float32)
        inputs = self.param("inputs", normal, (change.shape[-1], self.size), jnp.float32)
        down = self.param("down", normal, (self.size, heads), jnp.float32)
        groups = (*state.shape[:3], mixed.shape[2] // heads, *state.shape[3:])
        mixed = jnp.mean(mixed.astype(jnp.float32).reshape(groups), axis=3)
        if not self.mix_heads:
            mix = jnp.diag(jnp.sum(mix, axis=1))
        exact = jax.lax.Precision.HIGHEST
        state = state + jnp.einsum("btkcp,jk->btjcp", mixed, mix, precision=exact)
        gate = nn.silu(jnp.dot(change.astype(jnp.float32), inputs, precision=exact))
        wide = jnp.einsum("btkcp,ke->btecp", state, up, precision=exact)
        return state + jnp.einsum(
            "btecp,ek->btkcp", gate[..., None, None] * wide, down, precision=exact
        )
