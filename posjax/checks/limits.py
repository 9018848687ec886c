"""Ranges of numbers."""

from typing import NamedTuple

__all__ = ["LARGEST", "LONGEST", "Limits", "above", "at_least", "between", "size"]

# The largest number of channels, heads or rows, and of tokens.
LARGEST, LONGEST = 2**20, 2**26


class Limits(NamedTuple):
    """The range of a number; limits that are None do not hold.

    `reasonable` is named only where it does not hold.

    >>> str(Limits(above=0, high=1))
    'above 0 and at most 1'
    """

    low: float | None = None
    """The least number."""
    high: float | None = None
    """The greatest number."""
    above: float | None = None
    """Numbers are greater than this."""
    below: float | None = None
    """Numbers are less than this."""
    multiple_of: int | None = None
    """Numbers are divisible by this."""
    reasonable: float | None = None
    """Greater numbers are mistakes, of which time and memory would run out."""

    def hold(self, value: float) -> bool:
        """Whether a number is in the range."""
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or value % self.multiple_of == 0)
            and not self.is_beyond_reason(value)
        )

    def is_beyond_reason(self, value: float) -> bool:
        """Whether a number is greater than any that makes sense."""
        return self.reasonable is not None and value > self.reasonable

    def __str__(self) -> str:
        words = {"above": "above", "low": "at least", "below": "below", "high": "at most"}
        if self.low is not None and self.high is not None:
            limits = [f"from {self.low} to {self.high}"]
        else:
            named = [(word, getattr(self, name)) for name, word in words.items()]
            limits = [f"{word} {limit}" for word, limit in named if limit is not None]
        if self.multiple_of not in (None, 1):
            limits.append("even" if self.multiple_of == 2 else f"a multiple of {self.multiple_of}")
        return " and ".join(limits)


def above(limit: float) -> Limits:
    """Numbers greater than `limit`."""
    return Limits(above=limit)


def at_least(limit: float) -> Limits:
    """Numbers from `limit` on."""
    return Limits(low=limit)


def between(low: float, high: float) -> Limits:
    """Numbers from `low` to `high`, both included."""
    return Limits(low=low, high=high)


def size(low: int = 1, multiple_of: int | None = None, reasonable: int = LARGEST) -> Limits:
    """A number of channels, heads or rows, for which as many numbers are made."""
    return Limits(low=low, multiple_of=multiple_of, reasonable=reasonable)
