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


ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def run(directory, *words):
    return subprocess.run(
        command(directory, *words),
        env=ENVIRONMENT, cwd=directory, capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip


def stopped_when(directory, condition, number):
    """Starts a run, sends it a signal as soon as the condition holds, and waits for its end."""
    process = subprocess.Popen(
        command(directory), env=ENVIRONMENT, cwd=directory, stderr=subprocess.PIPE,
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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    result = run(directory)
    assert result.returncode == 0, result.stderr
    return directory


def check_resumed(directory, uninterrupted):
    result = run(directory, "--resume")
    assert result.returncode == 0, result.stderr
    got, want = final(directory), final(uninterrupted)
    assert len(jax.tree.leaves(got)) > 10
    assert_same_bits(got, want)
    lines, others = (
        [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read_records(d)]
        for d in (directory / "debug", uninterrupted / "debug")
    )
    assert lines == others
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(2, STEPS + 1, 2))


def test_killed_between_saves(uninterrupted, tmp_path):
    def between():
        lines = read_records(tmp_path / "debug")
        return saved(tmp_path) and not incomplete(tmp_path) and lines[-1]["step"] >= 10

    code, _ = stopped_when(tmp_path, between, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert saved(tmp_path)[-1] < STEPS
    check_resumed(tmp_path, uninterrupted)


def test_killed_during_a_save(uninterrupted, tmp_path):
    def saving():
        return saved(tmp_path) and incomplete(tmp_path)

    code, _ = stopped_when(tmp_path, saving, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert incomplete(tmp_path), "the save was complete before the signal came"
    check_resumed(tmp_path, uninterrupted)


def test_stopped_says_how_to_resume(uninterrupted, tmp_path):
    code, text = stopped_when(tmp_path, lambda: saved(tmp_path), signal.SIGINT)
    assert code == 130
    assert "SIGINT: stopped after step" in text
    (line,) = (line for line in text.splitlines() if line.startswith("resume with: "))
    words = [str(word) for word in command(tmp_path)[1:]]
    assert line == f"resume with: python {' '.join(words)} --resume"
    check_resumed(tmp_path, uninterrupted)
