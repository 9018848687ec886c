"""Biases that depend on the distance alone, as kernels take them: one number for each distance."""

import functools

import jax.numpy as jnp

from posjax.biases.relative import RelativeBias
from posjax.kernels.common import LOG2E
from posjax.kernels.host import relatives
from posjax.masks import Mask
from posjax.problem import Problem
from posjax.types import Array, Bool, Float, Int

__all__ = ["by_distance", "positions_are_contiguous"]


def positions_are_contiguous(problem: Problem) -> Bool[Array, ""] | None:
    """Whether the kernels may take each relative bias for a function of the places in memory.

    The distances of all visible pairs are then those of their places, and a shift: positions rise
    by one throughout, or, in packed sequences, in each segment, from the same position in queries
    and keys. None if there is no relative bias.
    """
    biases = relatives(problem.bias)
    if not biases:
        return None
    return functools.reduce(jnp.logical_and, (_are_contiguous(x, problem.mask) for x in biases))


def _are_contiguous(bias: RelativeBias, mask: Mask) -> Bool[Array, ""]:
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
