"""Learned absolute positions: a trained vector for every position, added to the embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from posjax.encodings.base import PositionEncoding
from posjax.positions import LengthError, check_length
from posjax.types import Array, Float, Int

__all__ = ["LearnedAbsolute", "lookup"]


def lookup(table: Float[Array, "P D"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of a table of positions, never a wrong row in silence.

    A compiled program cannot raise, so inside `jax.jit` a position outside 0 ... P - 1 gives a row
    of NaN, which the loss shows at once; where positions are known it raises.

    Raises:
        posjax.positions.LengthError: a known position outside the table.

    >>> lookup(jnp.ones((2, 1)), jnp.array([[0, 1]])).shape
    (1, 2, 1)
    >>> jax.jit(lookup)(jnp.ones((2, 1)), jnp.array([[1, 2, -1]])).tolist()
    [[[1.0], [nan], [nan]]]
    """
    rows = table.shape[0]
    if not isinstance(positions, jax.core.Tracer) and positions.size:
        known = np.asarray(positions)
        for position in (known.max(), known.min()):
            if not 0 <= position < rows:
                raise LengthError(
                    f"position {position} is not in a table of {rows} rows, 0 ... {rows - 1}."
                )
    # A negative index would count from the end.
    outside = jnp.where(positions < 0, rows, positions)
    return jnp.take(table, outside, axis=0, mode="fill", fill_value=jnp.nan)


class LearnedAbsolute(PositionEncoding):
    """Adds row p of a trained table to the embedding of the token at position p.

        embedding_p + table[p]

    There is no row beyond `max_length`: a longer sequence raises `posjax.positions.LengthError`
    when the program is traced (packed rows too), and a position beyond the table becomes NaN where
    the program cannot raise, see `lookup`. Parameter: table [max_length, D], float32.

    Args:
        max_length: rows of the table; at least 1.
        initial_deviation: standard deviation of the rows at the start; 0.02 is GPT-2's.

    References:
        Gehring et al., Convolutional Sequence to Sequence Learning, arXiv:1705.03122, section 3.1.
        Vaswani et al., Attention Is All You Need, arXiv:1706.03762, section 3.5 and table 3, row E.

    >>> x, p = jnp.zeros((1, 3, 8)), jnp.array([[0, 1, 2]])
    >>> variables = LearnedAbsolute(max_length=4).init(jax.random.key(0), x, p, method="embed")
    >>> variables["params"]["table"].shape
    (4, 8)
    """

    max_length: int = 1024
    initial_deviation: float = 0.02

    def __post_init__(self):
        if self.max_length < 1:
            raise ValueError(
                f"LearnedAbsolute max_length is {self.max_length}; it must be at least 1."
            )
        if not self.initial_deviation >= 0:
            deviation = self.initial_deviation
            raise ValueError(
                f"LearnedAbsolute initial_deviation is {deviation}; it must be 0 or more."
            )
        super().__post_init__()

    @nn.compact
    def embed(self, embeddings, indices):
        """The embeddings plus their rows, summed in float32."""
        _, length, width = embeddings.shape
        check_length(length, self.max_length, "LearnedAbsolute")
        start = nn.initializers.normal(self.initial_deviation)
        table = self.param("table", start, (self.max_length, width), jnp.float32)
        return (embeddings.astype(jnp.float32) + lookup(table, indices)).astype(embeddings.dtype)
