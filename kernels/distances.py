"""Biases that depend on the distance alone, as kernels take them: one number for each distance."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from posjax.biases.base import Bias
from posjax.biases.relative import RelativeBias
from posjax.kernels import blockwise
from posjax.kernels.blocks import blockwise_sizes
from posjax.kernels.common import LOG2E
from posjax.masks import Mask
from posjax.types import Array, Bool, Float, Int, Num

__all__ = ["by_distance", "is_regular", "where_regular"]


def is_regular(bias: RelativeBias, mask: Mask) -> Bool[Array, ""]:
    """Whether the distances of all visible pairs are those of their places in memory, and a shift.

    So it is where positions rise by one throughout, and in packed sequences where they do so in
    each segment, from the same position in queries and keys.
    """
    query, key = _positions(bias, mask)
    query, key = (x - jnp.arange(x.shape[1])[None] for x in (query, key))
    steady = jnp.all(query == query[:, :1]) & jnp.all(key == key[:, :1])
    ids, others = mask.query.segment_ids, mask.key.segment_ids
    if ids is None or ids.shape != others.shape or query.shape[1] != key.shape[1]:
        return steady
    runs, kinds = (jnp.sum(x[:, 1:] != x[:, :-1], axis=1) for x in (ids, jnp.sort(ids, axis=1)))
    inside = ids[:, 1:] == ids[:, :-1]
    packed = jnp.all(ids == others) & jnp.all(runs == kinds) & jnp.all(query == key)
    return steady | (packed & jnp.all(~inside | (query[:, 1:] == query[:, :-1])))


def where_regular(
    run: Callable[..., Array],
    relatives: list[RelativeBias],
    query: Num[Array, "B T N H"],
    key: Num[Array, "B S K H"],
    value: Num[Array, "B S K E"],
    bias: Bias,
    mask: Mask,
    scale: float,
) -> Num[Array, "B T N E"]:
    """`run(query, key, value, bias, mask)`, or `kernels.blockwise` where positions are irregular.

    Args:
        relatives: those of the bias that depend on the distance.
    """
    sizes = blockwise_sizes(query.shape[1], key.shape[1])
    instead = functools.partial(blockwise.attention, scale=scale, blocks=sizes)
    regular = functools.reduce(jnp.logical_and, (is_regular(x, mask) for x in relatives))
    if not isinstance(regular, jax.core.Tracer):
        return (run if regular else instead)(query, key, value, bias, mask)
    return jax.lax.cond(regular, run, instead, query, key, value, bias, mask)


def by_distance(
    biases: list[RelativeBias], mask: Mask, places: Int[Array, "x"]
) -> Float[Array, "#B #N x"]:
    """The sum of the biases, in units of ln 2.

    Args:
        mask: of the real tokens, for their positions.
        places: place of the query in memory less that of the key.
    """
    # Beyond the real tokens nothing is visible, and a function need not be defined.
    places = jnp.clip(places, 1 - mask.key.length, mask.query.length - 1)[None]

    def one(bias: RelativeBias) -> Array:
        query, key = _positions(bias, mask)
        packed = jnp.any(query[:, 1:] - query[:, :-1] != 1, axis=1, keepdims=True)
        shift = jnp.where(packed, 0, query[:, :1] - key[:, :1])
        origin = jnp.zeros((1, 1), shift.dtype)
        return bias.function(bias.params, places + shift, origin)[..., 0].astype(jnp.float32)

    return sum(map(one, biases)) * LOG2E


def _positions(bias: RelativeBias, mask: Mask) -> tuple[Array, Array]:
    query, key = bias.query_positions, bias.key_positions
    return (
        mask.query.positions if query is None else query,
        mask.key.positions if key is None else key,
    )
