import json
import re

import numpy as np
import pytest
from rich.console import Console

from posjax.training import compare_encodings
from posjax.training.checkpoints import CheckpointError
from posjax.training.compare import compare_table, show_comparison
from posjax.training.interrupts import Interrupted
from posjax.training.runs import RunError
from tests.training.tiny import TASK, printed, tiny

SILENT = Console(quiet=True)
NAMES, SEEDS = ("cope", "nope"), (0, 3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from tests.training.tiny import Toy

    directory = tmp_path_factory.mktemp("runs") / "tiny-compare"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posjax.training.loop.Transformer", Toy)
        config = tiny(train__steps=2, train__log_every=1)
        return directory, config, compare_encodings(config, NAMES, SEEDS, directory, console=SILENT)


def test_every_encoding_has_every_seed_and_the_mean(finished):
    directory, _, comparison = finished
    assert comparison == json.loads((directory / "compare.json").read_text())
    assert list(comparison["encodings"]) == list(NAMES) and comparison["seeds"] == list(SEEDS)
    for name, entry in comparison["encodings"].items():
        for seed in SEEDS:
            report = json.loads((directory / f"{name}-seed{seed}" / "report.json").read_text())
            assert entry["seeds"][str(seed)] == report["metrics"]
            assert report["config"]["seed"] == seed
        for split in TASK.splits:
            values = [entry["seeds"][str(seed)][split]["token_error"] for seed in SEEDS]
            assert entry["mean"][split]["token_error"] == pytest.approx(np.mean(values))
        assert entry["train_seconds"] > 0 and entry["steps_per_second"] > 0


def test_runs_differ_in_encoding_and_seed_alone(finished):
    directory, _, _ = finished
    configs = [json.loads(path.read_text()) for path in sorted(directory.glob("*/config.json"))]
    assert len(configs) == 4
    for config in configs:
        del config["encoding"], config["seed"], config["name"]
    assert all(config == configs[0] for config in configs)


def test_tables_and_files_show_the_numbers(finished):
    directory, _, comparison = finished
    headings, rows = compare_table(comparison)
    assert headings == ["encoding", "in distribution", "dense", "sparse", "train s", "steps/s"]
    markdown = (directory / "compare.md").read_text()
    text = printed(lambda console: show_comparison(console, comparison, directory))
    for name, row in zip(NAMES, rows, strict=True):
        entry = comparison["encodings"][name]
        for split, cell in zip(TASK.splits, row[1:4], strict=True):
            mean, seeds = re.fullmatch(r"([\d.]+)% \[(.*)\]", cell).groups()
            assert float(mean) == pytest.approx(100 * entry["mean"][split]["token_error"], abs=6e-3)
            for seed, value in zip(SEEDS, seeds.split(", "), strict=True):
                want = 100 * entry["seeds"][str(seed)][split]["token_error"]
                assert float(value) == pytest.approx(want, abs=6e-3)
            assert f"{mean}%" in text and f"[{seeds}]" in text
        assert f"| {' | '.join(row)} |" in markdown
    for name in ("compare.png", "loss.png"):
        assert (directory / name).stat().st_size > 5000


@pytest.mark.usefixtures("toy")
def test_never_overwritten_and_resumed(finished, monkeypatch):
    directory, config, comparison = finished
    with pytest.raises(RunError, match=r"exists.*--resume.*--name tiny-compare-2"):
        compare_encodings(config, NAMES, SEEDS, directory, console=SILENT)
    with pytest.raises(CheckpointError, match=r"optimizer\.b1: now 0.5, before 0.9"):
        other = tiny(train__steps=2, optimizer__b1=0.5)
        compare_encodings(other, NAMES, SEEDS, directory, resume=True, console=SILENT)
    monkeypatch.setattr("posjax.training.loop._Trainer", None)  # Nothing is trained again.
    again = compare_encodings(config, NAMES, SEEDS, directory, resume=True, console=SILENT)
    assert again["encodings"] == comparison["encodings"]


@pytest.mark.usefixtures("toy")
def test_an_interrupted_comparison_goes_on(tmp_path, monkeypatch):
    import posjax.training.compare as module

    def fit(config, folder, **options):
        if len(done) == 1:
            raise Interrupted(2, 1, folder)
        done.append(config.name)
        return original(config, folder, **options)

    original, done, config = module.fit, [], tiny(train__steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(module, "fit", fit)
        with pytest.raises(Interrupted):
            compare_encodings(config, NAMES, (0,), tmp_path / "c", console=SILENT)
    stamp = (tmp_path / "c" / "cope-seed0" / "report.json").stat().st_mtime_ns
    comparison = compare_encodings(config, NAMES, (0,), tmp_path / "c", resume=True, console=SILENT)
    assert (tmp_path / "c" / "cope-seed0" / "report.json").stat().st_mtime_ns == stamp
    assert list(comparison["encodings"]) == list(NAMES)
    rows = compare_table(comparison)[1]
    assert all("[" not in cell for row in rows for cell in row)


@pytest.mark.usefixtures("toy")
def test_bad_names_are_found_before_anything_is_trained(tmp_path):
    for names, seeds, words in (
        (("cope", "rop"), (0,), "did you mean"),
        (("cope", "cope"), (0,), "none of them twice"),
        (("cope",), (1, 1), "none of them twice"),
        ((), (0,), "one or more"),
        (("cope",), (-1,), "seed is -1; it must be from 0"),
    ):
        with pytest.raises(ValueError, match=words):
            compare_encodings(tiny(), names, seeds, tmp_path / "c", console=SILENT)
    assert not (tmp_path / "c").exists()
