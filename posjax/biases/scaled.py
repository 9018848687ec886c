"""A description multiplied by a number."""

import dataclasses

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.biases.base import Bias, Tile
from posjax.precision import wide
from posjax.types import Array, Num

__all__ = ["ScaledBias"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledBias(Bias):
    """A description times a number, for queries that may have been multiplied before attention.

        bias_ij = factor * inner bias_ij of the query / query_factor

    With factor = query_factor = 1 / tau, and queries multiplied by 1 / tau, whole logits are
    divided by tau, while whatever the inner description reads from the queries (the gates of CoPE,
    products with a table) is as it was. What it adds to the values is not multiplied.

    Args:
        bias: the inner description, with a softmax; its gradients pass through.
        factor: above 0.
        query_factor: what the queries were multiplied by; above 0.

    >>> from posjax.biases.base import ArrayBias
    >>> bias = ScaledBias(ArrayBias(jnp.ones((1, 1, 1, 1))), factor=2.0)
    >>> q, p = jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1))
    >>> context = {"scale": 1.0, "allowed": None, "query_positions": p, "key_positions": p}
    >>> bias.dense(q, q, **context).tolist()
    [[[[2.0]]]]
    """

    bias: Bias
    factor: float = dataclasses.field(metadata={"static": True})
    query_factor: float = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def has_state(self) -> bool:
        """Whether the inner description has a running state."""
        return self.bias.has_state

    @property
    def zero_once_finished(self) -> bool:
        """Whether weights that had become 0 still are: not where the bias has become smaller."""
        return self.bias.zero_once_finished and self.factor >= 1

    @property
    def has_values(self) -> bool:
        """Whether the inner description adds to the weighted values."""
        return self.bias.has_values

    @property
    def uses_softmax(self) -> bool:
        """Whether the inner description uses a softmax; else `check` refuses it."""
        return self.bias.uses_softmax

    def dense(self, query, key, **context):
        """The inner array, times the factor."""
        return self.factor * self.bias.dense(self._original(query), key, **context)

    def rows(self, query):
        """Those of the inner description, for the queries as they were."""
        return self.bias.rows(self._original(query))

    def start(self, shape, valid):
        """As the inner description."""
        return self.bias.start(shape, valid)

    def tile(self, rows, tile, carry):
        """The inner block, times the factor."""
        block, carry = self.bias.tile(rows, self._original_tile(tile), carry)
        return self.factor * block, carry

    def weigh(self, rows, tile, weights):
        """The addition of the inner description."""
        return self.bias.weigh(rows, self._original_tile(tile), weights)

    def finished(self, carry):
        """As the inner description; never where it ends the walk and this does not."""
        return (
            jnp.asarray(False)
            if self.bias.zero_once_finished != self.zero_once_finished
            else self.bias.finished(carry)
        )

    def check(self, query, key, is_causal):
        """The inner description checks itself; it must use a softmax."""
        for name in ("factor", "query_factor"):
            checks.number(f"ScaledBias.{name}", getattr(self, name), above=0)
        if not self.uses_softmax:
            inner = type(self.bias).__name__
            raise ValueError(f"{inner} has no softmax, so its logits cannot be scaled.")
        self.bias.check(query, key, is_causal)

    def _original(self, query: Num[Array, "*B H"]) -> Num[Array, "*B H"]:
        if self.query_factor == 1.0:
            return query
        return wide(query) / self.query_factor

    def _original_tile(self, tile: Tile) -> Tile:
        if self.query_factor == 1.0:
            return tile
        dots = tile.dots / self.query_factor
        return tile._replace(query=self._original(tile.query), dots=dots)
