import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from posjax.training import MeshConfig
from posjax.training.checkpoints import CheckpointError, Checkpoints
from posjax.training.config import as_json
from posjax.training.mesh import make_mesh
from posjax.training.optimizer import make_optimizer, make_schedule
from posjax.training.state import abstract_state, initial_state
from tests.training.tiny import TASK, Toy, assert_same_bits, tiny

META = {"config": as_json(tiny()), "pending": [{"loss": 0.1}]}


def parts(data=1):
    config = tiny()
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, 6))
    model = Toy(config.model, TASK.vocabulary.size)
    return model, optimizer, TASK.length, 0, make_mesh(MeshConfig(data=data))


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of the steps 0, 3 and 6, and the newest state."""
    checkpoints = Checkpoints(tmp_path, every=3, keep=2)
    state = initial_state(*parts())
    for step in (0, 3, 6):
        state = state.replace(step=state.step * 0 + step)
        checkpoints.save(state, {"next_index": step}, META)
    checkpoints.close()
    return tmp_path, state


def test_what_was_saved_comes_back_and_old_ones_go(saved):
    directory, state = saved
    checkpoints = Checkpoints(directory, every=3, keep=2)
    assert checkpoints.latest() == 6
    restored, data, meta = checkpoints.restore(abstract_state(*parts()), META["config"])
    assert_same_bits(restored, state)
    assert data == {"next_index": 6}
    assert meta == META
    checkpoints.close()
    assert sorted(path.name for path in directory.iterdir()) == ["3", "6"]


def test_restores_onto_another_mesh(saved):
    directory, state = saved
    checkpoints = Checkpoints(directory, every=3, keep=2)
    restored, _, _ = checkpoints.restore(abstract_state(*parts(data=8)), META["config"])
    checkpoints.close()
    assert_same_bits(restored, state)
    assert all(leaf.sharding.num_devices == 8 for leaf in jax.tree.leaves(restored))


def test_arguments_may_change_after_a_save(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1, keep=1)
    data, meta = {"next_index": 1}, {"config": META["config"], "pending": []}
    checkpoints.save(initial_state(*parts()), data, meta)
    data["next_index"] = 2
    meta["pending"].append(object())
    checkpoints.wait()
    _, data, meta = checkpoints.restore(abstract_state(*parts()), META["config"])
    checkpoints.close()
    assert data == {"next_index": 1} and meta["pending"] == []


def test_an_incomplete_save_is_not_seen(saved):
    directory, _ = saved
    shutil.copytree(directory / "6", directory / "9.orbax-checkpoint-tmp")
    (directory / "9.orbax-checkpoint-tmp" / "commit_success.txt").unlink(missing_ok=True)
    checkpoints = Checkpoints(directory, every=3, keep=2)
    assert checkpoints.latest() == 6
    checkpoints.close()


def restore(directory, config=META["config"]):
    checkpoints = Checkpoints(directory, every=3, keep=2)
    try:
        checkpoints.restore(abstract_state(*parts()), config)
    finally:
        checkpoints.close()


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint in"):
        restore(tmp_path)


def test_another_config(saved):
    other = as_json(tiny(train__batch_size=16, optimizer__b1=0.5))
    with pytest.raises(CheckpointError) as error:
        restore(saved[0], other)
    assert "optimizer.b1: now 0.5, before 0.9" in str(error.value)
    assert "train.batch_size: now 16, before 8" in str(error.value)


@pytest.mark.parametrize("part", ["state", "data", "meta"])
def test_a_damaged_checkpoint(saved, part):
    directory, _ = saved
    shutil.rmtree(directory / "6" / part)
    with pytest.raises(CheckpointError, match=r"6 cannot be read .*delete this folder"):
        restore(directory)


def test_damaged_arrays(saved):
    """In a process of its own: when one read fails, Orbax's others go on, and complain later."""
    directory, _ = saved
    for path in (directory / "6" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:10])
    code = f"""
import pathlib
from posjax.training.checkpoints import CheckpointError
from tests.training.test_checkpoints import restore
try:
    restore(pathlib.Path({str(directory)!r}))
except CheckpointError as error:
    print(error)
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "6 cannot be read" in result.stdout, result.stderr


def test_due_and_repeated_saves(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=3, keep=2)
    assert [checkpoints.due(step) for step in (1, 3, 5, 6)] == [False, True, False, True]
    state = initial_state(*parts())
    checkpoints.save(state, {"a": 1}, META)
    checkpoints.save(state, {"a": 2}, META)
    _, data, _ = checkpoints.restore(abstract_state(*parts()), META["config"])
    checkpoints.close()
    assert data == {"a": 1}
    assert np.isscalar(int(state.step))
