"""The loops of the GPU kernels have the instructions that they had when they were recorded.

Each version of jax has its own file:

    python benchmarks/gpu_code.py --output benchmarks/results/gpu-code-jax-VERSION.json
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.conftest import installed

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "benchmarks" / "results" / f"gpu-code-jax-{jax.__version__}.json"
# How far a number may be above the recorded one.
NEAR = 1.1


@pytest.mark.slow
def test_loops_have_no_more_instructions(tmp_path):
    pytest.importorskip("jax_cuda13_plugin", reason="jax-cuda13-plugin (extra `aot`) is needed")
    if not (installed("nvidia-cuda-nvdisasm") or shutil.which("nvdisasm")):
        pytest.skip("nvdisasm (nvidia-cuda-nvdisasm, extra `aot`) prints machine code")
    if not RECORDED.exists():
        pytest.skip(f"nothing is recorded for jax {jax.__version__}; see {Path(__file__).name}")
    output = tmp_path / "code.json"
    command = [sys.executable, "benchmarks/gpu_code.py", "--size", "128", "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    found, known = (json.loads(path.read_text())["loops"]["128"] for path in (output, RECORDED))
    assert found.keys() == known.keys()
    for loop, counts in found.items():
        for what in ("instructions", "spills"):
            assert counts[what] <= known[loop][what] * NEAR, (loop, what)
    serial = [loop for loop, counts in found.items() if counts["serial"]]
    if jax.__version_info__ >= (0, 12) and installed("nvidia-nvjitlink"):
        assert serial, "jax compiles Mosaic GPU kernels as it did before 0.12; drop this exception"
        pytest.xfail("jax 0.12 compiles through nvJitLink, see docs/performance.md")
    assert serial == []  # loops whose matrix instructions wait for each other
