"""Abacus Embeddings: each digit gets a trained vector for its place inside its number."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from posjax import checks
from posjax.encodings.base import PositionEncoding
from posjax.encodings.learned import lookup
from posjax.positions import digit_run_positions
from posjax.types import Array, Bool, Int

__all__ = ["Abacus", "is_one_of"]


@checks.arguments()
def is_one_of(tokens: Int[Array, "B T"], ids: tuple[int, ...]) -> Bool[Array, "B T"]:
    """Which tokens are among the ids.

    >>> is_one_of(jnp.array([[5, 6]]), (6, 7)).tolist()
    [[False, True]]
    """
    return jnp.any(tokens[:, :, None] == jnp.asarray(ids, tokens.dtype)[None, None, :], axis=-1)


class Abacus(PositionEncoding):
    """Adds a trained vector for the place of a digit inside its number to the token embeddings.

        p = 1, 2, 3, ... along every run of digits, 0 at every other token
        embedding + table[p + k]  at digits,  embedding + table[0]  elsewhere

    k is drawn in training from {0, ..., max_offset}, one for the whole batch (rng stream
    "encoding"), and 0 otherwise: it trains rows that only longer numbers will use. Numbers, answers
    too, must have their lowest digit first: then equal places have equal rows. The paper
    draws first places from U[1, 100], which is max_offset=99; the authors' training code has 100.
    Their code counts on across packed sequences, here every segment starts anew. It draws tables
    with deviation D^-0.5. Parameter: table [max_length, D], float32.

    Rows beyond max_offset + the longest trained run are untrained. Beyond the table there is
    nothing: such a digit raises `posjax.positions.LengthError`, or becomes NaN inside `jax.jit`,
    which cannot raise.

    Args:
        digits: ids of the digit tokens; by default those of "0" ... "9" in bytes (ASCII and UTF-8).
        max_length: rows of the table; the longest run of digits, plus max_offset, plus 1 for row 0.
        max_offset: greatest training offset; 0 or more.
        initial_deviation: standard deviation of the table at the start.

    References:
        McLeish et al., Transformers Can Do Arithmetic with the Right Embeddings, arXiv:2405.17399,
        section 3.

    >>> tokens = jnp.array([list(b"31+427=")])
    >>> places = jnp.arange(7)[None, :]
    >>> Abacus().apply({}, tokens, places, method="positions")[0].tolist()
    [[1, 2, 0, 1, 2, 3, 0]]
    """

    digits: tuple[int, ...] = tuple(range(48, 58))
    max_length: int = 1024
    max_offset: int = 99
    initial_deviation: float = 0.02
    beyond: ClassVar = "raises"

    def __post_init__(self):
        zero = checks.at_least(0)
        checks.fields(self, digits=zero, max_offset=zero, initial_deviation=zero)
        least = self.max_offset + 2
        wanted = f"at least max_offset + 2 = {least}"
        checks.require("Abacus max_length", self.max_length, self.max_length >= least, wanted)
        super().__post_init__()

    def positions(self, tokens, positions, carry=None, *, segment_ids=None, deterministic=True):
        """Places inside numbers; the carry is how many digits end the row."""
        run, after = digit_run_positions(is_one_of(tokens, self.digits), carry)
        # No run is longer than its segment up to here, so a segment's first digit starts a new one.
        run = jnp.minimum(run, positions + 1)
        indices = run
        if self.max_offset and not deterministic:
            offset = jax.random.randint(self.make_rng("encoding"), (), 0, self.max_offset + 1)
            indices = jnp.where(run > 0, run + offset, 0)
        return indices, after if 0 in run.shape else run[:, -1]

    @nn.compact
    def embed(self, embeddings, indices):
        """The embeddings plus their rows, summed in float32."""
        start = nn.initializers.normal(self.initial_deviation)
        table = self.param("table", start, (self.max_length, embeddings.shape[-1]), jnp.float32)
        return (embeddings.astype(jnp.float32) + lookup(table, indices)).astype(embeddings.dtype)
