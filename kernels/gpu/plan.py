"""What the GPU kernels know when they are compiled."""

import dataclasses

from posjax.kernels.blocks import GpuBlocks

__all__ = ["GROUPS", "ROWS", "Contextual", "Plan"]

# Queries of a warpgroup: the rows of its matrix instructions.
ROWS = 64
# Warpgroups that compute; one more fetches.
GROUPS = 2


@dataclasses.dataclass(frozen=True)
class Contextual:
    """The static part of a contextual bias.

    `positions` is P; `gate_scale` multiplies products of query and (gate) key.
    """

    positions: int
    gate_scale: float
    own_gate_key: bool
    gate_bias: bool

    @property
    def gate_unit(self) -> float:
        """U, a power of two of at least P: kernels hold gates as g / U.

        As float16 with its 11 bits these are whole multiples of 2^-24, so gates are of U / 2^24,
        and sums of them below P have at most 24 bits: they are exact in whatever order. The
        backward pass relies on that to tell which key is the last one of its bin.
        """
        return 2.0 ** max(1, (self.positions - 1).bit_length())

    @property
    def last(self) -> float:
        """The place (count less 1/2) at which every count of P - 1 or more stands.

        It lies in the table's last bin, whose bias and slope are 0.
        """
        return self.positions - 1.25

    @property
    def finished(self) -> float:
        """The place from which on the bias is 0."""
        return self.positions - 1.5


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call; arrays are padded to whole blocks.

    `queries` is the number of real queries; `relative` tells whether there is a bias of the
    distance, see `bands`, and `trained` whether it has arrays to train; `emulated` tells that the
    interpreter runs the kernels, see `instructions`.
    """

    scale: float
    blocks: GpuBlocks
    queries: int
    is_causal: bool
    window: tuple[int, int] | None
    segments: bool
    contextual: Contextual | None
    relative: bool = False
    trained: bool = False
    emulated: bool = False

    @property
    def restricted(self) -> bool:
        """Whether some query may not attend to some key."""
        return self.is_causal or self.window is not None or self.segments
