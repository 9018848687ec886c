"""The tuner of the GPU kernels, in Pallas's interpreter and through the compiler for an H200."""

import importlib
import json
from pathlib import Path

import jax
import pytest

from posjax.kernels.blocks import GpuBlocks, gpu_sizes
from posjax.kernels.gpu_table import FASTEST, SOURCE

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = {
    "sizes": (64,), "positions": (64,), "dtypes": ("bfloat16",), "gates": (0.3,), "length": 128,
    "heads": 1, "rounds": 1, "workers": 1, "seconds": 0.0,
    "blocks": json.dumps([{"key": 64, "stages": 2}, {"key": 64, "paired": True}]),
}  # fmt: skip


@pytest.fixture
def tuner(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = ("tune_gpu", "gpu_choices", "gpu_trials")
    tune_gpu, gpu_choices, gpu_trials = map(importlib.import_module, names)
    # Only gate keys of the queries' own, which halves the time.
    first = lambda *args: gpu_choices.problems(*args)[:1]  # noqa: E731
    monkeypatch.setattr(tune_gpu, "problems", first)
    monkeypatch.setattr(tune_gpu, "TABLE", Path("/nowhere"))
    return tune_gpu, gpu_choices, gpu_trials


@pytest.fixture
def interpreter():
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("the interpreter came with jax 0.11.2")
    from posjax.kernels.interpreters import interpreted_gpu

    with interpreted_gpu(plgpu.InterpretGPUParams()):
        yield


@pytest.mark.slow
def test_it_checks_times_and_writes_the_table(tuner, interpreter, tmp_path, monkeypatch, capsys):
    tune_gpu, _, _ = tuner
    table, output = tmp_path / "table.py", tmp_path / "tuned.json"
    monkeypatch.setattr(tune_gpu, "TABLE", table)
    settings = tune_gpu.Settings(**TINY, write=True, output=output)
    tune_gpu.main(settings)
    (case,) = json.loads(output.read_text())["cases"].values()
    assert len(case["timed"]) == 2
    assert not case["failed"] and not case["wrong"] and not case["refused"]
    assert all(found["median"]["0.3"] > 0 for found in case["timed"])
    written: dict = {}
    exec(table.read_text(), written)
    fastest = min(case["timed"], key=lambda found: found["median"]["0.3"])
    assert written["FASTEST"][64, 64, False] == fastest["blocks"]
    assert written["FASTEST"][128, 64, False] == FASTEST[128, 64, False]

    # The second time it has nothing to do.
    monkeypatch.setattr(tune_gpu, "examined", None)
    tune_gpu.main(settings)
    with pytest.raises(SystemExit, match="is from other settings"):
        tune_gpu.main(tune_gpu.Settings(**TINY | {"rounds": 2}, output=output))


@pytest.mark.slow
def test_what_is_wrong_is_not_timed(tuner, interpreter, monkeypatch, capsys):
    tune_gpu, _, gpu_trials = tuner
    monkeypatch.setattr(gpu_trials, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match="Some choices were wrong"):
        tune_gpu.main(tune_gpu.Settings(**TINY | {"blocks": '[{"key": 64}]'}))
    assert "not timed: key 64, count 64, stages 2, packed" in capsys.readouterr().out


@pytest.mark.slow
def test_dry_run(tuner, capsys):
    pytest.importorskip("jax_cuda13_plugin", reason="jax-cuda13-plugin (extra `aot`) is needed")
    tune_gpu, _, _ = tuner
    blocks = '[{"key": 64}, {"key": 128, "stages": 4, "packed": false}]'
    tiny = TINY | {"sizes": (128,), "length": 256, "blocks": blocks}
    tune_gpu.main(tune_gpu.Settings(**tiny, dry_run=True))
    found = capsys.readouterr().out
    assert "1 of 2 compile, 1 need too much shared memory" in found


def test_without_a_gpu(tuner):
    if jax.default_backend() == "gpu":
        return
    with pytest.raises(SystemExit, match=r"no Hopper GPU.*--dry-run"):
        tuner[0].main(tuner[0].Settings())


def test_candidates(tuner):
    choices = tuner[1]
    every = choices.candidates(choices.Problem(128, 64, False, "bfloat16"), short=False)
    # Three pairs of sizes, four numbers of stages, three switches.
    assert len(every) == len(set(every)) == 3 * 4 * 8
    assert every[0] == gpu_sizes(128, 64, False)
    few = choices.candidates(choices.Problem(128, 64, False, "bfloat16"), short=True)
    assert {
        name for name in choices.FIELDS for x in few if getattr(x, name) != getattr(few[0], name)
    } == set(choices.FIELDS)
    plain = choices.candidates(choices.Problem(128, 0, False, "bfloat16"), short=False)
    assert len(plain) == 2 * 4 * 2
    names = [p.name for p in choices.problems((64,), (0, 64), ("bfloat16",))]
    assert names == [
        "H 64, no bias, bfloat16", "H 64, P 64, bfloat16", "H 64, P 64, own gate key, bfloat16",
    ]  # fmt: skip


def test_the_choice_weighs_dtypes_and_gates(tuner):
    choices = tuner[1]
    a, b, c = ({"key": key} for key in (64, 128, 256))

    def case(dtype, refused=(), **medians):
        timed = [
            {"blocks": x, "median": dict(zip("hl", y, strict=True))}
            for x, y in zip((a, b, c), medians.values(), strict=False)
        ]
        return {"problem": [64, 64, False, dtype], "timed": timed, "refused": list(refused)}

    cases = {"1": case("f", a=(1, 1), b=(1.1, 1)), "2": case("b", a=(4, 1), b=(1, 1))}
    assert choices.chosen(cases) == {(64, 64, False): b}
    assert choices.chosen({"1": cases["1"]}) == {(64, 64, False): a}
    cases["2"]["refused"] = [b]
    assert choices.chosen(cases) == {(64, 64, False): a}
    # What ran in one of the two only is not compared.
    cases = {"1": case("f", a=(9, 9), b=(9, 9), c=(1, 1)), "2": case("b", a=(1, 1), b=(2, 2))}
    assert choices.chosen(cases) == {(64, 64, False): a}


def test_every_row_of_the_table_can_be_used():
    for (size, positions, own), fields in FASTEST.items():
        assert gpu_sizes(size, positions, own) == GpuBlocks(**fields)
    assert gpu_sizes(80, 65, False) == gpu_sizes(128, 128, False)
    assert gpu_sizes(64, 1, True) == gpu_sizes(64, 64, True)


def test_the_table_is_as_the_tuner_writes_it(tuner):
    path = BENCHMARKS.parent / "kernels" / "gpu_table.py"
    assert path.read_text() == tuner[1].rendered(FASTEST, SOURCE)
