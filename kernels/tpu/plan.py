"""Static settings of the kernels."""

import dataclasses

import jax.numpy as jnp

from posjax.kernels.host import CopeSettings, Settings
from posjax.types import Array

__all__ = [
    "LANES",
    "CopePlan",
    "Plan",
    "interleave",
]

# Lanes of a vector register.
LANES = 128


@dataclasses.dataclass(frozen=True)
class CopePlan(CopeSettings):
    """The static part of a contextual bias.

    Args:
        packed: the form of the tables, see `tables`.
        newton: the form of the gates, see `counting.gate`.
    """

    packed: bool
    newton: bool

    @property
    def last(self) -> float:
        """The count from which on the bias is 0."""
        return float(self.positions - 1)


class Plan(Settings):
    """Everything static about one call."""

    @property
    def row_groups(self) -> list[slice]:
        """Some queries at a time, so that what is computed for them stays in registers."""
        return self._groups(self.blocks.rows or self.blocks.query)

    @property
    def lane_groups(self) -> list[slice]:
        """Likewise for arrays in which 8 queries have one register, not one for each chunk."""
        return self._groups(self.blocks.lane_rows or self.blocks.query)

    def _groups(self, size: int) -> list[slice]:
        return [slice(start, start + size) for start in range(0, self.blocks.query, size)]

    @property
    def chunks(self) -> int:
        """C: vector registers side by side in a block of keys."""
        return self.blocks.key // LANES

    @property
    def pieces(self) -> int:
        """Vector registers side by side that hold a query's table: at least P + C entries."""
        return -(-(self.cope.positions + self.chunks) // LANES)


def interleave(x: Array, axis: int, plan: Plan) -> Array:
    """Keys in the kernels' order: in a block, lane l of chunk c holds key l * C + c.

    Neighbours in the sequence then lie in the same lane of different registers, and a running sum
    over them is an addition of registers. Attention does not mind the order of keys.

    >>> from posjax.kernels.host import CopeSettings, Settings
    >>> plan = Plan(1.0, TpuBlocks(128, 256), 1, True, None, False, None)
    >>> interleave(jnp.arange(256), 0, plan)[jnp.array([0, 1, 128, 129])].tolist()
    [0, 2, 1, 3]
    """
    axis %= x.ndim
    shape = x.shape
    split = (*shape[:axis], -1, LANES, plan.chunks, *shape[axis + 1 :])
    return jnp.swapaxes(x.reshape(split), axis + 1, axis + 2).reshape(shape)
