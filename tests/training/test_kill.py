"""A run that is killed and resumed ends in the same bits as one that was left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest

from posjax.training.records import read_records
from tests.training.tiny import assert_same_bits

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = 60
LIMIT = 300  # seconds


def command(directory, *words):
    fields = {
        "train.steps": STEPS,
        "train.checkpoint_every": 7,
        "train.log_every": 2,
        "mesh.data": 1,
        "task.examples": 8,
        "task.dense_blanks": 4,
        "task.sparse_blanks": 4,
        "runs": directory,
    }
    options = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "train.py"), "debug", *options, *words]


# Compiling takes most of the time.
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": str(ROOT),
}


def run(directory, *words):
    return subprocess.run(
        command(directory, *words),
        env=ENVIRONMENT, cwd=directory, capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip


def stopped_when(directory, condition, number, *words):
    """Starts a run, sends it a signal as soon as the condition holds, and waits for its end."""
    process = subprocess.Popen(
        command(directory, *words), env=ENVIRONMENT, cwd=directory, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    end = time.monotonic() + LIMIT
    while process.poll() is None and not condition() and time.monotonic() < end:
        time.sleep(0.0005)
    assert process.poll() is None, "the run ended before it could be stopped"
    process.send_signal(number)
    _, text = process.communicate(timeout=LIMIT)
    return process.returncode, text


def saved(directory):
    path = directory / "debug" / "checkpoints"
    return sorted(int(name) for name in os.listdir(path) if name.isdigit()) if path.exists() else []


def incomplete(directory):
    path = directory / "debug" / "checkpoints"
    names = os.listdir(path) if path.exists() else []
    return [name for name in names if "tmp" in name]


def final(directory):
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(directory / "debug" / "checkpoints" / str(STEPS) / "state")


def check_equal(directory, whole):
    """The same parameters and the same records, every step once."""
    got, want = final(directory), final(whole)
    assert len(jax.tree.leaves(got)) > 10
    assert_same_bits(got, want)
    lines, others = (
        [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_records(d)]
        for d in (directory / "debug", whole / "debug")
    )
    assert lines == others
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(2, STEPS + 1, 2))


def test_stopped_three_times(tmp_path):
    """Killed between two saves; resumed, and killed during a save; resumed, and interrupted."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()

    def between():
        lines = read_records(parts / "debug")
        return saved(parts) and not incomplete(parts) and lines[-1]["step"] >= 10

    code, _ = stopped_when(parts, between, signal.SIGKILL)
    assert code == -signal.SIGKILL
    first = saved(parts)[-1]
    assert first < STEPS

    def saving():
        return saved(parts)[-1] > first and incomplete(parts)

    code, _ = stopped_when(parts, saving, signal.SIGKILL, "--resume")
    assert code == -signal.SIGKILL
    assert incomplete(parts), "the save was complete before the signal came"
    second = saved(parts)[-1]

    def goes_on():
        return saved(parts)[-1] > second

    code, text = stopped_when(parts, goes_on, signal.SIGINT, "--resume")
    assert code == 130
    assert "SIGINT: stopped after step" in text
    (line,) = (line for line in text.splitlines() if line.startswith("resume with: "))
    words = [str(word) for word in command(parts)[1:]]
    assert line == f"resume with: python {' '.join(words)} --resume"

    for directory, *more in ((parts, "--resume"), (whole,)):
        result = run(directory, *more)
        assert result.returncode == 0, result.stderr
    check_equal(parts, whole)
