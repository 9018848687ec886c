import dataclasses
import json
import signal

import jax
import numpy as np
import pytest
from rich.console import Console

from posjax.encodings import Learned
from posjax.tasks import SelectiveCopy
from posjax.training import fit
from posjax.training.checkpoints import CheckpointError, Checkpoints
from posjax.training.clock import NonFiniteLossError
from posjax.training.config import as_json
from posjax.training.interrupts import Interrupted
from posjax.training.records import read_records
from posjax.training.report import report_table
from posjax.training.runs import RunError
from tests.training.tiny import TASK, assert_same_bits, printed, tiny

pytestmark = pytest.mark.usefixtures("toy")
SILENT = Console(quiet=True)


def final_state(directory):
    """The arrays of the newest checkpoint, as they lie on disk."""
    import orbax.checkpoint as ocp

    checkpoints = Checkpoints(directory / "checkpoints", every=1, keep=2)
    step = checkpoints.latest()
    checkpoints.close()
    with ocp.StandardCheckpointer() as reader:
        return step, reader.restore(directory / "checkpoints" / str(step) / "state")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from start to end."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        from tests.training.tiny import Toy

        patch.setattr("posjax.training.loop.Transformer", Toy)
        return directory, fit(tiny(), directory, console=SILENT)


def test_report_has_everything(finished):
    directory, report = finished
    assert report == json.loads((directory / "report.json").read_text())
    assert (
        report["config"] == as_json(tiny()) == json.loads((directory / "config.json").read_text())
    )
    assert report["task"] == "SelectiveCopy" and report["encoding"] == "CoPE"
    assert list(report["metrics"]) == list(TASK.splits)
    for values in report["metrics"].values():
        assert 0 <= values["token_error"] <= values["sequence_error"] <= 1
    names = {
        "python",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
        "posjax",
    }
    assert set(report["versions"]) == names
    assert report["device"]["platform"] == jax.devices()[0].platform
    assert report["device"]["count"] == jax.device_count()
    assert report["steps"] == 6 and report["parameters"] > 0
    for name in ("train_seconds", "compile_seconds", "evaluation_seconds", "steps_per_second"):
        assert report[name] > 0
    assert report["git_commit"] is None or len(report["git_commit"]) >= 40
    assert report["primary"] == "token_error" and report["baselines"] == {}


def test_files_of_a_run(finished):
    directory, report = finished
    lines = read_records(directory)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert lines[-1] == {"step": 6, "evaluation": report["metrics"]}
    assert report["final_loss"] == lines[-2]["loss"]
    for name in ("loss.png", "metrics.png"):
        assert (directory / name).read_bytes().startswith(b"\x89PNG")
    assert final_state(directory)[0] == 6


def test_table_shows_the_numbers_of_the_report(finished):
    _, report = finished
    text = printed(lambda console: console.print(report_table(report)))
    for split, values in report["metrics"].items():
        (line,) = (line for line in text.splitlines() if split in line)
        for value in values.values():
            assert f"{100 * value:.2f}%" in line


def test_a_finished_run_is_shown_and_never_overwritten(finished):
    directory, report = finished
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert fit(tiny(), directory, resume=True, console=SILENT) == report
    with pytest.raises(RunError, match=r"tiny exists.*--resume.*--name tiny-2"):
        fit(tiny(), directory, console=SILENT)
    with pytest.raises(CheckpointError, match=r"train\.steps: now 7, before 6"):
        fit(tiny(train__steps=7), directory, resume=True, console=SILENT)
    assert before == {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_nothing_to_resume(tmp_path):
    with pytest.raises(RunError, match="holds no run to resume"):
        fit(tiny(), tmp_path / "none", resume=True, console=SILENT)


def test_the_same_seed_gives_the_same_bits(finished, tmp_path):
    directory, report = finished
    again = fit(tiny(), tmp_path / "again", console=SILENT)
    assert again["metrics"] == report["metrics"]
    assert_same_bits(final_state(tmp_path / "again"), final_state(directory))


def without_speed(directory):
    return [
        {name: value for name, value in line.items() if name != "tokens_per_second"}
        for line in read_records(directory)
    ]


@pytest.mark.parametrize(("number", "after"), [(signal.SIGINT, 3), (signal.SIGTERM, 4)])
def test_a_signal_saves_and_resume_goes_on_bit_for_bit(
    finished, tmp_path, monkeypatch, number, after
):
    """Stopped in the middle of a window of metrics too (log_every is 2)."""
    from posjax.training.progress import TrainingProgress

    def step(self, done):
        if done == after:
            signal.raise_signal(number)

    directory = tmp_path / "stopped"
    config = tiny(train__checkpoint_every=100)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "step", step)
        with pytest.raises(Interrupted, match=f"{number.name}: stopped after step {after}") as stop:
            fit(config, directory, console=SILENT)
    assert stop.value.number == number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not (directory / "report.json").exists()
    report = fit(config, directory, resume=True, console=SILENT)
    assert report["metrics"] == finished[1]["metrics"]
    assert report["final_loss"] == finished[1]["final_loss"]
    assert_same_bits(final_state(directory), final_state(finished[0]))
    assert without_speed(directory) == without_speed(finished[0])


