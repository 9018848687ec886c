"""The fastest sizes and choices of the GPU kernels: tries them all on a GPU, in one command.

    python benchmarks/tune_gpu.py --output tuned.json            all; goes on where it was stopped
    python benchmarks/tune_gpu.py --output tuned.json --write    and writes kernels/gpu_table.py
    python benchmarks/tune_gpu.py --short --budget 120           one field at a time, bfloat16
    python benchmarks/tune_gpu.py --dry-run                      only compiles, without a GPU

For each head size, length of table, dtype, with and without gate keys: every `GpuBlocks` is
compiled for the forward pass; those that need more shared memory than there is are left out, and
counted. Each is compared with implementation="xla" at every gate level; one that is wrong is
reported and not timed. The others take turns: a time is that of many launches in a row by the
number of launches, and the median of the rounds counts. The fastest over dtypes and gate levels
stands in the table if its gradients are right too.
"""

import dataclasses
import functools
import json
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpu_trials
import jax
import tyro
from gpu_choices import Problem, candidates, chosen, name_of, problems, ranking, rendered
from machine import environment
from rich.console import Console

from posjax.kernels.blocks import GpuBlocks
from posjax.kernels.gpu_table import FASTEST

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "kernels" / "gpu_table.py"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to try."""

    sizes: tuple[int, ...] = (64, 128)
    """Head sizes."""
    positions: tuple[int, ...] = (0, 64, 128)
    """Rows of the table; 0 is attention without a bias."""
    dtypes: tuple[str, ...] = ("bfloat16", "float16")
    gates: tuple[float, ...] = (0.5, 0.02)
    """Values of a gate at a logit of 0."""
    length: int = 8192
    batch: int = 1
    heads: int = 16
    rounds: int = 7
    seconds: float = 0.02
    """How long the launches of a measurement take together, about."""
    short: bool = False
    """Only what differs in one field from the table in use, and the first dtype."""
    blocks: str | None = None
    """Only these: a list of fields of `GpuBlocks`, as JSON."""
    budget: float | None = None
    """Seconds after which no other problem is begun."""
    workers: int = 8
    """Compilations at a time."""
    dry_run: bool = False
    """Compile for an H200 and stop there; needs no GPU."""
    write: bool = False
    """Write kernels/gpu_table.py."""
    output: Path | None = None
    """JSON; problems that it holds already are not tried again."""


def trials_of(settings: Settings, problem: Problem) -> list[GpuBlocks]:
    """What to try for a problem."""
    if settings.blocks is None:
        return candidates(problem, settings.short)
    return [GpuBlocks(**fields) for fields in json.loads(settings.blocks)]


def examined(settings: Settings, problem: Problem, console: Console) -> dict:
    """Compiles, checks and times all candidates of a problem."""
    trials = trials_of(settings, problem)
    compile_one = functools.partial(gpu_trials.compiled, settings, problem)
    if settings.workers == 1:
        found = [compile_one(blocks) for blocks in trials]
    else:
        with ThreadPoolExecutor(settings.workers) as pool:
            found = list(pool.map(compile_one, trials))
    programs = {b: x for b, x in zip(trials, found, strict=True) if not isinstance(x, str)}
    failed = {name_of(b): x for b, x in zip(trials, found, strict=True) if isinstance(x, str)}
    result = {"problem": list(problem), "tried": len(trials), "failed": failed}
    result |= {"fits": [dataclasses.asdict(b) for b in programs], "timed": [], "refused": []}
    large = sum("shared memory" in reason for reason in failed.values())
    console.print(f"{problem.name}: {len(programs)} of {len(trials)} compile", end="")
    console.print(f", {large} need too much shared memory" if large else "")
    for name, reason in failed.items():
        if "shared memory" not in reason:
            console.print(f"  does not compile: {name}: {reason[:300]}", markup=False)
    if settings.dry_run:
        return result
    return result | measured(settings, problem, programs, console)


def measured(settings: Settings, problem: Problem, programs: dict, console: Console) -> dict:
    """Errors, and times of those that are right."""
    data = {gate: gpu_trials.data(settings, problem, gate) for gate in settings.gates}
    errors = gpu_trials.errors(problem, programs, data)
    wrong = {name_of(b): e for b, e in errors.items() if not e <= gpu_trials.TOLERANCE}
    for name, error in wrong.items():
        console.print(f"  [red]wrong by {error:.1e}[/red], not timed: {name}")
    right = {b: x for b, x in programs.items() if name_of(b) not in wrong}
    seconds = gpu_trials.times(settings, right, data)
    timed = [
        {
            "blocks": dataclasses.asdict(blocks),
            "error": errors[blocks],
            "seconds": {str(gate): x for gate, x in found.items()},
            "median": {str(gate): sorted(x)[len(x) // 2] for gate, x in found.items()},
        }
        for blocks, found in seconds.items()
    ]
    refused, best = [], [blocks for _, blocks in ranking([{"timed": timed}])]
    for blocks in best[:3]:
        reason = gpu_trials.wrong_gradients(settings, problem, GpuBlocks(**blocks))
        if reason is None:
            break
        console.print(f"  refused: {name_of(GpuBlocks(**blocks))}: {reason}", markup=False)
        refused.append(blocks)
    for entry in sorted(timed, key=lambda x: sum(x["median"].values()))[:3]:
        cells = ", ".join(f"{1e3 * s:.3f} ms at {g}" for g, s in entry["median"].items())
        console.print(f"  {cells}: {name_of(GpuBlocks(**entry['blocks']))}")
    return {"wrong": wrong, "timed": timed, "refused": refused}


def known(settings: Settings, content: dict) -> dict:
    """The cases of an earlier run, if it had the same settings and the same device."""
    if settings.output is None or not settings.output.exists():
        return {}
    before = json.loads(settings.output.read_text())
    same = all(before.get(name) == content[name] for name in ("compared", "device", "jax"))
    if not same:
        raise SystemExit(f"{settings.output} is from other settings; choose another --output.")
    return before["cases"]


def content_of(settings: Settings) -> dict:
    """With what it is measured."""
    free = ("output", "budget", "write", "workers", "sizes", "positions", "dtypes")
    compared = {k: v for k, v in dataclasses.asdict(settings).items() if k not in free}
    command = "python benchmarks/tune_gpu.py " + shlex.join(sys.argv[1:])
    compared = json.loads(json.dumps(compared))
    return {"command": command.strip(), **environment(), "compared": compared, "cases": {}}


def finish(settings: Settings, content: dict, console: Console) -> bool:
    """Prints and writes the table; whether every candidate was right."""
    cases = content["cases"]
    if not settings.dry_run:
        table, source = dict(FASTEST), f"{content['command']}, on {content['device']}"
        table |= {row: best for row, best in chosen(cases).items() if row in FASTEST}
        text = rendered(table, source)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        if settings.write:
            TABLE.write_text(text)
    return not any(case.get("wrong") or case["refused"] for case in cases.values())


def main(settings: Settings) -> None:
    """Goes through the problems, writing after each."""
    console, start = Console(width=120), time.monotonic()
    reason = None if settings.dry_run else gpu_trials.no_gpu()
    if reason is not None:
        raise SystemExit(f"{reason}; --dry-run compiles without one.")
    content = content_of(settings)
    content["cases"] = known(settings, content)
    dtypes = settings.dtypes[:1] if settings.short else settings.dtypes
    left = []
    for problem in problems(settings.sizes, settings.positions, dtypes):
        if problem.name in content["cases"]:
            continue
        if settings.budget is not None and time.monotonic() - start > settings.budget:
            left.append(problem.name)
            continue
        content["cases"][problem.name] = examined(settings, problem, console)
        jax.clear_caches()
        if settings.output is not None:
            settings.output.write_text(json.dumps(content, indent=1) + "\n")
    if left:
        console.print(f"not tried, the budget is spent: {'; '.join(left)}", markup=False)
    if not finish(settings, content, console):
        raise SystemExit("Some choices were wrong; see above.")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
