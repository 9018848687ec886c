"""Learned absolute positions: a trained vector for every position, added to the embeddings."""

from typing import ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.encodings.base import PositionEncoding
from posjax.positions import LengthError, check_length
from posjax.types import Array, Float, Num

__all__ = ["Learned", "lookup", "shrink"]


@checks.arguments()
def lookup(table: Float[Array, "P D"], positions: Num[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of a table of positions, never silently a wrong one.

        whole p:     table[p]
        fraction:    (1 - f) table[i] + f table[i + 1]        i = floor(p), f = p - i
        above P - 1: table[P - 1]                             fractions between P - 1 and P

    A compiled program cannot raise, so inside `jax.jit` a position outside 0 <= p < P gives a row
    of NaN, which the loss shows at once; if positions are known it raises.

    Raises:
        posjax.positions.LengthError: a known position outside the table.

    >>> lookup(jnp.ones((2, 1)), jnp.array([[0, 1]])).shape
    (1, 2, 1)
    >>> jax.jit(lookup)(jnp.ones((2, 1)), jnp.array([[1, 2, -1]])).tolist()
    [[[1.0], [nan], [nan]]]
    >>> lookup(jnp.array([[0.0], [8.0]]), jnp.array([[0.25, 1.75]])).tolist()
    [[[2.0], [8.0]]]
    """
    rows = table.shape[0]
    _refuse_known(positions, rows)
    if jnp.issubdtype(positions.dtype, jnp.integer):
        # A negative index would count from the end.
        return _rows(table, jnp.where(positions < 0, rows, positions))
    positions = positions.astype(jnp.float32)
    inside = (positions >= 0) & (positions < rows)
    below = jnp.where(inside, jnp.floor(positions), rows)
    fraction = jnp.where(inside, positions - below, 0)[:, :, None]
    index = below.astype(jnp.int32)
    above = jnp.where(inside, jnp.minimum(index + 1, rows - 1), rows)
    return (1 - fraction) * _rows(table, index) + fraction * _rows(table, above)


@checks.arguments(length=checks.at_least(1), rows=checks.at_least(1))
def shrink(positions: Num[Array, "B T"], length: int, rows: int) -> Float[Array, "B T"]:
    """Places of positions 0 ... length - 1 in a table of fewer rows, its ends on their ends.

        place = min(position * (rows - 1) / (length - 1), rows - 1)

    Returns:
        float32; NaN outside 0 <= position < length in a compiled program.

    Raises:
        posjax.positions.LengthError: a known position outside.

    >>> shrink(jnp.array([[0, 1, 4]]), 5, 3).tolist()
    [[0.0, 0.5, 2.0]]
    """
    _refuse_known(positions, length)
    inside = (positions >= 0) & (positions < length)
    place = positions.astype(jnp.float32) * ((rows - 1) / (length - 1))
    return jnp.where(inside, jnp.minimum(place, rows - 1), jnp.nan)


class Learned(PositionEncoding):
    """Adds row p of a trained table to the embedding of the token at position p.

        embedding_p + table[p]
        embedding_p + table[p * (max_length - 1) / (interpolate_to - 1)]    with `interpolate_to`

    Fractions of a row are interpolated linearly, those of fractional positions too (`lookup`). With
    `interpolate_to` a table trained on max_length positions serves more of them: this is PyTorch's
    F.interpolate(mode="linear", align_corners=True), against which it is tested; vision
    transformers do the same with half-pixel corners and two axes. A model should be trained on a
    little after.

    There is no row beyond the last position: a longer sequence raises
    `posjax.positions.LengthError` when the program is traced (packed rows too, but not if
    positions are fractions, which may be dense), and a position beyond becomes NaN in a compiled
    program, see `lookup`. Parameter: table [max_length, D], float32.

    Args:
        max_length: rows of the table; at least 1.
        initial_deviation: standard deviation of the rows at the start; 0.02 is GPT-2's.
        interpolate_to: positions that the table is stretched over; above max_length.

    References:
        Gehring et al., Convolutional Sequence to Sequence Learning, arXiv:1705.03122, section 3.1.
        Vaswani et al., Attention Is All You Need, arXiv:1706.03762, section 3.5 and table 3, row E.
        Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv:2010.11929, section 3.2
        (interpolation).

    >>> x, p = jnp.zeros((1, 3, 8)), jnp.array([[0, 1, 2]])
    >>> variables = Learned(max_length=4).init(jax.random.key(0), x, p, method="embed")
    >>> variables["params"]["table"].shape
    (4, 8)
    """

    max_length: int = 1024
    initial_deviation: float = 0.02
    interpolate_to: int | None = None
    beyond: ClassVar = "raises"

    def __post_init__(self):
        checks.fields(self, max_length=checks.at_least(1), initial_deviation=checks.at_least(0))
        if self.interpolate_to is not None:
            longer = self.interpolate_to > self.max_length
            wanted = f"above max_length = {self.max_length}, or None"
            checks.require("Learned interpolate_to", self.interpolate_to, longer, wanted)
        super().__post_init__()

    @classmethod
    def interpolated(cls) -> Self:
        """A table of 1024 rows stretched over 4096 positions."""
        return cls(max_length=1024, interpolate_to=4096)

    @nn.compact
    def embed(self, embeddings, indices):
        """The embeddings plus their rows, summed in float32."""
        _, length, width = embeddings.shape
        if jnp.issubdtype(indices.dtype, jnp.integer):
            self._check_length(length)
        start = nn.initializers.normal(self.initial_deviation)
        table = self.param("table", start, (self.max_length, width), jnp.float32)
        if self.interpolate_to is not None:
            indices = shrink(indices, self.interpolate_to, self.max_length)
        return (embeddings.astype(jnp.float32) + lookup(table, indices)).astype(embeddings.dtype)

    def _check_length(self, length: int) -> None:
        if self.interpolate_to is None:
            check_length(length, self.max_length, "Learned")
        elif length > self.interpolate_to:
            raise LengthError(
                f"Learned has interpolate_to={self.interpolate_to}, but the sequence has "
                f"{length} tokens; build it with interpolate_to >= {length}."
            )


def _rows(table: Array, index: Array) -> Array:
    return jnp.take(table, index, axis=0, mode="fill", fill_value=jnp.nan)


def _refuse_known(positions: Array, rows: int) -> None:
    """Raises if positions are known and one is outside 0 <= position < rows."""
    if isinstance(positions, jax.core.Tracer) or not positions.size:
        return
    known = np.asarray(positions)
    for position in (known.max(), known.min()):
        if not 0 <= position < rows:
            raise LengthError(
                f"position {position} is not in a table of {rows} rows, 0 ... {rows - 1}."
            )
