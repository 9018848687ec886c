"""Which index does each token have? The first of the four places where a position encoding acts.

Positions are arguments, never hidden state: each function takes what it needs and returns an array
of shape [B, T].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.types import Array, Bool, Float, Int, Num

__all__ = [
    "LengthError",
    "check_length",
    "digit_run_positions",
    "interpolated_positions",
    "random_subset_positions",
    "segment_positions",
    "sequence_positions",
    "skip_positions",
    "sorted_subset",
    "spread_positions",
    "text_segments",
]


class LengthError(ValueError):
    """A sequence is longer than a table of positions."""


def _length(low: int) -> checks.Limits:
    """A number of tokens, for which as many numbers are made."""
    return checks.size(low, reasonable=checks.LONGEST)


@checks.arguments(length=checks.at_least(0))
def check_length(length: int, table: int, name: str) -> None:
    """Raises `LengthError` when `length` positions do not fit into a table of `table` rows."""
    if length > table:
        raise LengthError(
            f"{name} has max_length={table}, but the sequence has {length} tokens; "
            f"build it with max_length >= {length}."
        )


@checks.arguments(batch=checks.size(0), length=_length(0))
def sequence_positions(
    batch: int, length: int, offset: Int[Array, ""] | int = 0
) -> Int[Array, "B T"]:
    """The usual positions offset, offset + 1, ..., the same in every row.

    >>> sequence_positions(1, 4).tolist()
    [[0, 1, 2, 3]]
    """
    positions = jnp.arange(length, dtype=jnp.int32) + jnp.asarray(offset, jnp.int32)
    return jnp.broadcast_to(positions, (batch, length))


@checks.arguments()
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


@checks.arguments()
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


class _Runs(NamedTuple):
    """First and last index of the stretch of positions that rise by 1, for each token of it."""

    first: Int[Array, "B T"]
    last: Int[Array, "B T"]


def _runs(positions: Int[Array, "B T"]) -> _Runs:
    """The runs of a row: its packed segments, as their positions start again."""
    length = positions.shape[1]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), positions.shape)
    breaks = positions[:, 1:] != positions[:, :-1] + 1
    starts = jnp.pad(breaks, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(breaks, ((0, 0), (0, 1)), constant_values=True)
    first = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    last = jax.lax.cummin(jnp.where(ends, index, length), axis=1, reverse=True)
    return _Runs(first, last)


def _run_lengths(positions: Int[Array, "B T"], runs: _Runs) -> Int[Array, "B T"]:
    """How long the sequence of each token is: the last position of its run, plus 1."""
    return jnp.take_along_axis(positions, runs.last, axis=1) + 1


@checks.arguments(length=checks.at_least(0), max_length=_length(1))
def sorted_subset(key: Array, length: int, max_length: int) -> Int[Array, "length"]:
    """Different whole numbers of 0 ... max_length - 1, sorted; every set is equally likely.

    Raises:
        LengthError: length > max_length.

    >>> sorted_subset(jax.random.key(0), 3, 3).tolist()
    [0, 1, 2]
    """
    if length > max_length:
        wanted = f"at most max_length = {max_length}, but the sequence has {length} tokens"
        raise LengthError(f"length is {length}; it must be {wanted}.")
    return jnp.sort(jax.random.permutation(key, max_length)[:length])


@checks.arguments(max_length=_length(1))
def random_subset_positions(
    key: Array, positions: Int[Array, "B T"], max_length: int
) -> Int[Array, "B T"]:
    """Positions replaced by those of a `sorted_subset`, as many as the sequence has tokens.

    Every run of rising positions (a packed segment) is a sequence of its own. One random order of
    0 ... max_length - 1 serves the whole batch: a sequence of n tokens gets its first n numbers,
    sorted. So equally long sequences get the same positions, packed or alone.

    Args:
        positions: below max_length, or the result means nothing.

    References:
        Ruoss et al., Randomized Positional Encodings Boost Length Generalization of Transformers,
        arXiv:2305.16843, section 3.

    >>> random_subset_positions(jax.random.key(0), jnp.array([[0, 1, 2, 0, 1]]), 3).shape
    (1, 5)
    """
    drawn = jax.random.permutation(key, max_length).at[positions].get(mode="clip")
    return jax.lax.sort((_runs(positions).first, drawn), dimension=1, num_keys=2)[1]


@checks.arguments(max_length=checks.at_least(1), length=checks.at_least(1))
def spread_positions(
    positions: Int[Array, "B T"], max_length: int, length: int | None = None
) -> Int[Array, "B T"]:
    """Positions spread evenly over 0 ... max_length - 1.

        p * floor(max_length / n) + min(p, max_length mod n)

    Args:
        length: n; None: the length of each token's own sequence, as in `random_subset_positions`.

    >>> spread_positions(jnp.array([[0, 1, 2, 0, 1]]), 8).tolist()
    [[0, 3, 6, 0, 4]]
    """
    size = _run_lengths(positions, _runs(positions)) if length is None else length
    return positions * (max_length // size) + jnp.minimum(positions, max_length % size)


@checks.arguments(target_length=checks.at_least(1))
def skip_positions(
    key: Array, positions: Int[Array, "B T"], target_length: int, *, shift_first: bool = False
) -> Int[Array, "B T"]:
    """Positional skip-wise training (PoSE): a random gap behind a random first part.

        v ~ U{1 ... floor((n + 1) / 2)},  u ~ U{0 ... L' - n}
        p for the first v positions of a sequence,  p + u for the others

    n is the length of the sequence (or packed segment, each with its own draws) and L' is
    `target_length`. A sequence longer than L' stays as it is.

    Args:
        shift_first: the first part moves too, by w ~ U{0 ... L' - n}, and then u ~ U{w ... L' - n}:
            the older form of the authors' code.

    References:
        Zhu et al., PoSE: Efficient Context Window Extension of LLMs via Positional Skip-wise
        Training, arXiv:2309.10400, section 3.

    >>> skip_positions(jax.random.key(0), jnp.array([[0, 1, 2]]), 3).tolist()
    [[0, 1, 2]]
    """
    runs = _runs(positions)
    length = _run_lengths(positions, runs)
    uniform = jax.random.uniform(key, (3, *positions.shape))
    # All tokens of a sequence take what its first one drew.
    for_first, for_gap, for_split = (
        jnp.take_along_axis(u, runs.first, axis=1) for u in (uniform[0], uniform[1], uniform[2])
    )
    room = jnp.maximum(target_length - length, 0)
    shift = _below(for_first, room + 1) if shift_first else jnp.zeros_like(room)
    gap = shift + _below(for_gap, room - shift + 1)
    split = 1 + _below(for_split, (length + 1) // 2)
    return positions + jnp.where(positions < split, shift, gap)


def _below(uniform: Float[Array, "B T"], size: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """A whole number of 0 ... size - 1."""
    number = jnp.floor(uniform * size.astype(jnp.float32)).astype(jnp.int32)
    return jnp.minimum(number, size - 1)


@checks.arguments(trained_length=checks.above(0), target_length=checks.above(0))
def interpolated_positions(
    positions: Num[Array, "B T"], trained_length: int, target_length: int
) -> Float[Array, "B T"]:
    """Positions times trained_length / target_length, in float32 (position interpolation).

    >>> interpolated_positions(jnp.array([[0, 1, 2]]), 4, 8).tolist()
    [[0.0, 0.5, 1.0]]
    """
    return positions.astype(jnp.float32) * (trained_length / target_length)


class TextSegments(NamedTuple):
    """The place of each token in its segment of text, and the number of that segment."""

    within: Int[Array, "B T"]
    segment: Int[Array, "B T"]


@checks.arguments()
def text_segments(
    is_separator: Bool[Array, "B T"],
    positions: Num[Array, "B T"],
    carry: tuple[Int[Array, "B"], Int[Array, "B"]] | None = None,
) -> tuple[TextSegments, tuple[Int[Array, "B"], Int[Array, "B"]]]:
    """Segments of text, such as sentences: places 0, 1, 2, ... inside each, and their numbers.

    A separator is the last token of its segment. Both count from 0 again at every position 0 (a
    packed sequence).

    Args:
        carry: what this function returned for the tokens just before these; None at the start.

    Returns:
        Places and numbers, and the pair of them that comes next.

    References:
        He et al., Two Stones Hit One Bird: Bilevel Positional Encoding for Better Length
        Extrapolation, arXiv:2401.16421, section 3.

    >>> is_dot = jnp.array([[c == "." for c in "Hi.You."]])
    >>> segments, _ = text_segments(is_dot, jnp.arange(7)[None])
    >>> segments.within.tolist(), segments.segment.tolist()
    ([[0, 1, 2, 0, 1, 2, 3]], [[0, 0, 0, 1, 1, 1, 1]])
    """
    batch, length = is_separator.shape
    none = jnp.zeros((batch,), jnp.int32)
    within_before, segment_before = (none, none) if carry is None else carry
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), is_separator.shape)
    starts = positions == 0
    begins = starts | jnp.pad(is_separator[:, :-1], ((0, 0), (1, 0)))
    # The segment that came in began `within_before` tokens before index 0.
    begin = jax.lax.cummax(jnp.where(begins, index, -within_before[:, None]), axis=1)
    ended = jnp.cumsum(is_separator, axis=1, dtype=jnp.int32) + segment_before[:, None]
    before = ended - is_separator.astype(jnp.int32)
    segments = TextSegments(
        index - begin, before - jax.lax.cummax(jnp.where(starts, before, 0), axis=1)
    )
    if not length:
        return segments, (within_before, segment_before)
    last = is_separator[:, -1]
    within = jnp.where(last, 0, segments.within[:, -1] + 1)
    return segments, (within, segments.segment[:, -1] + last.astype(jnp.int32))
