"""benchmarks/on_gpu.py and benchmarks/train_step.py at tiny sizes."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = {
    "lengths": (16,), "batch_tokens": 32, "layers": 1, "heads": 2, "width": 16, "vocabulary": 16,
    "positions": 4, "dtype": "float32", "rounds": 2, "steps": 1,
    "contenders": ("rope_xla", "cope_xla", "cope_gpu"),
}  # fmt: skip


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.mark.standard_promotion
def test_train_step(load, tmp_path, capsys):
    train_step, output = load("train_step"), tmp_path / "found.json"
    train_step.main(train_step.Settings(**TINY, output=output))
    content = json.loads(output.read_text())
    rows = content["results"]["16"]
    assert all(len(rows[name]["seconds"]) == 2 for name in ("rope_xla", "cope_xla"))
    assert "CoPE / RoPE = " in capsys.readouterr().out
    assert set(rows) | set(content["missing"]) == set(TINY["contenders"])


@pytest.mark.standard_promotion
def test_a_wrong_step_is_not_timed(load, monkeypatch, capsys):
    train_step = load("train_step")
    wrong = train_step.Contender(lambda s: train_step.CoPE(num_positions=2, gate_bias=1.0), "xla")
    monkeypatch.setitem(train_step.CONTENDERS, "cope_wrong", wrong)
    names = ("cope_xla", "cope_wrong")
    with pytest.raises(SystemExit, match="wrong and not timed"):
        train_step.main(train_step.Settings(**TINY | {"contenders": names}))
    assert "wrong: the " in capsys.readouterr().out.replace("\n", " ")


def test_steps_have_limits_of_their_own(load, tmp_path):
    on_gpu = load("on_gpu")
    start = time.monotonic()
    words = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    assert on_gpu.run(words, tmp_path / "log", 2.0) == "stopped after 2 s"
    assert time.monotonic() - start < 30
    assert "begun" in (tmp_path / "log").read_text()
    assert on_gpu.run([sys.executable, "-c", "1 / 0"], tmp_path / "log", 20.0) == "failed with 1"
    assert "ZeroDivisionError" in (tmp_path / "log").read_text()


def test_the_steps_of_a_gpu(load, tmp_path, monkeypatch, capsys):
    on_gpu, seen = load("on_gpu"), {}

    def run(words, log, seconds):
        seen[log.stem] = words, seconds
        return "failed with 2" if log.stem == "tests" else "ok"

    monkeypatch.setattr(on_gpu, "run", run)
    with pytest.raises(SystemExit, match="Not all steps went well"):
        on_gpu.main(on_gpu.Settings(tmp_path / "new"))
    assert list(seen) == ["tests", "attention", "train", "tune"]
    shares = [step.share for step in on_gpu.steps(tmp_path).values()]
    assert sum(shares) == pytest.approx(1)
    assert seen["tests"][1] == pytest.approx(520 * shares[0], rel=0.01)
    # The last one has what the others left.
    assert 500 < seen["tune"][1] < 520
    words, seconds = seen["attention"]
    assert words[-2:] == ["--suite", "gpu"]
    assert float(words[words.index("--budget") + 1]) == pytest.approx(0.8 * seconds, abs=1)
    summary = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert summary["tests"]["ended"] == "failed with 2" and summary["tune"]["ended"] == "ok"
    with pytest.raises(SystemExit, match="unknown step 'x'"):
        on_gpu.main(on_gpu.Settings(tmp_path, steps=("x",)))


@pytest.mark.slow
def test_all_of_it_on_a_cpu(load, tmp_path, monkeypatch):
    """But the tuner, whose compilations `test_tune_gpu.py` tries, and the tests themselves."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    on_gpu, steps = load("on_gpu"), ("attention", "train")
    on_gpu.main(on_gpu.Settings(tmp_path, tiny=True, seconds=900.0, steps=steps))
    for name in steps:
        assert json.loads((tmp_path / f"{name}.json").read_text())


def test_a_step_for_which_no_time_is_left(load, capsys):
    train_step = load("train_step")
    train_step.main(train_step.Settings(**TINY, budget=1e-9))
    assert "no time was left" in capsys.readouterr().out
