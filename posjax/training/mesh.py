"""The device mesh: one, with the axes data, fsdp, tensor and context, written out in the config."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from posjax import checks
from posjax.tasks import Batch
from posjax.training.config import MeshConfig, TrainConfig

__all__ = ["check_batch_sizes", "is_leader", "make_mesh", "replicated", "rows", "to_devices"]

AXES = ("data", "fsdp", "tensor", "context")


@checks.arguments()
def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh of a config; a `data` axis smaller than all devices takes the first ones.

    Raises:
        ValueError: more devices are asked for than there are, or fewer than the processes have.
    """
    devices = jax.devices()
    data = len(devices) if config.data == -1 else config.data
    wanted = f"at most {len(devices)}, the number of devices"
    checks.require("mesh.data", data, data <= len(devices), wanted)
    fits = data == len(devices) or jax.process_count() == 1
    wanted = f"-1, for all {len(devices)} devices of {jax.process_count()} processes"
    checks.require("mesh.data", data, fits, wanted)
    shape = (data, config.fsdp, config.tensor, config.context)
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices[:data])


@checks.arguments()
def check_batch_sizes(config: TrainConfig, mesh: Mesh) -> None:
    """Raises `ValueError` unless every batch has the same number of rows on each device."""
    data = mesh.shape["data"]
    parts = {
        "train.batch_size": config.batch_size,
        "train.batch_size / train.accumulate": config.batch_size // config.accumulate,
        "train.evaluation_batch_size": config.evaluation_batch_size,
    }
    for name, size in parts.items():
        wanted = f"a multiple of the number of devices (--mesh.data), {data}"
        checks.require(name, size, size % data == 0, wanted)


@checks.arguments()
def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


@checks.arguments()
def rows(mesh: Mesh) -> NamedSharding:
    """The first axis over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


@checks.arguments()
def to_devices(batch: Batch, mesh: Mesh, *, whole: bool = False) -> Batch:
    """A batch of numpy arrays as arrays on the mesh, spread over `data`.

    Args:
        whole: every process holds the whole batch, and not only its own rows.
    """
    sharding = rows(mesh)
    if whole:
        return {
            key: jax.make_array_from_callback(
                value.shape, sharding, lambda index, v=value: v[index]
            )
            for key, value in batch.items()
        }
    return {
        key: jax.make_array_from_process_local_data(sharding, np.asarray(value))
        for key, value in batch.items()
    }


def is_leader() -> bool:
    """Whether this process writes the files of a run and speaks to the user."""
    return jax.process_index() == 0
