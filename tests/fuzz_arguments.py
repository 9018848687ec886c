"""Wrong values for every public argument: what is refused clearly, and what is taken in silence.

Callables are found by inspection (`__all__` of the public modules). Each is called once with right
arguments, and then with one argument at a time replaced by a wrong value. The answer is

    clear     refused, with a message that names the argument
    unclear   refused by some other error
    silent    taken, although it is wrong
    right     taken, and right by a rule (`REVIEWED`, or NaN that comes out as NaN)
    hang      no answer in time

    python -m tests.fuzz_arguments --only padded
"""

import argparse
import collections
import contextlib
import inspect
import io
import pathlib
import random
import re
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import posjax
from posjax.biases.base import Bias
from tests.fuzzing.reviewed import REVIEWED
from tests.fuzzing.samples import array_for, right_arguments
from tests.fuzzing.targets import (
    parameters_of,
    public_callables,
    short_name,
    why_skipped,
    without_none,
)
from tests.fuzzing.values import bad_values

SECONDS = 15
MEMORY = 6 * 2**30


class Case(NamedTuple):
    """A callable, its right arguments, and the one to replace."""

    name: str
    call: Callable
    argument: str
    kind: str
    value: Any
    baseline: dict[str, Any]


class Finding(NamedTuple):
    """What came of a case."""

    case: Case
    verdict: str
    said: str


class _TooLong(BaseException):
    """The alarm."""


def _use(call: Callable, arguments: dict[str, Any]) -> Any:
    """The call, and attention with its result if that is the description of a bias."""
    result = call(**arguments)
    if isinstance(result, Bias):
        x = jnp.ones((2, 4, 2, 8))
        result = posjax.dot_product_attention(
            x, x, x, bias=result, is_causal=True, implementation="reference"
        )
    if isinstance(result, Iterator):
        result = next(result)
    return jax.block_until_ready(result) if _leaves(result) else result


def _leaves(tree: Any) -> list:
    return [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array | np.ndarray)]


def cases(only: str | None = None) -> tuple[list[Case], dict[str, str]]:
    """All cases, and the callables without any, with the reason."""
    found, left_out = [], {}
    for path, call in public_callables().items():
        if only is not None and not path.startswith(only) and only != short_name(path):
            continue
        reason = why_skipped(path, call)
        if reason is None:
            try:
                found += _cases_of(path, call)
            except (Exception, _TooLong) as error:
                reason = f"no working call: {type(error).__name__}: {error}".splitlines()[0][:150]
        if reason is not None:
            left_out[path] = reason
    return found, left_out


def _cases_of(path: str, call: Callable) -> list[Case]:
    name = short_name(path)
    parameters = parameters_of(call)
    required = right_arguments(call, name)
    with _quiet(6 * SECONDS):
        _use(call, required)
    found = []
    for argument, (annotation, default) in parameters.items():
        right = required.get(argument, default)
        kind, _ = without_none(annotation)
        if right is None and hasattr(kind, "dim_str"):
            right = array_for(kind)
        for value_kind, value in bad_values(annotation, right, default):
            if value_kind in ("size", "first size") and not _shared(parameters, kind, value_kind):
                continue
            found.append(Case(name, call, argument, value_kind, value, required))
    return found


def _shared(parameters: dict[str, tuple[Any, Any]], kind: Any, which: str) -> bool:
    """Whether another axis has the letter of the first or last axis, so that its size is known."""
    axes = [
        axis.strip("#")
        for annotation, default in parameters.values()
        if default is inspect.Parameter.empty
        for axis in getattr(without_none(annotation)[0], "dim_str", "").split()
    ]
    own = kind.dim_str.split()[0 if which == "first size" else -1].strip("#")
    return not own.startswith("*") and axes.count(own) > 1


@contextlib.contextmanager
def _quiet(seconds: float = SECONDS) -> Iterator[None]:
    """No output, no warnings, and an alarm."""

    def ring(*_):
        raise _TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(case: Case) -> Finding:
    """Tries a case."""
    arguments = case.baseline | {case.argument: case.value}
    try:
        with _quiet():
            result = _use(case.call, arguments)
    except _TooLong:
        return Finding(case, "hang", f"more than {SECONDS} s")
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        kinds = isinstance(error, ValueError | TypeError | NotImplementedError)
        names = re.search(rf"\b{re.escape(case.argument)}\b", str(error))
        others = parameters_of(case.call)
        partner = any(re.search(rf"\b{name} (is|has)\b", str(error)) for name in others)
        names = names or ("; it must be " in said and partner)
        by_us = kinds and names and not re.search(r"unexpected keyword|has no attribute", said)
        return Finding(case, "clear" if by_us else "unclear", said)
    reason = _reviewed(case)
    if reason is None and case.kind in ("nans", "nan") and _has_nan(result):
        reason = "NaN comes out"
    return Finding(case, "silent" if reason is None else "right", reason or "")


def _reviewed(case: Case) -> str | None:
    for name in (case.name, "*"):
        for argument in (case.argument, "*"):
            reason = REVIEWED.get((name, argument, case.kind))
            if reason is not None:
                return reason
    return None


def _has_nan(result: Any) -> bool:
    floats = [x for x in _leaves(result) if jnp.issubdtype(x.dtype, jnp.floating)]
    return any(bool(jnp.isnan(x).any()) for x in floats)


def run(chosen: list[Case], show: Callable[[Finding], None] = lambda _: None) -> list[Finding]:
    """Tries cases one after the other, with limits of time and memory."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory_in_use() + MEMORY, limits[1]))
    try:
        findings = []
        for case in chosen:
            findings.append(judge(case))
            show(findings[-1])
        return findings
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _memory_in_use() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def counts(findings: list[Finding]) -> dict[str, int]:
    """How many of each verdict."""
    found = collections.Counter(finding.verdict for finding in findings)
    return {name: found[name] for name in ("clear", "right", "unclear", "silent", "hang")}


def main(words: list[str] | None = None) -> int:
    """The command line; 1 where anything is silent or hangs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="one callable, or the path of a module")
    parser.add_argument("--sample", type=int, metavar="N", help="so many cases, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        chosen, left_out = cases(options.only)
        if options.sample is not None:
            chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))

        def show(finding: Finding) -> None:
            if finding.verdict in ("unclear", "silent", "hang"):
                case = finding.case
                said = " ".join(finding.said.split())[:110]
                print(f"{finding.verdict:8}{case.name}({case.argument}: {case.kind})  {said}")

        findings = run(chosen, show)
    for path, reason in left_out.items():
        print(f"left out {path}: {reason}")
    arguments = {(case.name, case.argument) for case in chosen}
    print(f"{len(chosen)} values, {len(arguments)} arguments, {counts(findings)}")
    found = counts(findings)
    return int(found["silent"] + found["hang"] > 0)


if __name__ == "__main__":
    sys.exit(main())
