"""Several descriptions added up."""

import dataclasses

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.biases.base import Bias

__all__ = ["BiasSum", "addends"]


def addends(bias: Bias | None) -> list[Bias]:
    """The descriptions that a bias adds up, sums within sums too; none for None."""
    checks.instance("bias", bias, Bias, optional=True)
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

    @property
    def has_state(self) -> bool:
        """Whether a part has a running state."""
        return any(part.has_state for part in self.parts)

    @property
    def zero_once_finished(self) -> bool:
        """Whether the walk may end where all parts with a running state have finished."""
        return any(part.zero_once_finished for part in self.parts)

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
        return jnp.all(jnp.stack([part.finished(c) for part, c in pairs if part.has_state]))

    def check(self, query, key, is_causal):
        """Each part checks itself; a part that is no softmax stands alone."""
        wanted = "a tuple of one or more descriptions"
        holds = isinstance(self.parts, tuple) and len(self.parts) > 0
        checks.require("BiasSum.parts", self.parts, holds, wanted)
        alone = [type(part).__name__ for part in self.parts if not part.uses_softmax]
        if alone:
            raise ValueError(
                f"{alone[0]} replaces softmax, so other biases cannot be added to it; use it alone."
            )
        for part in self.parts:
            part.check(query, key, is_causal)
