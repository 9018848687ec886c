"""Everything that only a Hopper GPU can tell, in one command of less than 9 minutes.

    python benchmarks/on_gpu.py --output h200

| step      | what                                                       | file                |
|-----------|------------------------------------------------------------|---------------------|
| tests     | the GPU kernels' tests on the device                       | tests.log           |
| attention | benchmarks/attention.py --suite gpu                        | attention.json      |
| train     | benchmarks/train_step.py                                   | train.json          |
| tune      | benchmarks/tune_gpu.py --short; nothing is written over    | tune.json           |

Each step is a process with a time limit of its own; where one fails the others go on, and what it
printed stands in STEP.log. summary.json holds how each ended. A second run with the same output
goes on with attention and tune where they stopped.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import tyro
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
_TESTS = ("tests/kernels/test_gpu_device.py", "tests/kernels/test_gpu_tables.py")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to run and for how long."""

    output: Path
    """Folder for everything."""
    steps: tuple[str, ...] = ("tests", "attention", "train", "tune")
    seconds: float = 520.0
    """For all steps together; each one's limit is its share."""
    tiny: bool = False
    """Sizes that take seconds on a CPU, to try the command."""


class Step(NamedTuple):
    """A command, and its share of the time."""

    share: float
    words: list[str]
    tiny: list[str]


def steps(output: Path) -> dict[str, Step]:
    """All of them; `{budget}` is filled in later."""
    script = lambda name, file: [f"benchmarks/{name}.py", "--output", str(output / file)]  # noqa: E731
    heads = ["--heads", "2", "--rounds", "1"]
    attention = ["--lengths", "64", "--kv-heads", "1", "--head-size", "8", "--positions", "6"]
    attention += ["--contenders", "plain", "cope_reference", "cope_xla", "--no-memory"]
    train = ["--layers", "1", "--width", "16", "--lengths", "16", "--batch-tokens", "32"]
    train += ["--vocabulary", "16", "--dtype", "float32", "--steps", "1", "--positions", "4"]
    tune = ["--dry-run", "--sizes", "64", "--positions", "0", "--blocks", '[{"key": 64}]']
    budget = ["--budget", "{budget}"]
    tests = ["-m", "pytest", "-n", "4", "-q", "-p", "no:cacheprovider", *_TESTS]
    return {
        "tests": Step(0.25, tests, ["-k", "reciprocals"]),
        "attention": Step(
            0.33,
            [*script("attention", "attention.json"), *budget],
            [*heads, *attention],
        ),
        "train": Step(0.24, [*script("train_step", "train.json"), *budget], [*heads, *train]),
        "tune": Step(
            0.18,
            [*script("tune_gpu", "tune.json"), "--short", "--length", "4096", *budget],
            [*heads, *tune],
        ),
    }


def command(settings: Settings, name: str, seconds: float) -> list[str]:
    """What to start for a step that may take so long."""
    step = steps(settings.output)[name]
    # Less than the limit: a step that is stopped from outside says nothing.
    words = [word.replace("{budget}", f"{0.8 * seconds:.0f}") for word in step.words]
    if name == "attention":
        words += [] if settings.tiny else ["--suite", "gpu"]
    return [sys.executable, *words, *(step.tiny if settings.tiny else [])]


def run(words: list[str], log: Path, seconds: float) -> str:
    """How a process ended, which may take so long; what it started ends with it."""
    platforms = os.environ.get("JAX_PLATFORMS", "cuda,cpu")
    environment = os.environ | {"JAX_PLATFORMS": platforms, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        print("$", *words, file=file, flush=True)
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {seconds:.0f} s"
    return "ok" if code == 0 else f"failed with {code}"


def main(settings: Settings) -> None:
    """Runs the steps one after another."""
    known = steps(settings.output)
    if unknown := [name for name in settings.steps if name not in known]:
        raise SystemExit(f"unknown step {unknown[0]!r}; known are {', '.join(known)}")
    folder = settings.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.replace(settings, output=folder)
    console, summary = Console(), {}
    start, left = time.monotonic(), sum(known[name].share for name in settings.steps)
    for name in settings.steps:
        # What earlier steps did not need is shared by those that are left.
        rest = settings.seconds - (time.monotonic() - start)
        seconds, left = rest * known[name].share / left, left - known[name].share
        began = time.monotonic()
        ended = run(command(settings, name, seconds), folder / f"{name}.log", seconds)
        summary[name] = {"ended": ended, "seconds": round(time.monotonic() - began, 1)}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        console.print(f"{name}: {ended} ({summary[name]['seconds']} s), {folder / name}.log")
    if any(found["ended"] != "ok" for found in summary.values()):
        raise SystemExit("Not all steps went well; see their logs.")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
