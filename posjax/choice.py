"""Which implementation of attention is taken."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

__all__ = ["choose", "implementations_used", "note", "on_device"]

_BY_NAME = ("reference", "xla", "tpu", "gpu")
# In the order in which they are taken where they can.
_BY_ITSELF = ("tpu", "gpu", "jax", "xla")
# Fewer queries than this are not worth a kernel.
_FEW = 128
_used: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("used", default=None)


@contextlib.contextmanager
def implementations_used() -> Iterator[list[str]]:
    """A list to which every call of `dot_product_attention` inside adds the implementation it took.

    >>> from posjax import dot_product_attention
    >>> q = jax.numpy.ones((1, 4, 2, 8))
    >>> with implementations_used() as used:
    ...     _ = jax.eval_shape(lambda q: dot_product_attention(q, q, q, implementation="xla"), q)
    >>> used
    ['xla']
    """
    used: list[str] = []
    token = _used.set(used)
    try:
        yield used
    finally:
        _used.reset(token)


def on_device(name: str, queries: int) -> str | None:
    """Why kernels for TPUs or GPUs are not taken by themselves here."""
    if name == "gpu":
        return 'the GPU kernels have not run on a GPU yet; ask for them: implementation="gpu"'
    backend = jax.default_backend()
    if backend != name:
        return f"the devices are {backend}s"
    return f"{queries} queries; {name} pays from {_FEW} on" if queries < _FEW else None


def choose(implementation: str | None, reasons: dict[str, str | None]) -> str:
    """The implementation that was asked for, or the first that nothing speaks against.

    Raises:
        ValueError: a name that there is not.
    """
    if implementation is None:
        chosen = next(name for name in _BY_ITSELF if reasons[name] is None)
    elif implementation in _BY_NAME:
        chosen = implementation
    else:
        names = ", ".join(f'"{name}"' for name in _BY_NAME)
        raise ValueError(
            f"implementation is {implementation!r}; it must be None or one of {names}."
        )
    return chosen


def note(chosen: str) -> None:
    """Adds to the list of `implementations_used`, if there is one."""
    if _used.get() is not None:
        _used.get().append(chosen)
