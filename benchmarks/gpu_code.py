"""Cost of the GPU kernels, read from machine code for an H200; no GPU is needed.

    python benchmarks/gpu_code.py --print
    python benchmarks/gpu_code.py --output benchmarks/results/gpu-code-jax-VERSION.json
    python benchmarks/gpu_code.py --print --size 128 --blocks '{"key": 64, "paired": true}'

XLA and ptxas compile (`pip install "posjax[aot]"`), nvdisasm prints (`nvidia-cuda-nvdisasm`), and
`sass` finds the innermost loops. Numbers are instructions of a thread for each pair of a query and
a key that it works on. Waiting for memory and for other units is not part of them.
"""

import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import sass
import tyro
from jax.experimental import topologies
from rich.console import Console
from rich.progress import track
from rich.table import Table

import posjax
import posjax.problem
from posjax.kernels import gpu
from posjax.kernels.blocks import GpuBlocks, gpu_sizes
from posjax.kernels.gpu.support import SIZES

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "tests" / "data" / "h200.txtpb"
# Bias -> whether there are gates -> kinds of loops; the one with masks is the longest.
KINDS = {
    "cope": {True: ("careful", "band"), False: ("plain",)},
    "distance": {True: (), False: ("distance, careful", "distance")},
}
THREADS, ROWS = 128, 64


@dataclasses.dataclass(frozen=True)
class Settings:
    """Programs to compile."""

    size: tuple[int, ...] = SIZES
    """Head sizes."""
    positions: int = 64
    bias: tuple[Literal["cope", "distance"], ...] = ("cope", "distance")
    """CoPE, and a bias of the distance that trains."""
    blocks: str | None = None
    """Fields of `GpuBlocks` as JSON, others as `kernels.blocks` has them; the forward pass only."""
    output: Path | None = None
    print: bool = False
    """Show a table."""


class Work(NamedTuple):
    """One thing to compile; `changes` as `Settings.blocks`."""

    bias: str
    size: int
    positions: int
    changes: str | None

    @property
    def blocks(self) -> GpuBlocks:
        """The blocks that `kernels.blocks` chooses, with changed fields."""
        positions = self.positions if self.bias == "cope" else 0
        chosen = gpu_sizes(self.size, positions, False)
        return dataclasses.replace(chosen, **json.loads(self.changes or "{}"))


def program(work: Work):
    """A gradient of causal attention (the forward pass with changed blocks), and its arguments."""

    def described(table, numbers):
        if work.bias == "distance":
            return posjax.RelativeBias(falling, numbers, distance_only=True)
        return posjax.ContextualBias(table, gate_bias=numbers)

    def forward(query, key, value, *trained):
        bias = described(*trained)
        scale = work.size**-0.5
        problem = posjax.problem.Problem.of(query, key, value, bias, scale=scale, is_causal=True)
        return gpu.run(problem, work.blocks).output

    def loss(query, key, value, *trained):
        output = posjax.dot_product_attention(
            query, key, value, described(*trained), is_causal=True, implementation="gpu"
        )
        return jnp.sum(output.astype(jnp.float32))

    shapes = [((1, 1024, heads, work.size), jnp.bfloat16) for heads in (4, 2, 2)]
    shapes += [((work.positions, work.size), jnp.float32), ((4,), jnp.float32)]
    return jax.grad(loss, argnums=range(5)) if work.changes is None else forward, shapes


def falling(slopes, query_positions, key_positions):
    """ALiBi with slopes that train."""
    distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
    return -slopes[None, :, None, None] * jnp.abs(distance).astype(jnp.float32)


def compile_here(work: Work) -> None:
    """Compiles for an H200; Mosaic GPU prints machine code if it is asked to."""
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=TARGET.read_text(), topology="1x1x1"
    )
    place = jax.sharding.SingleDeviceSharding(described.devices[0])
    function, shapes = program(work)
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        jax.jit(function).lower(*arguments).compile()


def machine_code(work: Work) -> str:
    """The output of a separate process, which reads the environment when it starts."""
    bundled = Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/cu1*/bin")
    path = os.pathsep.join([*map(str, bundled), os.environ["PATH"]])
    if shutil.which("nvdisasm", path=path) is None:
        raise SystemExit("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "PATH": path, "MOSAIC_GPU_DUMP_SASS_CTRL": "1"
    }  # fmt: skip
    command = [sys.executable, __file__, "compile", json.dumps(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def measured(work: Work) -> dict[str, dict]:
    """Of every loop of every kernel: instructions for each pair, spills, matrix instructions.

    `serial` tells that the loop waits for each matrix instruction before the next one, as ptxas
    makes it if registers do not suffice for several on their way.
    """
    found = {}
    for name, text in sass.kernels(machine_code(work)).items():
        kernel = name.removeprefix("posjax_attention_").removesuffix("_mosaic_gpu_kernel")
        loops = sass.loops(text)
        for counts, kinds in KINDS[work.bias].items():
            own = sorted((x for x in loops if x.counts == counts), key=lambda x: -x.instructions)
            for kind, loop in zip(kinds, own, strict=True):
                pairs = (work.blocks.key if kernel == "forward" else 64) * ROWS / THREADS
                found[f"{kernel} {kind}"] = {
                    "instructions": round(loop.instructions / pairs, 1),
                    "spills": loop.spills,
                    "HGMMA": loop.count["HGMMA"],
                    "serial": loop.count["WARPGROUP"] >= 2 * loop.count["HGMMA"],
                }
    if not found:
        raise SystemExit(f"jax {jax.__version__} printed no machine code of the kernels.")
    return found


def report(settings: Settings) -> dict:
    """Measures, and says with what."""
    loops: dict[str, dict] = {str(size): {} for size in settings.size}
    works = [
        Work(bias, size, settings.positions, settings.blocks)
        for size, bias in itertools.product(settings.size, settings.bias)
    ]
    for work in track(works, "compiling", console=Console(stderr=True)):
        loops[str(work.size)] |= measured(work)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/gpu_code.py",
        "device": "NVIDIA H200 (compiled for)",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "plugin": importlib.metadata.version("jax-cuda13-plugin"),
        "positions": settings.positions,
        **({"blocks": json.loads(settings.blocks)} if settings.blocks else {}),
        "loops": loops,
    }


def show(results: dict) -> None:
    """Prints a table."""
    table = Table("loop", *(f"H = {size}" for size in results["loops"]))
    columns = list(results["loops"].values())
    for name in columns[0]:
        table.add_row(name, *(_cell(column[name]) for column in columns))
    Console().print(table)


def _cell(loop: dict) -> str:
    serial = ", serial" if loop["serial"] else ""
    return f"{loop['instructions']} ({loop['spills']} spills{serial})"


def main(settings: Settings) -> None:
    """Measures, prints, writes."""
    results = report(settings)
    if settings.print or settings.output is None:
        show(results)
    if settings.output is not None:
        settings.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        compile_here(Work(*json.loads(sys.argv[2])))
    else:
        main(tyro.cli(Settings, description=__doc__))
