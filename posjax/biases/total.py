"""Several descriptions added up."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from posjax.biases.base import Bias

__all__ = ["BiasSum", "addends"]


def addends(bias: Bias | None) -> list[Bias]:
    """The descriptions that a bias adds up, sums within sums too; none for None."""
    if isinstance(bias, BiasSum):
        return [one for part in bias.parts for one in addends(part)]
    return [] if bias is None else [bias]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BiasSum(Bias):
    """The sum of several descriptions.

    Only parts with a running state are left out once they have finished.
    """

    parts: tuple[Bias, ...]
    axes: ClassVar = {}

    @property
    def runs(self) -> bool:
        """Whether a part has a running state."""
        return any(part.runs for part in self.parts)

    @property
    def ends(self) -> bool:
        """Whether the walk may end where all parts with a running state have finished."""
        return any(part.ends for part in self.parts)

    @property
    def has_values(self) -> bool:
        """Whether a part adds to the weighted values."""
        return any(part.has_values for part in self.parts)

    def dense(self, query, key, **context):
        """The sum of the parts' arrays."""
        return sum(part.dense(query, key, **context) for part in self.parts)

    def rows(self, query):
        """The rows of each part."""
        return tuple(part.rows(query) for part in self.parts)

    def start(self, shape, valid):
        """The running state of each part."""
        return tuple(part.start(shape, valid) for part in self.parts)

    def tile(self, rows, tile, carry):
        """The sum of the parts' blocks."""
        carries = (None,) * len(self.parts) if carry is None else carry
        done = [p.tile(r, tile, c) for p, r, c in zip(self.parts, rows, carries, strict=True)]
        after = None if carry is None else tuple(c for _, c in done)
        return sum(block for block, _ in done), after

    def weigh(self, rows, tile, weights):
        """The sum of what the parts add."""
        pairs = zip(self.parts, rows, strict=True)
        return sum(p.weigh(r, tile, weights) for p, r in pairs if p.has_values)

    def finished(self, carry):
        """Whether every part with a running state is finished."""
        pairs = zip(self.parts, carry, strict=True)
        return jnp.all(jnp.stack([part.finished(c) for part, c in pairs if part.runs]))

    def check(self, query, key, is_causal):
        """Each part checks itself; a part that is no softmax stands alone."""
        alone = [type(part).__name__ for part in self.parts if not part.normalised]
        if alone:
            raise ValueError(
                f"{alone[0]} replaces softmax, so other biases cannot be added to it; use it alone."
            )
        for part in self.parts:
            part.check(query, key, is_causal)

    def pad(self, queries, keys):
        """Each part padded."""
        return BiasSum(tuple(part.pad(queries, keys) for part in self.parts))

    def block(self, *where):
        """Each part's block."""
        return BiasSum(tuple(part.block(*where) for part in self.parts))

    def map_axes(self, on_axes, elsewhere):
        """Each part mapped."""
        return BiasSum(tuple(part.map_axes(on_axes, elsewhere) for part in self.parts))

    def can_split_heads(self, parts):
        """Whether all parts can."""
        return all(part.can_split_heads(parts) for part in self.parts)

    def map_heads(self, function, others):
        """Each part mapped."""
        pairs = zip(self.parts, others.parts, strict=True)
        return BiasSum(tuple(part.map_heads(function, other) for part, other in pairs))

    def own_heads(self, part, parts):
        """Each part's own heads."""
        return BiasSum(tuple(one.own_heads(part, parts) for one in self.parts))

    def add_block(self, part, query_start, key_start):
        """Each part's gradients added."""
        pairs = zip(self.parts, part.parts, strict=True)
        return BiasSum(tuple(total.add_block(new, query_start, key_start) for total, new in pairs))
