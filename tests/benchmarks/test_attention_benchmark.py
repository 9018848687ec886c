"""benchmarks/attention.py at tiny sizes."""

import dataclasses
import importlib
import json
import time
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = ("attention", "problem", "contenders", "timing", "report")


@pytest.fixture
def modules(monkeypatch):
    """Its files, by the last word of their names."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("PREALLOCATE", "MEM_FRACTION"):
        monkeypatch.setenv(f"XLA_PYTHON_CLIENT_{name}", "0.5" if "MEM" in name else "false")
    files = {name: name if name == "attention" else f"attention_{name}" for name in NAMES}
    return {name: importlib.import_module(file) for name, file in files.items()}


def settings_of(modules, **changes):
    tiny = {
        "lengths": (64,), "heads": 2, "kv_heads": 1, "head_size": 8, "positions": 6, "rounds": 2,
        "contenders": ("plain", "cope_reference", "cope_xla"), "memory": False,
    }  # fmt: skip
    return modules["problem"].Settings(**tiny | changes)


def test_times_of_all_contenders(modules, tmp_path, capsys, monkeypatch):
    output = tmp_path / "found.json"
    settings = settings_of(modules, gate=(0.5, 0.1), output=str(output), budget=300.0)
    modules["attention"].main(settings)
    (result,) = json.loads(output.read_text())["results"].values()
    rows = result["rows"]
    assert sorted(rows) == [
        "cope_reference, gates near 0.1", "cope_reference, gates near 0.5",
        "cope_xla, gates near 0.1", "cope_xla, gates near 0.5", "plain",
    ]  # fmt: skip
    for row in rows.values():
        assert not row["failed"]
        assert [len(x) for x in row["seconds"].values()] == [2, 2]
        assert all(x > 0 for x in row["median_seconds"].values())
    found = capsys.readouterr().out
    assert "posjax CoPE, blockwise, gates 0.1" in found
    assert "blocks count" in found

    # The second time it has all, whatever the budget; but not what there was no time for.
    monkeypatch.setattr(modules["attention"], "measured", None)
    settings = dataclasses.replace(settings, budget=200.0)
    modules["attention"].main(settings)
    text = output.read_text().replace('"failed": {}', '"failed": {"forward": "no time was left"}')
    output.write_text(text)
    with pytest.raises(TypeError, match="not callable"):
        modules["attention"].main(settings)


def test_a_wrong_contender_is_not_timed(modules, monkeypatch, capsys):
    contenders = modules["contenders"].CONTENDERS
    plain = contenders["plain"]
    wrong = dataclasses.replace(contenders["cope_xla"], make=plain.make)
    monkeypatch.setitem(contenders, "cope_xla", wrong)
    with pytest.raises(SystemExit, match="were wrong and not timed"):
        modules["attention"].main(settings_of(modules))
    found = capsys.readouterr().out
    assert "cope_xla is not timed: forward, output: differs by" in found
    assert "posjax CoPE, blockwise" not in found


def test_out_of_memory_is_a_row(modules, monkeypatch, capsys):
    timing, contenders = modules["timing"], modules["contenders"].CONTENDERS
    make = contenders["plain"].make

    def full(problem, arrays, gates):
        made = make(problem, arrays, gates)

        def fail():
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

        long = problem.length == 64
        launch = {p: fail if long and "backward" in p[0] else x for p, x in made.launch.items()}
        return made._replace(launch=launch)

    monkeypatch.setitem(contenders, "plain", dataclasses.replace(contenders["plain"], make=full))
    settings = settings_of(modules, contenders=("plain", "cope_xla"))
    (problem,) = modules["problem"].problems(settings)
    rows = timing.rows_of(settings, problem, ["plain", "cope_xla"], time.monotonic() + 100)
    assert rows["plain"]["failed"] == {"forward and backward": "out of memory"}
    assert list(rows["plain"]["seconds"]) == ["forward"]
    assert not rows["cope_xla, gates near 0.5"]["failed"]
    modules["attention"].main(settings)
    assert "out of memory" in capsys.readouterr().out


def test_what_the_budget_leaves_out_is_named(modules, capsys):
    modules["attention"].main(settings_of(modules, budget=1e-9, lengths=(64, 128)))
    found = capsys.readouterr().out
    for length in (64, 128):
        assert f"left out, the budget is spent: T {length}, N 2/1, H 8, float32" in found
    timing = modules["timing"]
    settings = settings_of(modules, budget=1e-6)
    (problem,) = modules["problem"].problems(settings)
    rows = timing.rows_of(settings, problem, ["plain"], time.monotonic() + 100)
    assert "more than" in rows["plain"]["failed"]["forward"]


@pytest.mark.parametrize("size", [16, 32])
def test_unsaturated_blocks(modules, size):
    problem = modules["problem"].Problem(100, 2, 4, 2, 8, 6, "float32")
    arrays = modules["problem"].arrays_of(problem)
    query, key = arrays["query"], np.repeat(arrays["key"], 2, axis=2)
    logits = np.einsum("btnh,bsnh->bnts", query, key) * 8**-0.5 + np.log(0.3 / 0.7)
    gates = np.tril(1 / (1 + np.exp(-logits)))
    blocks, needed, visible = -(-100 // size), 0, 0
    for row in range(blocks):
        for column in range(row + 1):
            right = gates[:, :, row * size : (row + 1) * size, (column + 1) * size :].sum(3)
            needed += np.sum(np.any(right < 5, axis=2))
            visible += 2 * 4
    found = modules["problem"].unsaturated(problem, arrays, 0.3, size)
    assert found == pytest.approx(needed / visible)
    assert 0 < found < 1


def test_docs(modules, tmp_path, monkeypatch):
    output, report = tmp_path / "found.json", modules["report"]
    modules["attention"].main(settings_of(modules, rounds=1, output=str(output)))
    monkeypatch.setattr(report, "DOCS", tmp_path)
    page = tmp_path / "performance.md"
    page.write_text("before\n<!-- attention -->\nold\n<!-- /attention -->\nafter\n")
    modules["attention"].main(modules["problem"].Settings(docs=str(output)))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| posjax CoPE, blockwise, gates 0.5 | " in text
    assert (tmp_path / "performance-attention.png").stat().st_size > 1000
    page.write_text("nothing")
    with pytest.raises(SystemExit, match="has no place for it"):
        modules["attention"].main(modules["problem"].Settings(docs=str(output)))


def test_suites(modules):
    parts = modules["problem"]
    found = parts.with_suite(parts.Settings(suite="gpu", dtype="float16"))
    assert (found.dtype, found.gate, found.base) == ("float16", (0.5, 0.1, 0.02), "plain_cudnn")
    names = [problem.name for problem in parts.problems(found)]
    assert len(set(names)) == 12
    assert names[2] == "T 8192, N 32/8, H 128, float16"
    with pytest.raises(SystemExit, match="unknown suite 'tpu'"):
        parts.with_suite(parts.Settings(suite="tpu"))
    with pytest.raises(SystemExit, match="not '16x128'"):
        parts.problems(parts.Settings(shapes=("16x128",)))
    with pytest.raises(SystemExit, match="unknown contender 'x'"):
        modules["attention"].main(settings_of(modules, contenders=("x",)))


def test_why_a_contender_cannot_run(modules):
    settings = settings_of(modules, contenders=())
    (problem,) = modules["problem"].problems(settings)
    names, missing = modules["contenders"].available(settings, problem)
    assert {"plain", "plain_xla", "cope_reference", "cope_xla"} <= set(names)
    assert set(names) | set(missing) == set(modules["contenders"].CONTENDERS)
    assert all(missing.values())


@pytest.mark.slow
def test_memory_in_a_process_of_its_own(modules, capsys):
    modules["attention"].main(settings_of(modules, memory=True, contenders=("plain", "cope_xla")))
    last = capsys.readouterr().out.split("peak GiB")[-1]
    assert last.count("0.") >= 2


def test_memory_is_measured_once_for_all_gates_and_until_the_time_is_over(modules, monkeypatch):
    attention, seen = modules["attention"], []
    row = {"failed": {}, "gate": 0.5, "contender": "cope_xla"}
    rows = {"a": row, "b": row | {"gate": 0.1}, "c": row | {"contender": "plain"}}
    rows["d"] = row | {"contender": "plain_xla", "failed": {"forward and backward": "broken"}}
    problem = dict.fromkeys(("length", "batch", "heads", "kv_heads", "head_size", "positions"), 1)
    results = {"x": {"problem": problem | {"dtype": "float32"}, "rows": rows}}

    def peak(problem, entry, seconds):
        seen.append(entry.contender)
        return 1.5

    monkeypatch.setattr(attention, "peak_memory", peak)
    left = attention.add_memory(results, time.monotonic() - 1)
    assert left == ["memory of x, cope_xla", "memory of x, plain"]
    assert not seen
    assert attention.add_memory(results, time.monotonic() + 10) == []
    assert seen == ["cope_xla", "plain"]
    assert [row.get("peak_gib") for row in rows.values()] == [1.5, 1.5, 1.5, None]


@pytest.mark.slow
def test_pytorch(modules, capsys):
    pytest.importorskip("torch", reason="torch runs the paper's dense form")
    modules["attention"].main(settings_of(modules, contenders=("cope_torch", "cope_xla")))
    assert "paper's CoPE, dense PyTorch" in capsys.readouterr().out
