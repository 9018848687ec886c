"""The parts of a bias, as the kernels of a chip take them."""

from posjax.biases.base import Bias
from posjax.biases.contextual import ContextualBias
from posjax.biases.relative import RelativeBias
from posjax.biases.sum import addends

__all__ = ["contextual", "relatives", "unsupported_bias"]


def contextual(bias: Bias | None) -> ContextualBias | None:
    """The part that counts, of at most one."""
    return next((part for part in addends(bias) if isinstance(part, ContextualBias)), None)


def relatives(bias: Bias | None) -> list[RelativeBias]:
    """The parts that depend on positions alone."""
    return [part for part in addends(bias) if isinstance(part, RelativeBias)]


def unsupported_bias(bias: Bias | None, chip: str) -> str | None:
    """The reason why the kernels for this kind of chip cannot do a part; None if they can."""
    parts = addends(bias)
    for part in parts:
        if isinstance(part, RelativeBias) and not part.distance_only:
            name = getattr(part.function, "__name__", type(part.function).__name__)
            return (
                f"RelativeBias without distance_only (its function is {name}) has no {chip} kernel"
            )
        if not isinstance(part, ContextualBias | RelativeBias):
            return f"{type(part).__name__} has no {chip} kernel"
        if isinstance(part, ContextualBias) and part.direction == "forward":
            return (
                f'direction="forward" counts from the far end, and the {chip} kernels start at the '
                "query"
            )
    if sum(isinstance(part, ContextualBias) for part in parts) > 1:
        return f"a sum of several ContextualBias has no {chip} kernel"
    return None
