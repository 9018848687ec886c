"""Time and memory of attention: CoPE dense and blockwise, and attention without encoding.

    python benchmarks/attention.py                                  T = 4096 on the device JAX finds
    python benchmarks/attention.py --lengths 1024 4096 --rounds 7
    python benchmarks/attention.py --lengths 16384 --contenders cope_xla --output long.json
    python benchmarks/attention.py --suite gpu --output h200.json   under 9 minutes
    python benchmarks/attention.py --docs h200.json                 results into docs/performance.md

All contenders take turns in one process, so a machine that slows down slows all of them; each runs
once untimed and then timed in its turn, and times are medians of the rounds. On an accelerator a
time is that of many launches in a row, with one wait at the end, by their number. Before any time
is taken every contender is checked against the reference on a short problem; what is wrong is not
timed. Peak memory is that of a process of its own for each contender, minus what the process had
before: resident memory on a CPU, the allocator's peak elsewhere. While JAX and PyTorch share a GPU
each may take half of its memory. PyTorch, if it is installed, runs the paper's dense form on the
same data (on the CPU, or on the GPU that it finds), eagerly and compiled.
"""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

# Before the first import of JAX: PyTorch uses the same GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")

import tyro
from attention_contenders import CONTENDERS, PASSES, available
from attention_problem import Problem, Settings, arrays_of, problems, unsaturated, with_suite
from attention_report import show, write_docs
from attention_timing import NO_TIME, Entry, check, is_memory, rows_of
from machine import environment, peak_bytes
from rich.console import Console

# Sizes of blocks whose share that counts is told: those of the TPU kernels or of two warpgroups,
# and those of one warpgroup.
BLOCKS = (128, 64)
_FULL = "out of memory"
# What a process that measures memory may take.
MEMORY_SECONDS = 120.0


def measured(
    settings: Settings, problem: Problem, deadline: float, console: Console, known: dict
) -> dict:
    """Everything about one problem but memory; contenders that are wrong are not timed."""
    names, missing = available(settings, problem)
    wrong = check(settings, problem, names, known)
    for name, reason in wrong.items():
        console.print(f"{name} is not timed: {reason}", markup=False, style="red")
    arrays = arrays_of(problem)
    shares = {
        str(gate): {str(size): unsaturated(problem, arrays, gate, size) for size in BLOCKS}
        for gate in settings.gate
    }
    rows = rows_of(settings, problem, [n for n in names if n not in wrong], deadline)
    found = {"problem": dataclasses.asdict(problem), "unsaturated": shares, "rows": rows}
    return found | {"wrong": wrong, "missing": missing}


def peak_memory(problem: Problem, entry: Entry, seconds: float) -> float | str:
    """GiB that forward and backward add to a process of their own, or why there is no number."""
    words = [sys.executable, __file__, "--memory-of", entry.contender]
    words += ["--gate", str(entry.gate), "--lengths", str(problem.length)]
    for field in ("batch", "heads", "kv_heads", "head_size", "positions", "dtype"):
        words += [f"--{field.replace('_', '-')}", str(getattr(problem, field))]
    alone = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=seconds, env=alone
        )
    except subprocess.TimeoutExpired:
        return NO_TIME
    if done.returncode == 0:
        return float(done.stdout.split()[-1])
    killed = done.returncode < 0  # by the system, when a computer's memory is full
    return _FULL if killed or is_memory(RuntimeError(done.stderr)) else "failed"


def print_memory(settings: Settings) -> None:
    """What `peak_memory` reads: runs one contender once."""
    (problem,) = problems(settings)
    passes = CONTENDERS[settings.memory_of].make(problem, arrays_of(problem), settings.gate)
    before = peak_bytes()
    passes.prepare()
    passes.wait(passes.launch[PASSES[1], settings.gate[0]]())
    print((peak_bytes() - before) / 2**30)


