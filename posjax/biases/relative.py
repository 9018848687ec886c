"""Functions of two positions: ALiBi, T5, KERPLE, FIRE, Sandwich, ..."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.biases.base import Bias, check_positions
from posjax.precision import wide
from posjax.types import Array, Num, PyTree

__all__ = ["RelativeBias"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RelativeBias(Bias):
    """A bias that depends on the positions of query and key alone: ALiBi, T5, KERPLE, FIRE, ...

        bias[n, i, j] = function(params, query position i, key position j)[n]

    Args:
        function: maps (params, query positions [#B, t], key positions [#B, s]) to float32 [#B, N,
            t, s]. It must be hashable by value (a module-level function, or a frozen dataclass with
            `__call__`), so that equal descriptions are compiled once.
        params: arrays of the function; they receive gradients.
        query_positions: positions to use instead of those of the attention call, [B or 1, T]; no
            gradient.
        key_positions: likewise, [B or 1, S].
        distance_only: whether the function depends on the difference of the two positions alone,
            query position - key position. Only such biases run in the TPU and GPU kernels.

    >>> def distance(slope, i, j):
    ...     return -slope * (i[:, None, :, None] - j[:, None, None, :])
    >>> bias = RelativeBias(distance, jnp.float32(0.5))
    """

    function: Callable[..., Array] = dataclasses.field(metadata={"static": True})
    params: PyTree = None
    query_positions: Num[Array, "#B T"] | None = None
    key_positions: Num[Array, "#B S"] | None = None
    distance_only: bool = dataclasses.field(default=False, metadata={"static": True})

    def dense(self, query, key, *, scale, allowed, query_positions, key_positions):
        """The function at all pairs of positions."""
        return self._evaluate(query_positions, key_positions)

    def tile(self, rows, tile, carry):
        """The function at the block's positions."""
        return self._evaluate(tile.query_positions, tile.key_positions), None

    def check(self, query, key, is_causal):
        """The function must give [B or 1, N, T, S]; own positions must match T and S."""
        check_positions(self, query, key)
        one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        try:
            got = jax.eval_shape(self.function, self.params, one, one).shape
        except Exception as error:
            wanted = f"what its function takes with positions of shape (1, 1) ({error})"
            checks.require("RelativeBias.params", self.params, False, wanted)
        if len(got) != 4 or got[1] not in (1, query.shape[2]):
            raise ValueError(
                f"RelativeBias.function gives {got} for one query and one key; it must give "
                f"[1, N, 1, 1] with N = {query.shape[2]} query heads."
            )

    def own_heads(self, part, parts):
        """The same function, of whose heads some are taken."""
        return dataclasses.replace(
            self, function=_SomeHeads(self.function, parts), params=(self.params, part)
        )

    def _evaluate(self, query_positions: Array, key_positions: Array) -> Array:
        own_query, own_key = self.query_positions, self.key_positions
        query_positions = query_positions if own_query is None else own_query
        key_positions = key_positions if own_key is None else own_key
        return wide(self.function(self.params, query_positions, key_positions))


@dataclasses.dataclass(frozen=True)
class _SomeHeads:
    """One of `parts` equal parts of the heads of a function for `RelativeBias`."""

    function: Callable[..., Array]
    parts: int

    def __call__(self, params: PyTree, query_positions: Array, key_positions: Array) -> Array:
        """`params` are those of the function, and the number of the part."""
        inner, part = params
        found = self.function(inner, query_positions, key_positions)
        if found.shape[1] == 1:
            return found
        size = found.shape[1] // self.parts
        return jax.lax.dynamic_slice_in_dim(found, part * size, size, axis=1)
