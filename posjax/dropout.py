"""Dropout of attention weights, the same whatever blocks it is computed in."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.axes import Lettered, block_of
from posjax.types import Array, Float, Int

__all__ = ["Dropout"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout(Lettered):
    """Weights are set to 0 with probability `rate`, and the others divided by 1 - rate.

    Whether a weight is dropped depends on the key and on the place of the pair alone: query, key
    and, without `broadcast_dropout`, sequence and head. So all implementations, all block sizes and
    all meshes drop the same weights. It is not the draw of Flax for the same key.

    Args:
        key: the data of a random key.
        batch: number of each sequence; [1] if all drop alike.
        heads: number of each query head; [1] likewise.
        queries: number of each query.
        keys: number of each key.
        kind: the random number generator, as `jax.random.key_impl` names it.
    """

    key: Array
    batch: Int[Array, "#B"]
    heads: Int[Array, "#N"]
    queries: Int[Array, "T"]
    keys: Int[Array, "S"]
    rate: float = dataclasses.field(metadata={"static": True})
    kind: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls, key: Array, rate: float, shape: tuple[int, int, int, int], *, broadcast: bool
    ) -> Self:
        """Dropout for attention weights of `shape` [B, N, T, S].

        Args:
            key: a random key, typed or raw.
            broadcast: whether all sequences and heads drop the same pairs.

        Raises:
            ValueError: no key.
        """
        key = checks.key("dropout_rng", key, "a random key, since weights are dropped")
        batch, heads, queries, keys = shape
        numbers = (1, 1, queries, keys) if broadcast else (batch, heads, queries, keys)
        counted = (jnp.arange(number, dtype=jnp.int32) for number in numbers)
        return cls(jax.random.key_data(key), *counted, rate=rate, kind=jax.random.key_impl(key))

    def pad(self, queries: int, keys: int) -> Self:
        """With numbers for `queries` and `keys` more, which nothing sees."""
        return dataclasses.replace(
            self, queries=jnp.pad(self.queries, (0, queries)), keys=jnp.pad(self.keys, (0, keys))
        )

    def block(self, query_start: Any, query_size: int, key_start: Any, key_size: int) -> Self:
        """The dropout of a block of queries and keys."""
        where = {"T": (query_start, query_size), "S": (key_start, key_size)}
        return self.map_arrays(lambda letters, x: block_of(letters, x, where))

    def factors(self) -> Float[Array, "#B #N T S"]:
        """0 for the weights that are dropped, 1 / (1 - rate) for the others."""
        if self.rate == 1.0:
            return jnp.zeros((1, 1, self.queries.size, self.keys.size), jnp.float32)
        key = jax.random.wrap_key_data(self.key, impl=self.kind)
        for numbers in (self.batch, self.heads, self.queries, self.keys):
            key = _folded(key, numbers)
        kept = _each(lambda one: jax.random.bernoulli(one, 1.0 - self.rate), key)
        return kept.astype(jnp.float32) / (1.0 - self.rate)


def _folded(keys: Array, numbers: Int[Array, "n"]) -> Array:
    """Keys [*shape] -> [*shape, n]: each folded with each number."""
    flat = keys.reshape(-1)
    both = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(flat, numbers)
    return both.reshape(*keys.shape, numbers.size)


def _each(function: Any, keys: Array) -> Array:
    """The function of each key."""
    return jax.vmap(function)(keys.reshape(-1)).reshape(keys.shape)
