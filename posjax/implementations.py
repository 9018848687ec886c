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

from posjax.kernels import interpreters
from posjax.kernels.blocks import platform
from posjax.kernels.common import Attended
from posjax.problem import Problem

__all__ = ["IMPLEMENTATIONS", "Implementation", "choose", "implementations_used", "note", "reasons"]

_used: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("used", default=None)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    `module` has `refuses(problem) -> str | None` and `run(problem) -> Attended`, and is imported
    when it is asked for. With `instead`, it also has `holds(problem)`, a boolean array (None for
    always) that may be known only when the program runs: where it is False, the implementation of
    that name runs in its place.

    Args:
        platform: the only kind of devices that runs it; None: every kind.
        fewest_queries: with fewer it is not chosen by itself.
        most_pairs: of a query and a key, with more of which it is not chosen by itself; None: no
            limit. `most_pairs_on_cpu` likewise, if the devices are CPUs.
        only_by_name: the reason why it is never chosen by itself, except for problems whose result
            has the weights; None: it is.
        split: over which axes of a mesh `kernels.sharding` splits it: "no", "batch", or "heads"
            (batch and heads: the compiler cannot split a Pallas kernel).
    """

    name: str
    module: str
    platform: Literal["tpu", "gpu"] | None = None
    fewest_queries: int = 0
    most_pairs: int | None = None
    most_pairs_on_cpu: int | None = None
    only_by_name: str | None = None
    split: Literal["no", "batch", "heads"] = "no"
    instead: str | None = None

    def load(self) -> ModuleType:
        """The module, imported."""
        return importlib.import_module(self.module)

    def refuses(self, problem: Problem) -> str | None:
        """The reason why it cannot solve the problem here; None if it can."""
        return self.load().refuses(problem) or self._lacks_devices()

    def declines(self, problem: Problem) -> str | None:
        """The reason why it is not chosen by itself; None if it is."""
        if self.only_by_name is not None and not problem.returns_weights:
            return self.only_by_name
        # Asked before the module is imported.
        return self._lacks_devices() or self._does_not_pay(problem) or self.load().refuses(problem)

    def label(self, problem: Problem) -> str:
        """Its name, with that of `instead` if only the running program knows which of them runs."""
        holds = self._holds(problem)
        if isinstance(holds, jax.core.Tracer):
            return f"{self.name} or {self.instead}"
        return self.name if holds else str(self.instead)

    def run(self, problem: Problem) -> Attended:
        """The result, with the log-sum-exp and the weights if the problem asks for them."""
        result = self._run(problem)
        return Attended(
            result.output,
            result.log_sum_exp if problem.needs_log_sum_exp else None,
            result.weights if problem.returns_weights else None,
        )

    def _run(self, problem: Problem) -> Attended:
        if problem.bias is None or self.instead is None:
            return self.load().run(problem)
        holds, ways = self._holds(problem), (self.load().run, _named()[self.instead].load().run)
        if isinstance(holds, jax.core.Tracer):
            return jax.lax.cond(holds, *ways, problem)
        return ways[0 if holds else 1](problem)

    def _lacks_devices(self) -> str | None:
        """The reason why the devices cannot run it; None if they can."""
        kind, found = self.platform, platform()
        if kind is None or kind == found or interpreters.is_interpreted(kind):
            return None
        return f"the {kind.upper()} kernels need {kind.upper()}s, and the devices are {found}s"

    def _does_not_pay(self, problem: Problem) -> str | None:
        """The reason why others are better for these lengths; None if it is good."""
        queries, keys = problem.query.shape[1], problem.key.shape[1]
        if not _is_less(self.fewest_queries - 1, queries):
            return f"{queries} queries; {self.name} pays from {self.fewest_queries} on"
        most = self.most_pairs_on_cpu if platform() == "cpu" else self.most_pairs
        if most is not None and not _is_less(queries * keys - 1, most):
            return f"{queries} x {keys} pairs; {self.name} is dense, and pays up to {most}"
        return None

    def _holds(self, problem: Problem) -> Any:
        """True, or a boolean array."""
        if problem.bias is None or self.instead is None:
            return True
        holds = self.load().holds(problem)
        return True if holds is None else holds


IMPLEMENTATIONS = (
    Implementation(
        "tpu",
        "posjax.kernels.tpu.attention",
        platform="tpu",
        fewest_queries=128,
        split="heads",
        instead="xla",
    ),
    Implementation("cudnn", "posjax.kernels.cudnn", platform="gpu"),
    Implementation(
        "gpu",
        "posjax.kernels.gpu",
        platform="gpu",
        only_by_name='the GPU kernels have not run on a GPU yet; ask for implementation="gpu"',
        split="heads",
        instead="xla",
    ),
    # On CPUs blockwise attention is faster from 256 tokens on (benchmarks/results/plain-cpu.json).
    # For other devices without a better row, dense attention is bounded by its memory.
    Implementation(
        "jax", "posjax.kernels.plain", most_pairs=2048 * 2048, most_pairs_on_cpu=255 * 255
    ),
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
        able = (row for row in IMPLEMENTATIONS if row.declines(problem) is None)
        chosen = next(able, None)
        if chosen is None:
            raise NotImplementedError(_no_other(problem))
        return chosen
    several = isinstance(implementation, list | tuple)
    wanted = tuple(implementation) if several else (implementation,)
    rows, refused = _named(), []
    if not wanted or any(name not in rows for name in wanted):
        known = ", ".join(f'"{name}"' for name in rows)
        raise ValueError(
            f"implementation is {implementation!r}; it must be None, one of {known}, or some of "
            "them."
        )
    for name in wanted:
        reason = rows[name].refuses(problem)
        if reason is None:
            return rows[name]
        refused.append(reason)
    raise NotImplementedError(_no_other(problem, refused))


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
    used = _used.get()
    if used is not None:
        used.append(chosen.label(problem))


def _is_less(a: Any, b: Any) -> bool:
    """Whether surely a < b; of symbolic lengths it may not be known."""
    try:
        return bool(a < b)
    except jax.errors.InconclusiveDimensionOperation:
        return False


@functools.cache
def _named() -> dict[str, Implementation]:
    """The table by name."""
    return {row.name: row for row in IMPLEMENTATIONS}


def _no_other(problem: Problem, refused: Sequence[str] = ()) -> str:
    """The message when everything that was asked for refuses: the reasons, and one that can."""
    able = "xla" if _named()["xla"].refuses(problem) is None else "reference"
    why = refused or [reason for reason in reasons(problem).values() if reason is not None]
    return f'{"; ".join(why)}; use implementation="{able}".'
