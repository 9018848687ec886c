"""Encodings that turn pairs of channels of query and key by angles."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.encodings.base import PositionEncoding, Side
from posjax.types import Array, Float, Num

__all__ = ["Layout", "Rotary", "Turn", "check_pairs", "lengths", "turn", "turn_at"]

Layout = Literal["half", "interleaved"]


class Turn(NamedTuple):
    """How far pairs of channels are turned, and their factors."""

    angles: Float[Array, "#B T #N m"]
    scale: Float[Array, "#B T #N m"] | float = 1.0


class Rotary(PositionEncoding):
    """An encoding that turns query and key; a subclass says by which angles.

    It overrides `turn_of`, or `turns` if query and key differ in more than their indices. Its field
    `layout`, if it has one, says which channels are a pair.
    """

    # Without an annotation, which would make it the first field of subclasses that declare it.
    layout = "half"

    def turn_of(self, side: Side) -> Turn:
        """The turn of queries or of keys."""
        raise NotImplementedError(f"{type(self).__name__} must define turn_of or turns.")

    def turns(self, query: Side, key: Side) -> tuple[Turn, Turn]:
        """The turns of queries and of keys."""
        return self.turn_of(query), self.turn_of(key)

    def rotate(self, query, key):
        """Query and key, turned."""
        of_query, of_key = self.turns(query, key)
        return turn(query.x, *of_query, layout=self.layout), turn(
            key.x, *of_key, layout=self.layout
        )


@checks.arguments()
def turn(
    x: Num[Array, "B T N H"],
    angles: Float[Array, "#B T #N m"],
    scale: Float[Array, "#B T #N m"] | float = 1.0,
    *,
    layout: Layout = "half",
) -> Num[Array, "B T N H"]:
    """Turns the first 2 M channels in pairs by M given angles; the others stay.

        (a, b) -> scale_m (a cos(angle_m) - b sin(angle_m), b cos(angle_m) + a sin(angle_m))
        half:        (a, b) are channels m and m + M
        interleaved: (a, b) are channels 2m and 2m + 1

    Returns:
        An array like x, in x's dtype; computed in float32.

    >>> turn(jnp.array([[[[1.0, 0.0]]]]), jnp.full((1, 1, 1, 1), jnp.pi / 2)).round(3).tolist()
    [[[[-0.0, 1.0]]]]
    """
    pairs, size = angles.shape[-1], x.shape[-1]
    wanted = f"at most {size // 2}, those of x with head size {size}"
    checks.require("number of pairs in angles", pairs, 2 * pairs <= size, wanted)
    sin, cos = jnp.sin(angles) * scale, jnp.cos(angles) * scale
    # The two members of a pair get their own axis: before the angles, or behind them.
    axis, shape = (-2, (2, pairs)) if layout == "half" else (-1, (pairs, 2))
    first = x[..., : 2 * pairs].astype(jnp.float32).reshape(*x.shape[:-1], *shape)
    a, b = (jnp.take(first, member, axis=axis) for member in (0, 1))
    first = jnp.stack((a * cos - b * sin, b * cos + a * sin), axis=axis)
    first = first.reshape(*x.shape[:-1], 2 * pairs).astype(x.dtype)
    return first if 2 * pairs == size else jnp.concatenate((first, x[..., 2 * pairs :]), axis=-1)


@checks.arguments()
def turn_at(
    positions: Num[Array, "#B T"],
    frequencies: Float[np.ndarray, "*#N m"],
    scale: Float[Array, "#B T #N m"] | float = 1.0,
) -> Turn:
    """The turn by position * frequency, in float32.

    Args:
        frequencies: [m], or [N, m] for each head.

    >>> turn_at(jnp.array([[3]]), np.array([1.0, 0.5])).angles.tolist()
    [[[[3.0, 1.5]]]]
    """
    frequencies = jnp.asarray(frequencies, jnp.float32)
    frequencies = frequencies.reshape(1, 1, -1, frequencies.shape[-1])
    return Turn(positions.astype(jnp.float32)[:, :, None, None] * frequencies, scale)


@checks.arguments()
def lengths(positions: Num[Array, "B T"]) -> Num[Array, "B"]:
    """How many positions each row has: its greatest one, plus 1."""
    if positions.shape[1] == 0:
        return jnp.zeros_like(positions, shape=positions.shape[:1])
    return jnp.max(positions, axis=1) + 1


@checks.arguments(head_size=checks.at_least(1))
def check_pairs(name: str, head_size: int) -> None:
    """Raises ValueError if the channels of a head do not come in pairs."""
    is_even = head_size % 2 == 0
    checks.require(f"head size of {name}", head_size, is_even, "even, for pairs of channels")
