"""Axial RoPE: on a grid, each axis turns its own share of the channels."""

from typing import Self

import jax.numpy as jnp

from posjax import checks
from posjax.encodings.rotary import Layout, Rotary, Turn, turn
from posjax.frequencies import rope_frequencies
from posjax.grids import grid_positions
from posjax.types import Array, Num

__all__ = ["AxialRoPE", "axial_rotate", "axial_turn"]


@checks.arguments(base=checks.above(1))
def axial_rotate(
    x: Num[Array, "B T N H"],
    positions: Num[Array, "#B T M"],
    *,
    base: float = 10_000.0,
    layout: Layout = "half",
) -> Num[Array, "B T N H"]:
    """Turns pairs of channels, an equal share of them by each of M coordinates.

        angle of pair a P + m = position_a * base^(-m / P)     P = H / (2 M) pairs for each axis
        a = 0 ... M - 1,  m = 0 ... P - 1

    The score of a query and a key then depends on the difference of their coordinates only.

    Returns:
        An array like x, in x's dtype.

    Raises:
        ValueError: 2 M does not divide the head size.

    >>> axial_rotate(jnp.ones((1, 1, 1, 4)), jnp.array([[[0, 0]]])).tolist()
    [[[[1.0, 1.0, 1.0, 1.0]]]]
    """
    return turn(x, *axial_turn(positions, x.shape[-1], base), layout=layout)


@checks.arguments(head_size=checks.size(), base=checks.above(1))
def axial_turn(positions: Num[Array, "#B T M"], head_size: int, base: float = 10_000.0) -> Turn:
    """The turn of `axial_rotate`.

    >>> axial_turn(jnp.array([[[2, 3]]]), 4).angles.tolist()
    [[[[2.0, 3.0]]]]
    """
    axes = positions.shape[-1]
    if head_size % (2 * axes):
        raise ValueError(
            f"head size is {head_size}; {axes} axes of pairs need a multiple of {2 * axes}."
        )
    frequencies = jnp.asarray(rope_frequencies(head_size // axes, base), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, None, :]
    return Turn(angles.reshape(*positions.shape[:2], 1, head_size // 2))


class AxialRoPE(Rotary):
    """RoPE in two dimensions: half of the channels turned by the row, half by the column.

        index -> (row, column) = (floor(index / width), index mod width)
        logit_ij = H^-0.5 rotate(q_i, row_i, column_i) . rotate(k_j, row_j, column_j)

    `axial_rotate` is the pure form for any number of axes. It concatenates the angles of the axes
    and then pairs channels, as RoPE-ViT's code does with the interleaved layout, and the vision
    towers of Qwen2-VL with halves. The paper's learned directions ("mixed") are not here; those
    that commute are `ComRoPE`.

    Every row is defined. Beyond the trained rows the slow pairs reach angles never seen.

    Tested live against Hugging Face's Qwen2-VL, and against the formula.

    Args:
        width: columns of the grid; at least 1.
        base: above 1; 100 in RoPE-ViT, since images have few rows.
        layout: which channels are a pair, see `posjax.encodings.rotary.turn`.

    References:
        Heo, Park, Han, Yun, Rotary Position Embedding for Vision Transformer, arXiv:2403.13298,
        section 3.

    >>> tokens, places = jnp.zeros((1, 4), int), jnp.array([[0, 1, 2, 3]])
    >>> AxialRoPE(width=3).apply({}, tokens, places, method="positions")[0].tolist()
    [[[0, 0], [0, 1], [0, 2], [1, 0]]]
    """

    width: int = 16
    base: float = 10_000.0
    layout: Layout = "half"

    def __post_init__(self):
        checks.fields(self, width=checks.at_least(1), base=checks.above(1))
        super().__post_init__()

    @classmethod
    def vit(cls) -> Self:
        """RoPE-ViT's setting for patches of 16 in images of 224: 14 columns and base 100."""
        return cls(width=14, base=100.0, layout="interleaved")

    def positions(self, tokens, positions, carry=None, *, segment_ids=None, deterministic=True):
        """Row and column of each token, [B, T, 2]."""
        return grid_positions(positions, (1, self.width)), carry

    def turn_of(self, side):
        """The angles of row and column."""
        return axial_turn(side.indices, side.x.shape[-1], self.base)
