"""Correctness and times of the contenders of benchmarks/attention.py."""

import concurrent.futures
import dataclasses
import gc
import itertools
import os
import time
from typing import NamedTuple

import jax
import numpy as np
from attention_contenders import CONTENDERS, PASSES, PLAIN_REFERENCE, Passes
from attention_problem import Problem, Settings, arrays_of

__all__ = ["NO_TIME", "Entry", "check", "is_memory", "rows_of", "words_of"]

NO_TIME = "no time was left"
# Root mean square of the error over that of the result, in 16 bits, where sums of gates have
# float16 terms. In float32: the largest error of outputs of order 1; of gradients ten times it.
_NARROW, _WIDE = 1e-2, 1e-5
# What the launches of one measurement take together on an accelerator, about.
_SECONDS = 0.03
# With a budget, the part of it that one launch may take.
_SHARE = 250


class Entry(NamedTuple):
    """A contender at a gate level; without gates there is one level."""

    contender: str
    gate: float

    @property
    def name(self) -> str:
        """In tables and JSON."""
        contextual = CONTENDERS[self.contender].contextual
        return f"{self.contender}, gates near {self.gate}" if contextual else self.contender


def is_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory."""
    text = f"{type(error).__name__} {error}"
    words = ("RESOURCE_EXHAUSTED", "ut of memory", "OutOfMemory", "MemoryError")
    return any(word in text for word in words)


def words_of(error: BaseException) -> str:
    """What went wrong, in a line."""
    if is_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def check(settings: Settings, problem: Problem, names: list[str], known: dict) -> dict[str, str]:
    """What is wrong with contenders: values and gradients against the dense form, at short T.

    Every one is compared with float32 numbers of the same inputs, in the problem's type, or
    float32 where its counts would be in the inputs' type.

    Args:
        known: what earlier calls have found: lengths do not differ here. It is added to.
    """
    found = {}
    for name in names:
        dtype = CONTENDERS[name].checked_in or problem.dtype
        length = 200 if dtype == "float32" else 512
        found[name] = dataclasses.replace(problem, length=length, dtype=dtype), settings.gate[0]
    todo = {(*found[name], CONTENDERS[name].contextual): None for name in names}
    todo |= {(*found[name], name): None for name in names}
    todo = [key for key in todo if key not in known]
    # PyTorch's compiler is for one thread; XLA's is not.
    ours = [key for key in todo if "torch" not in str(key[2]) and "flex" not in str(key[2])]
    with concurrent.futures.ThreadPoolExecutor(_workers()) as pool:
        known |= dict(zip(ours, pool.map(_results, ours), strict=True))
    known |= {key: _results(key) for key in todo if key not in known}
    reasons = {}
    for name, place in found.items():
        want, got = known[*place, CONTENDERS[name].contextual], known[*place, name]
        failed = next((x for x in (want, got) if isinstance(x, str)), None)
        reasons[name] = failed or _difference(want, got, place[0].dtype == "float32")
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _workers() -> int:
    return min(8, os.cpu_count() or 1)


def _results(key: tuple) -> dict | str:
    """Of a contender, or of the dense form (True: with gates), in both passes; or what failed."""
    problem, gate, name = key
    arrays = arrays_of(problem)
    kind = jax.numpy.dtype(problem.dtype)
    arrays = {n: x.astype(kind if n != "table" else x.dtype) for n, x in arrays.items()}
    arrays = {n: x.astype(np.float32) for n, x in arrays.items()}
    reference = CONTENDERS["cope_reference"] if name is True else PLAIN_REFERENCE
    contender = reference if isinstance(name, bool) else CONTENDERS[name]
    if isinstance(name, bool):
        problem = dataclasses.replace(problem, dtype="float32")
    # Products of float32 numbers are not to be rounded; those of narrow ones are exact anyway.
    exact = "highest" if problem.dtype == "float32" else None
    try:
        with jax.default_matmul_precision(exact):
            passes = contender.make(problem, arrays, (gate,))
            passes.prepare()
        return {step: passes.numbers(run()) for (step, _), run in passes.launch.items()}
    except Exception as error:  # any library's: the others go on
        return words_of(error)


def _difference(want: dict, got: dict, exact: bool) -> str | None:
    """How results differ from those of the dense form, if they do."""
    for step in PASSES:
        wanted = want[step] if isinstance(want[step], dict) else {"output": want[step]}
        found = got[step] if isinstance(got[step], dict) else {"output": got[step]}
        for array, x in found.items():
            error, limit = _error(x, wanted[array], exact, step, array)
            if not error <= limit:
                return f"{step}, {array}: differs by {error:.1e} > {limit:.0e}"
    return None


def _error(got, want, exact: bool, step: str, array: str) -> tuple[float, float]:
    """The error, and what it may be."""
    if exact:
        limit = _WIDE if step == PASSES[0] else 10 * _WIDE * max(1.0, float(np.max(np.abs(want))))
        return float(np.max(np.abs(got - want))), limit
    size = np.sqrt(np.mean(want**2))
    if not size:  # of the table without an encoding
        return float(np.max(np.abs(got))), 0.0
    # The table's gradient is a sum over all queries of both signs.
    limit = _NARROW * (2 if array == "table" else 1)
    return float(np.sqrt(np.mean((got - want) ** 2)) / size), limit


def rows_of(settings: Settings, problem: Problem, names: list[str], deadline: float) -> dict:
    """Times of all contenders and gate levels by name, and which passes could not run and why."""
    entries = [
        Entry(name, gate)
        for name in names
        for gate in (settings.gate if CONTENDERS[name].contextual else settings.gate[:1])
    ]
    passes = _prepared(settings, problem, names)
    rows = {entry: {**entry._asdict(), "failed": {}, "seconds": {}} for entry in entries}
    launches = {}
    for entry, step in itertools.product(entries, PASSES):
        found = _launches(settings, passes[entry.contender], (step, entry.gate), deadline)
        if isinstance(found, str):
            rows[entry]["failed"][step] = found
        else:
            launches[entry, step] = found
    for (entry, step), found in _in_turns(settings, passes, launches, deadline).items():
        rows[entry]["seconds"][step] = found
    for row in rows.values():
        row["median_seconds"] = {s: float(np.median(x)) for s, x in row["seconds"].items()}
    return {entry.name: row for entry, row in rows.items()}


def _prepared(settings: Settings, problem: Problem, names: list[str]) -> dict:
    """All contenders, compiled a few at a time; of those that cannot be made the error."""
    arrays = arrays_of(problem)

    def prepare(name):
        try:
            made = CONTENDERS[name].make(problem, arrays, settings.gate)
            made.prepare()
        except Exception as error:  # any library's: the others go on
            return error
        return made

    with concurrent.futures.ThreadPoolExecutor(_workers()) as pool:
        return dict(zip(names, pool.map(prepare, names), strict=True))


def _launches(settings: Settings, passes, place: tuple[str, float], deadline: float) -> int | str:
    """How often a pass is launched in one measurement, on a CPU once; or why it cannot be."""
    if time.monotonic() > deadline:
        return NO_TIME
    try:
        if isinstance(passes, Exception):
            raise passes
        passes.wait(passes.launch[place]())  # PyTorch compiles here
        if jax.default_backend() == "cpu" and settings.budget is None:
            return 1
        once = _measure(passes, place, 1)
    except Exception as error:  # any library's: the others go on
        return words_of(error)
    if settings.budget is not None and once > settings.budget / _SHARE:
        return f"more than {settings.budget / _SHARE:.3g} s"
    return 1 if jax.default_backend() == "cpu" else max(1, min(100, int(_SECONDS / once)))


def _in_turns(settings: Settings, passes: dict, launches: dict, deadline: float) -> dict:
    """Seconds of a launch in every round; a round that is begun is finished."""
    seconds = {place: [] for place in launches}
    for number in range(settings.rounds):
        if number and time.monotonic() > deadline:
            break
        # All of a pass one after another.
        for step, place in itertools.product(PASSES, launches):
            entry, own = place
            if own == step:
                gc.collect()
                made = passes[entry.contender]
                # After the others: caches and pages are this one's again.
                made.wait(made.launch[step, entry.gate]())
                seconds[place].append(_measure(made, (step, entry.gate), launches[place]))
    return seconds


def _measure(passes: Passes, place: tuple[str, float], launches: int) -> float:
    launch = passes.launch[place]
    start = time.perf_counter()
    for _ in range(launches):
        result = launch()
    passes.wait(result)
    return (time.perf_counter() - start) / launches
