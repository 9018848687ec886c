"""The TPU kernels cost what they cost when their schedules were recorded.

Schedules differ between versions of libtpu, so each has a file of its own:

    python benchmarks/tpu_schedule.py --chips v5e --contender cope-forward --blocks 256x1024 \
        --output benchmarks/results/tpu-schedule-libtpu-VERSION.json

and the same for `--chips v6e --contender cope-backward --blocks 128x1024`.
"""

import importlib.metadata
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# How far a cost may be from the recorded one.
NEAR = 0.1


def recorded() -> list:
    """What is known of the libtpu that is installed; one test that says what is missing, if not."""
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return [pytest.param(None, marks=pytest.mark.skip("libtpu (extra `aot`) is needed"))]
    path = ROOT / "benchmarks" / "results" / f"tpu-schedule-libtpu-{version}.json"
    if not path.exists():
        reason = f"no schedules are recorded for libtpu {version}; see {Path(__file__).name}"
        return [pytest.param(None, marks=pytest.mark.skip(reason))]
    results = json.loads(path.read_text())["results"]
    return [pytest.param(x, id=f"{x['chip']} {x['contender']} {x['blocks']}") for x in results]


def costs(result: dict) -> list[tuple[str, bool, float]]:
    """Label, whether masked, and bundles per 128 x 128 pairs of each loop."""
    return [(x["label"], x["masked"], x["per_pairs"]) for x in result["loops"]]


@pytest.mark.slow
@pytest.mark.parametrize("known", recorded())
def test_loops_cost_what_they_did(known, tmp_path):
    output = tmp_path / "schedule.json"
    words = [sys.executable, "benchmarks/tpu_schedule.py", "--output", str(output)]
    for option, field in (("chips", "chip"), ("contender", "contender"), ("blocks", "blocks")):
        words += [f"--{option}", known[field]]
    subprocess.run(words, check=True, capture_output=True, cwd=ROOT)
    (result,) = json.loads(output.read_text())["results"]
    assert "error" not in result
    found, wanted = costs(result), costs(known)
    assert [x[:2] for x in found] == [x[:2] for x in wanted]
    for (*_, now), (*what, before) in zip(found, wanted, strict=True):
        assert math.isclose(now, before, rel_tol=NEAR), (what, now, before)
