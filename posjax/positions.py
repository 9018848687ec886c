"""Which index does each token have? The first of the four places where a position encoding acts.

Positions are arguments, never hidden state: each function takes what it needs and returns an array
of shape [B, T].
"""

import jax
import jax.numpy as jnp

from posjax.types import Array, Bool, Int

__all__ = [
    "LengthError",
    "check_length",
    "digit_run_positions",
    "segment_positions",
    "sequence_positions",
]


class LengthError(ValueError):
    """A sequence is longer than a table of positions."""


def check_length(length: int, table: int, name: str) -> None:
    """Raises `LengthError` when `length` positions do not fit into a table of `table` rows."""
    if length > table:
        raise LengthError(
            f"{name} has max_length={table}, but the sequence has {length} tokens; "
            f"build it with max_length >= {length}."
        )


def sequence_positions(
    batch: int, length: int, offset: Int[Array, ""] | int = 0
) -> Int[Array, "B T"]:
    """The usual positions offset, offset + 1, ..., the same in every row.

    >>> sequence_positions(1, 4).tolist()
    [[0, 1, 2, 3]]
    """
    positions = jnp.arange(length, dtype=jnp.int32) + jnp.asarray(offset, jnp.int32)
    return jnp.broadcast_to(positions, (batch, length))


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that start again at 0 in every packed segment.

    A segment is a run of equal ids; the same id in two separate runs is two segments.

    >>> segment_positions(jnp.array([[1, 1, 1, 2, 2, 0]])).tolist()
    [[0, 1, 2, 0, 1, 0]]
    """
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.pad(starts, ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def digit_run_positions(
    is_digit: Bool[Array, "B T"], run: Int[Array, "B"] | None = None
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Positions 1, 2, 3, ... inside every run of digits and 0 at every other token (Abacus).

    Args:
        is_digit: which tokens are digits.
        run: how many digits of a running number came just before these tokens; 0 where there was
            none. It lets a number continue from one call to the next (decoding).

    Returns:
        The positions, and the `run` to hand to the call that continues these tokens.

    References:
        McLeish et al., Transformers Can Do Arithmetic with the Right Embeddings, arXiv:2405.17399,
        section 3.

    >>> positions, run = digit_run_positions(jnp.array([[True, True, False, True]]))
    >>> positions.tolist(), run.tolist()
    ([[1, 2, 0, 1]], [1])
    >>> digit_run_positions(jnp.array([[True, False]]), run)[0].tolist()
    [[2, 0]]
    """
    batch, length = is_digit.shape
    before = jnp.zeros((batch,), jnp.int32) if run is None else run
    index = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.int32), is_digit.shape)
    # Index of the last token that was not a digit; a run that came in counts as digits before index
    # 1.
    last_other = jax.lax.cummax(jnp.where(is_digit, -before[:, None], index), axis=1)
    positions = index - last_other
    return positions, positions[:, -1] if length else before
