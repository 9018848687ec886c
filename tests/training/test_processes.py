"""A run of two processes is the run of one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from posjax.training import fit
from posjax.training.records import read_records
from tests.training.tiny import tiny

ROOT = Path(__file__).parents[2]
PROCESS = """
import sys
import jax
index, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, initialization_timeout=120)
import posjax.training.loop
from tests.training.tiny import Toy, tiny
posjax.training.loop.Transformer = Toy
assert jax.device_count() == 4
posjax.training.loop.fit(tiny(mesh__data=-1), directory)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(index), str(port), str(tmp_path / "two")],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert "step 6/6" in texts[0] and "step 6/6" not in texts[1]

    report = fit(tiny(), tmp_path / "one", console=Console(quiet=True))
    one, two = (
        [line["loss"] for line in read_records(tmp_path / name) if "loss" in line]
        for name in ("one", "two")
    )
    np.testing.assert_allclose(two, one, atol=1e-5)
    assert read_records(tmp_path / "two")[-1]["evaluation"] == report["metrics"]