def test_a_signal_during_the_last_evaluation(finished, tmp_path, monkeypatch):
    from posjax.training import evaluate

    def batches(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    original, directory = evaluate.split_batches, tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "split_batches", batches)
        with pytest.raises(Interrupted, match="after step 6"):
            fit(tiny(), directory, console=SILENT)
    report = fit(tiny(), directory, resume=True, console=SILENT)
    assert report["metrics"] == finished[1]["metrics"]
    assert without_speed(directory) == without_speed(finished[0])


def test_resume_before_the_first_checkpoint_starts_again(finished, tmp_path, monkeypatch):
    directory = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr("posjax.training.loop.Records", None)
        with pytest.raises(TypeError):
            fit(tiny(), directory, console=SILENT)
    assert fit(tiny(), directory, resume=True, console=SILENT)["metrics"] == finished[1]["metrics"]


def test_evaluations_during_training(tmp_path):
    report = fit(tiny(train__evaluate_every=2), tmp_path / "run", console=SILENT)
    lines = [line for line in read_records(tmp_path / "run") if "evaluation" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1]["evaluation"] == report["metrics"]


def test_a_split_longer_than_a_table_is_not_available(tmp_path):
    task = dataclasses.replace(TASK, sparse_blanks=9)
    config = tiny(task=task, encoding=Learned(max_length=task.length))
    report = fit(config, tmp_path / "run", console=SILENT)
    assert report["metrics"]["sparse"] is None
    assert "max_length=6" in report["unavailable"]["sparse"]
    assert report["metrics"]["dense"]["token_error"] >= 0
    text = printed(lambda console: console.print(report_table(report)))
    (line,) = (line for line in text.splitlines() if "sparse" in line)
    assert line.count("n/a") == 2


def test_a_model_that_cannot_be_built_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="max_length=3"):
        fit(tiny(encoding=Learned(max_length=3)), tmp_path / "run", console=SILENT)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    def example(self, index, split="train", seed=0):
        batch = original(self, index, split, seed)
        if split == "train" and index >= 4 * 8:
            batch["loss_weights"] = np.full_like(batch["loss_weights"], np.inf)
        return batch

    original = SelectiveCopy.example
    monkeypatch.setattr(SelectiveCopy, "example", example)
    with pytest.raises(NonFiniteLossError) as error:
        fit(tiny(), tmp_path / "run", console=SILENT)
    text = str(error.value)
    assert "loss is nan at step 5" in text and "--optimizer.learning_rate (now 0.01)" in text
    assert "last checkpoint is of step 3" in text
    step, state = final_state(tmp_path / "run")
    assert step == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_lines_where_there_is_no_terminal(tmp_path):
    with (tmp_path / "out.txt").open("w") as file:
        fit(tiny(), tmp_path / "run", console=Console(file=file, width=100))
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == ["step 2/6", "step 4/6", "step 6/6"]
    assert all("loss" in line and "tokens/s" in line and "left" in line for line in lines)


def test_a_bar_where_there_is_a_terminal(tmp_path):
    with (tmp_path / "out.txt").open("w") as file:
        console = Console(file=file, force_terminal=True, width=100)
        fit(tiny(), tmp_path / "run", console=console)
    text = (tmp_path / "out.txt").read_text()
    assert "6/6" in text and "tokens/s" in text
