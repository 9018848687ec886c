"""The implementations of attention, in the order in which they are chosen."""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, Literal

import jax

from posjax.kernels import platforms
from posjax.problem import Problem
from posjax.types import Array, Num

__all__ = ["IMPLEMENTATIONS", "Implementation", "choose", "implementations_used", "note", "reasons"]

_used: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("used", default=None)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    `module` has `refuses(problem) -> str | None` and `run(problem) -> Array`, and is imported when
    it is asked for. With `instead`, it also has `holds(problem)`, a boolean array (None for always)
    that may be known only when the program runs: where it is False, the implementation of that name
    runs in its place.

    Args:
        platform: the only kind of devices that runs it; None: every kind.
        fewest_queries: with fewer it is not chosen by itself.
        only_by_name: the reason why it is never chosen by itself; None: it is.
        split: over which axes of a mesh `kernels.sharding` splits it: "no", "batch", or "heads"
            (batch and heads: the compiler cannot split a Pallas kernel).
    """

    name: str
    module: str
    platform: Literal["tpu", "gpu"] | None = None
    fewest_queries: int = 1
    only_by_name: str | None = None
    split: Literal["no", "batch", "heads"] = "no"
    instead: str | None = None

    def load(self) -> ModuleType:
        """The module, imported."""
        return importlib.import_module(self.module)

    def refuses(self, problem: Problem) -> str | None:
        """The reason why it cannot solve the problem here; None if it can."""
        return self._refuses_devices() or self.load().refuses(problem)

    def declines(self, problem: Problem) -> str | None:
        """The reason why it is not chosen by itself; None if it is."""
        if self.only_by_name is not None:
            return self.only_by_name
        queries = problem.query.shape[1]
        few = f"{queries} queries; {self.name} pays from {self.fewest_queries} on"
        return (
            self._refuses_devices()
            or (few if queries < self.fewest_queries else None)
            or self.load().refuses(problem)
        )

    def label(self, problem: Problem) -> str:
        """Its name, with that of `instead` where only the running program knows."""
        holds = self._holds(problem)
        if isinstance(holds, jax.core.Tracer):
            return f"{self.name} or {self.instead}"
        return self.name if holds else str(self.instead)

    def run(self, problem: Problem) -> Num[Array, "B T N E"]:
        """The output of attention."""
        holds, run = self._holds(problem), self.load().run
        if holds is True:
            return run(problem)
        instead = _named()[self.instead].load().run
        if isinstance(holds, jax.core.Tracer):
            return jax.lax.cond(holds, run, instead, problem)
        return (run if holds else instead)(problem)

    def _refuses_devices(self) -> str | None:
        return None if self.platform is None else platforms.needs(self.platform)

    def _holds(self, problem: Problem) -> Any:
        holds = None if self.instead is None else self.load().holds(problem)
        return True if holds is None else holds


IMPLEMENTATIONS = (
    Implementation(
        "tpu",
        "posjax.kernels.tpu",
        platform="tpu",
        fewest_queries=128,
        split="heads",
        instead="xla",
    ),
    Implementation(
        "gpu",
        "posjax.kernels.gpu",
        platform="gpu",
        only_by_name='the GPU kernels have not run on a GPU yet; ask for implementation="gpu"',
        split="heads",
        instead="xla",
    ),
    Implementation("jax", "posjax.kernels.plain"),
    Implementation("xla", "posjax.kernels.blockwise", split="batch"),
    Implementation("reference", "posjax.kernels.reference", only_by_name="it is dense, for tests"),
)


def choose(problem: Problem, implementation: str | Sequence[str] | None) -> Implementation:
    """The requested implementation, or the first one that supports the call.

    Args:
        implementation: a name; several, of which the first that does not refuse is used; None: the
            first of the table that does not decline.

    Raises:
        ValueError: a name that there is not.
        NotImplementedError: everything that was asked for refuses.
    """
    if implementation is None:
        return next(row for row in IMPLEMENTATIONS if row.declines(problem) is None)
    wanted = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    _check_names(wanted, implementation)
    refused = {}
    for name in wanted:
        refused[name] = _named()[name].refuses(problem)
        if refused[name] is None:
            return _named()[name]
    why = "; ".join(refused.values())
    others = [row.name for row in IMPLEMENTATIONS if row.name in ("xla", "reference")]
    able = next(name for name in others if _named()[name].refuses(problem) is None)
    raise NotImplementedError(f'{why}; use implementation="{able}".')


def reasons(problem: Problem) -> dict[str, str | None]:
    """For every implementation, the reason why it is not chosen by itself."""
    return {row.name: row.declines(problem) for row in IMPLEMENTATIONS}


@contextlib.contextmanager
def implementations_used() -> Iterator[list[str]]:
    """A list to which each call of `dot_product_attention` inside adds the implementation it uses.

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


def note(chosen: Implementation, problem: Problem) -> None:
    """Adds to the list of `implementations_used`, if there is one."""
    if _used.get() is not None:
        _used.get().append(chosen.label(problem))


@functools.cache
def _named() -> dict[str, Implementation]:
    return {row.name: row for row in IMPLEMENTATIONS}


def _check_names(wanted: tuple, given: Any) -> None:
    known = ", ".join(f'"{name}"' for name in _named())
    for name in wanted or ("",):
        if not isinstance(name, str) or name not in _named():
            raise ValueError(
                f"implementation is {given!r}; it must be None, one of {known}, or some of them."
            )
