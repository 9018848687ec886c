"""One problem, and every description of a bias with arrays that fit it."""

import jax
import jax.numpy as jnp

from posjax import (
    ArrayBias,
    BiasSum,
    ClippedTableBias,
    ContextualBias,
    ForgettingBias,
    GroupedBias,
    MultiplierBias,
    ProductBias,
    RelativeBias,
    ScaledBias,
    SinusoidBias,
    StickBreakingBias,
)
from tests.cases import linear

__all__ = ["ARRAYS", "DESCRIPTIONS", "floats"]

B, T, N, K, H, P = 4, 9, 4, 2, 8, 5


def _draw(number: int, *shape: int):
    return jax.random.normal(jax.random.key(number), shape)


# Query, key and value.
ARRAYS = _draw(0, B, T, N, H), _draw(1, B, T, K, H), _draw(2, B, T, K, H)
_PLACES = jnp.arange(T, dtype=jnp.int32)[None]
_WAVE = jnp.cos(jnp.pi * jnp.linspace(0.0, 1.0, P))[:, None]


def _cope(**settings):
    return ContextualBias(0.3 * _WAVE * _draw(3, 1, H), **settings)


def _forgetting():
    return ForgettingBias(jax.nn.log_sigmoid(_draw(4, B, T, N)))


# All of them are for causal attention.
DESCRIPTIONS = {
    "none": None,
    "array": ArrayBias(_draw(5, B, N, T, T)),
    "broadcast array": ArrayBias(_draw(6, B, 1, 1, T)),
    "contextual": _cope(gate_bias=jnp.float32(-0.3)),
    "contextual, own gates": ContextualBias(
        0.3 * _WAVE[None] * _draw(7, N, 1, H), _draw(8, B, T, K, H), 0.1 * _draw(9, N)
    ),
    "relative": RelativeBias(linear, jnp.linspace(0.1, 0.5, N), distance_only=True),
    "relative, own positions": RelativeBias(linear, jnp.ones(N), 2 * _PLACES, 2 * _PLACES),
    "forgetting": _forgetting(),
    "stick-breaking": StickBreakingBias(),
    "clipped table": ClippedTableBias(
        _draw(10, P, H), _draw(11, P, H), _draw(12, P, H), key=ARRAYS[1], clip=(P - 1, 0)
    ),
    "multiplier": MultiplierBias(1.0 + 0.1 * _draw(13, N, P), clip=(P - 1, 0)),
    "multiplier by channel": MultiplierBias(
        1.0 + 0.1 * _draw(14, P, H), ARRAYS[1], clip=(P - 1, 0), by_channel=True
    ),
    "product": ProductBias(_draw(15, B, T, N, H), _draw(16, B, T, 1, H), 0.1 * _draw(17, N)),
    "sinusoid": SinusoidBias(_draw(18, 6, N, H), 0.1 * _draw(19, N, H), _draw(20, B, T, N)),
    "grouped": GroupedBias(*ARRAYS[:2], _PLACES, _PLACES, window=4),
    "sum": BiasSum((_cope(), _forgetting())),
    "scaled": ScaledBias(_cope(), 0.5, 2.0),
}


def floats(tree) -> list:
    """The floating-point arrays of a tree of gradients."""
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
