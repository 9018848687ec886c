"""Static settings of the kernels."""

import dataclasses

from posjax.kernels.host import CopeSettings, Settings

__all__ = ["GROUPS", "ROWS", "STEP_KEYS", "TILE_KEYS", "CopePlan", "Plan"]

# Queries of a warpgroup: the rows of its matrix instructions.
ROWS = 64
# Warpgroups that compute; one more fetches.
GROUPS = 2
# Keys of a tile of the backward kernels; the forward kernel saves the places on the right of each.
TILE_KEYS = 32
# Keys of a step of the backward loops: two tiles.
STEP_KEYS = 2 * TILE_KEYS


class CopePlan(CopeSettings):
    """The static part of a contextual bias."""

    @property
    def gate_quantum(self) -> float:
        """U, a power of two of at least P: kernels hold gates as g / U.

        As float16 with its 11 bits these are whole multiples of 2^-24, so gates are of U / 2^24,
        and sums of them below P have at most 24 bits: they are exact in any order. The backward
        pass relies on that to tell which key is the last one of its bin.
        """
        return 2.0 ** max(1, (self.positions - 1).bit_length())

    @property
    def last_place(self) -> float:
        """The place (count less 1/2) of all counts of P - 1 or more.

        It lies in the table's last bin, whose bias and slope are 0.
        """
        return self.positions - 1.25

    @property
    def saturated_place(self) -> float:
        """The place from which on the bias is 0."""
        return self.positions - 1.5


@dataclasses.dataclass(frozen=True)
class Plan(Settings):
    """Everything static about one call.

    Args:
        trains_relative: whether the bias of the distance has arrays to train.
        emulated: whether the interpreter runs the kernels, see `products`.
    """

    trains_relative: bool = False
    emulated: bool = False
