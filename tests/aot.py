"""Real compilers for chips that are not there: TPUs through libtpu, an H200 through XLA:GPU.

Both come with the extra `aot`. A compilation proves that the code lowers, fits, and how much memory
it takes; it proves no numbers and no speed.
"""

import os
from pathlib import Path

import jax
import pytest
from jax.experimental import topologies

H200 = Path(__file__).parent / "data" / "h200.txtpb"


def tpu_topology(name: str) -> topologies.TopologyDescription:
    """A described TPU slice, such as "v5e:2x2"; the test is left out without libtpu."""
    pytest.importorskip("libtpu", reason="libtpu (extra `aot`) is needed")
    if jax.default_backend() != "tpu":
        # Spares libtpu's questions about the machine it runs on.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_WORKER_ID", "0")
    return topologies.get_topology_desc(name, platform="tpu")


def h200_topology(gpus: int = 1) -> topologies.TopologyDescription:
    """One host with described H200s; the test is left out without jax's CUDA 13 plugin."""
    pytest.importorskip(
        "jax_cuda13_plugin", reason="jax-cuda13-plugin (extra `aot`) compiles for it"
    )
    settings = {"target_config": H200.read_text(), "topology": f"1x1x{gpus}"}
    return topologies.get_topology_desc(platform="cuda", topology_name="", **settings)


def topology(name: str) -> topologies.TopologyDescription:
    """By name: "h200" or a TPU slice."""
    return h200_topology() if name == "h200" else tpu_topology(name)


def described(topology: topologies.TopologyDescription):
    """A context in which kernels see the device that they are compiled for."""
    device = topology.devices[0]
    abstract = jax.sharding.AbstractDevice(
        device_kind=device.device_kind,
        num_cores=getattr(device, "num_cores", None) or getattr(device, "core_count", 132),
        platform=device.platform if device.platform == "tpu" else "gpu",
    )
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    )


def compiled(function, topology: topologies.TopologyDescription, *arguments) -> jax.stages.Compiled:
    """The function compiled for the first device, for arguments with these shapes and dtypes."""
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    described = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
    )
    # Another function each time: what was traced for another setting of the kernels is not reused.
    return jax.jit(lambda *x: function(*x)).lower(*described).compile()
