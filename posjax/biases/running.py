"""Descriptions with a running state along the keys, besides Contextual Position Encoding.

Each walks the keys from the query leftwards and carries the sum of what stands between.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.biases.base import Bias, Tile
from posjax.precision import wide
from posjax.types import Array, Bool, Float

__all__ = ["ForgettingBias", "StickBreakingBias"]

# Weights below exp(-104) are 0 in float32, subnormal numbers included.
_NOTHING_LEFT = -104.0
# Finite, so that differences of two excluded logits stay finite.
_EXCLUDED = -1e30


class _RunningSum(Bias):
    """The sum over keys k between j and i of `steps`, which is carried from block to block."""

    has_state: ClassVar = True
    zero_once_finished: ClassVar = True

    def steps(
        self, dots: Array, allowed: Array, current: Array, scale: float
    ) -> tuple[Float[Array, "B N t s"], Float[Array, "#B #N t s"]]:
        """The addition of key k to the sum, and that to the bias of key j alone."""
        raise NotImplementedError

    def dense(self, query, key, *, scale, allowed, query_positions, key_positions):
        """The formula, literally: a sum from the query down to every key."""
        groups = query.shape[2] // key.shape[2]
        key = jnp.repeat(wide(key), groups, axis=2)
        dots = jnp.einsum(
            "btnh,bsnh->bnts",
            wide(query),
            key,
            precision=jax.lax.Precision.HIGHEST,
        )
        current = _current(query_positions, key_positions)
        steps, own = self.steps(dots, allowed, current, scale)
        return jax.lax.cumsum(steps, axis=3, reverse=True) + own

    def start(self, shape, valid):
        """Nothing summed yet; rows of padding are done from the start."""
        carry = jnp.zeros(shape, jnp.float32)
        return carry if valid is None else jnp.where(valid[:, None, :], carry, _EXCLUDED)

    def tile(self, rows, tile: Tile, carry):
        """The block's sums, on top of those on its right; nothing where nothing is left."""
        if carry is None:
            return jnp.full((1, 1, 1, 1), _EXCLUDED, jnp.float32), None
        current = _current(tile.query_positions, tile.key_positions)
        steps, own = self.steps(tile.dots, tile.allowed, current, tile.scale)
        total = jax.lax.cumsum(steps, axis=3, reverse=True) + carry[..., None]
        return total + own, total[..., 0]


def _current(query_positions: Array, key_positions: Array) -> Bool[Array, "#B 1 t s"]:
    """Whether the key is the query's own token."""
    return (query_positions[:, :, None] == key_positions[:, None, :])[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForgettingBias(_RunningSum):
    """Forget gates (Forgetting Transformer): every token between query and key fades the key.

        bias_ij = sum of log_gates_l over the keys l in j + 1 ... i that i may attend to

    Args:
        log_gates: log of each token's gate for each query head, [B, S, N], at most 0.

    References:
        Lin, Nikishin, He, Courville, Forgetting Transformer: Softmax Attention with a Forget Gate,
        arXiv:2503.02130, section 3.

    >>> bias = ForgettingBias(jnp.log(jnp.array([[[0.9], [0.5], [0.8]]])))
    >>> q = jnp.zeros((1, 3, 1, 2))
    >>> allowed, p = jnp.tril(jnp.ones((1, 1, 3, 3), bool)), jnp.arange(3)[None]
    >>> dense = bias.dense(q, q, scale=1, allowed=allowed, query_positions=p, key_positions=p)
    >>> [round(x, 2) for x in jnp.exp(dense[0, 0, 2]).tolist()]
    [0.4, 0.8, 1.0]
    """

    log_gates: Float[Array, "B S N"]

    def steps(self, dots, allowed, current, scale):
        """Each token's gate; a key's own gate does not fade it."""
        gates = jnp.moveaxis(wide(self.log_gates), 2, 1)[:, :, None, :]
        gates = jnp.where(allowed, gates, 0.0)
        return gates, -gates

    def check(self, query, key, is_causal):
        """One gate for each key and query head; causal attention."""
        checks.shape("log_gates", self.log_gates, (query.shape[0], key.shape[1], query.shape[2]))
        _check_causal("forget gates fade keys", is_causal)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StickBreakingBias(_RunningSum):
    """Stick-breaking attention: each key takes its share of what keys on its right have left.

        beta_ij   = sigmoid(scale * q_i . k_j)
        weight_ij = beta_ij * product of (1 - beta_ik) over the keys k in j + 1 ... i - 1

    The weights of a row sum to at most 1 and are not normalised: no softmax. As a bias on the
    logit, whose exponential is the weight: sum of log(1 - beta_ik) over k in j ... i - 1. The walk
    ends where nothing is left in float32: keys further left have weight 0.

    Args:
        attend_current: whether the query's own token takes the first share; the paper and its code
            exclude it.

    References:
        Tan, Yang, Courville, Panda, Shen, Scaling Stick-Breaking Attention: An Efficient
        Implementation and In-depth Study, arXiv:2410.17980, section 2.
    """

    attend_current: bool = dataclasses.field(default=False, metadata={"static": True})
    uses_softmax: ClassVar = False

    def steps(self, dots, allowed, current, scale):
        """log(1 - beta) of each key; the query's own token is excluded."""
        if not self.attend_current:
            allowed = allowed & ~current
        left = jnp.where(allowed, jax.nn.log_sigmoid(-scale * dots), 0.0)
        return left, jnp.where(allowed, 0.0, _EXCLUDED)

    def finished(self, carry):
        """No row has anything left."""
        return jnp.max(carry) < _NOTHING_LEFT

    def check(self, query, key, is_causal):
        """Causal attention."""
        _check_causal("stick-breaking hands out shares from the query leftwards", is_causal)


def _check_causal(what: str, is_causal: bool) -> None:
    if not is_causal:
        raise ValueError(f"{what}, which needs is_causal=True.")
