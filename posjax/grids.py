"""Indices on a grid: which row and column does each token of a flattened grid have?"""

import math

import jax.numpy as jnp

from posjax import checks
from posjax.types import Array, Num

__all__ = ["grid_positions"]


@checks.arguments(shape=checks.at_least(1))
def grid_positions(positions: Num[Array, "B T"], shape: tuple[int, ...]) -> Num[Array, "B T M"]:
    """Coordinates of places in a grid that is read row by row (the last axis runs fastest).

        x_m = floor(position / (shape_{m+1} * ... * shape_M)) mod shape_m         m = 1 ... M

    The first axis has no end: its coordinate is not taken modulo shape_1, so that a place beyond
    the grid is in a further row. Fractions of a place (floats) move the last coordinate.

    Args:
        shape: sizes of the axes; each at least 1.

    Returns:
        Coordinates in the dtype of `positions`.

    Raises:
        ValueError: an empty shape, or a size below 1.

    >>> grid_positions(jnp.array([[0, 4, 5, 13]]), (2, 5)).tolist()
    [[[0, 0], [0, 4], [1, 0], [2, 3]]]
    """
    axes = []
    for axis, size in enumerate(shape):
        step = math.prod(shape[axis + 1 :])
        last = axis + 1 == len(shape)
        coordinate = positions if last else positions // step
        axes.append(coordinate if axis == 0 else coordinate % size)
    return jnp.stack(axes, axis=-1)