def add_memory(results: dict, deadline: float) -> list[str]:
    """Peak memory of every row, the first problem first; contenders for which no time was left."""
    known = {}
    for name, result in results.items():
        problem = Problem(**result["problem"])
        for row in result["rows"].values():
            known_before = row.get("peak_gib", NO_TIME) != NO_TIME
            if known_before or row["failed"].get(PASSES[1], _FULL) != _FULL:
                continue
            # Memory does not depend on the gates.
            place = name, row["contender"]
            seconds = min(MEMORY_SECONDS, deadline - time.monotonic())
            if place not in known and seconds > 0:
                known[place] = peak_memory(problem, Entry(*place[1:], row["gate"]), seconds)
            row["peak_gib"] = known.setdefault(place, NO_TIME)
    return [f"memory of {', '.join(place)}" for place, peak in known.items() if peak == NO_TIME]


def earlier(settings: Settings, content: dict) -> dict:
    """Results of an earlier run with the same settings on the same device, to go on with."""
    if settings.output is None or settings.budget is None or not Path(settings.output).exists():
        return {}
    before = json.loads(Path(settings.output).read_text())
    free = ("budget", "output", "docs")
    kept = ({k: v for k, v in x["settings"].items() if k not in free} for x in (before, content))
    same = all(before.get(name) == content[name] for name in ("device", "jax"))
    if not same or next(kept) != next(kept):
        return {}
    finished = lambda row: NO_TIME not in row["failed"].values()  # noqa: E731
    results = before["results"].items()
    return {name: x for name, x in results if all(map(finished, x["rows"].values()))}


def untimed(rows: dict) -> bool:
    """Whether there was no time for any of them."""
    return any(NO_TIME in row["failed"].values() for row in rows.values()) and not any(
        row["seconds"] for row in rows.values()
    )


def run(settings: Settings) -> bool:
    """Checks, measures, prints and writes; whether all that ran was right."""
    start, console = time.monotonic(), Console(width=150)
    deadline = start + (settings.budget or float("inf"))
    # A quarter of the time is left for memory.
    timed_until = deadline - (settings.budget or 0) * 0.25 * settings.memory
    command = "python benchmarks/attention.py " + shlex.join(sys.argv[1:])
    settings_json = json.loads(json.dumps(dataclasses.asdict(settings)))
    content = {"command": command, **environment(), "settings": settings_json, "missing": {}}
    content |= {"left_out": [], "results": {}}
    results = content["results"] = earlier(settings, content)
    longest, known = 0.0, {}  # of problems so far
    for problem in problems(settings):
        content["missing"] |= available(settings, problem)[1]
        if problem.name in results:
            continue
        began = time.monotonic()
        if began + 0.7 * longest > timed_until:
            content["left_out"].append(problem.name)
            continue
        found = measured(settings, problem, timed_until, console, known)
        if untimed(found["rows"]):
            content["left_out"].append(problem.name)
            continue
        results[problem.name] = found
        longest = max(longest, time.monotonic() - began)
        write(settings, content)
        show(console, problem.name, results[problem.name], settings.base)
    if settings.memory:
        content["left_out"] += add_memory(results, deadline)
        for name, result in results.items():
            if any(type(row.get("peak_gib")) is float for row in result["rows"].values()):
                show(console, name, result, settings.base)
    for name, reason in content["missing"].items():
        console.print(f"not run: {name}: {reason}", markup=False)
    for name in content["left_out"]:
        console.print(f"left out, the budget is spent: {name}", markup=False)
    write(settings, content)
    return not any(result["wrong"] for result in results.values())


def write(settings: Settings, content: dict) -> None:
    """Everything so far as JSON."""
    if settings.output:
        Path(settings.output).write_text(json.dumps(content, indent=1) + "\n")


def main(settings: Settings) -> None:
    """What was asked for."""
    settings = with_suite(settings)
    if settings.memory_of:
        print_memory(settings)
    elif settings.docs:
        write_docs(Path(settings.docs))
    elif not run(settings):
        raise SystemExit("Some contenders were wrong and not timed; see above.")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
