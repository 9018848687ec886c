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
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import sass
import tyro
from jax.experimental import topologies
from rich.console import Console
from rich.progress import track
from rich.table import Table

import posjax
from posjax.kernels.blocks import GpuBlocks, gpu_sizes
from posjax.kernels.gpu.attention import attention
from posjax.kernels.gpu.support import SIZES
from posjax.masks import Mask, Side

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "tests" / "data" / "h200.txtpb"
# Of the loops with gates the one with masks is the longer one.
KINDS = {True: ("careful", "band"), False: ("plain",)}
THREADS, ROWS = 128, 64


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to compile."""

    size: tuple[int, ...] = SIZES
    """Head sizes."""
    positions: int = 64
    blocks: str | None = None
    """Fields of `GpuBlocks` as JSON, others as `kernels.blocks` has them; the forward pass only."""
    output: Path | None = None
    print: bool = False
    """Show a table."""


def blocks_of(size: int, positions: int, changes: str | None) -> GpuBlocks:
    """The blocks that `kernels.blocks` chooses, with changed fields."""
    return dataclasses.replace(gpu_sizes(size, positions, False), **json.loads(changes or "{}"))


def program(size: int, positions: int, blocks: GpuBlocks | None):
    """A gradient of causal attention, or with `blocks` the forward pass, and what it takes."""
    side = Side(jnp.arange(1024)[None])

    def forward(query, key, value, table, gate_bias):
        bias = posjax.ContextualBias(table, gate_bias=gate_bias)
        mask = Mask(side, side, is_causal=True)
        return attention(query, key, value, bias, mask, scale=size**-0.5, blocks=blocks)

    def loss(query, key, value, table, gate_bias):
        bias = posjax.ContextualBias(table, gate_bias=gate_bias)
        output = posjax.dot_product_attention(
            query, key, value, bias, is_causal=True, implementation="gpu"
        )
        return jnp.sum(output.astype(jnp.float32))

    shapes = [((1, 1024, heads, size), jnp.bfloat16) for heads in (4, 2, 2)]
    shapes += [((positions, size), jnp.float32), ((), jnp.float32)]
    return jax.grad(loss, argnums=range(5)) if blocks is None else forward, shapes


def compile_here(size: int, positions: int, changes: str | None = None) -> None:
    """Compiles for an H200; Mosaic GPU prints machine code if it is asked to."""
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=TARGET.read_text(), topology="1x1x1"
    )
    place = jax.sharding.SingleDeviceSharding(described.devices[0])
    blocks = None if changes is None else blocks_of(size, positions, changes)
    function, shapes = program(size, positions, blocks)
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        jax.jit(function).lower(*arguments).compile()


def machine_code(size: int, positions: int, changes: str | None) -> str:
    """What a process of its own prints: it reads the environment when it starts."""
    bundled = Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/cu1*/bin")
    path = os.pathsep.join([*map(str, bundled), os.environ["PATH"]])
    if shutil.which("nvdisasm", path=path) is None:
        raise SystemExit("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "PATH": path, "MOSAIC_GPU_DUMP_SASS_CTRL": "1"
    }  # fmt: skip
    command = [sys.executable, __file__, "compile", str(size), str(positions)]
    command += [] if changes is None else [changes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def measured(size: int, positions: int, changes: str | None = None) -> dict[str, dict]:
    """Of every loop of every kernel: instructions for each pair, spills, matrix instructions."""
    found, blocks = {}, blocks_of(size, positions, changes)
    for name, text in sass.kernels(machine_code(size, positions, changes)).items():
        kernel = name.removeprefix("posjax_attention_").removesuffix("_mosaic_gpu_kernel")
        loops = sass.loops(text)
        for counts, kinds in KINDS.items():
            own = sorted((x for x in loops if x.counts == counts), key=lambda x: -x.instructions)
            for kind, loop in zip(kinds, own, strict=True):
                pairs = (blocks.key if kernel == "forward" else 64) * ROWS / THREADS
                found[f"{kernel} {kind}"] = {
                    "instructions": round(loop.instructions / pairs, 1),
                    "spills": loop.spills,
                    "HGMMA": loop.count["HGMMA"],
                }
    if not found:
        raise SystemExit(f"jax {jax.__version__} printed no machine code of the kernels.")
    return found


def report(settings: Settings) -> dict:
    """Measures, and says with what."""
    sizes = track(settings.size, "compiling", console=Console(stderr=True))
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/gpu_code.py",
        "device": "NVIDIA H200 (compiled for)",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "plugin": importlib.metadata.version("jax-cuda13-plugin"),
        "positions": settings.positions,
        **({"blocks": json.loads(settings.blocks)} if settings.blocks else {}),
        "loops": {str(s): measured(s, settings.positions, settings.blocks) for s in sizes},
    }


def show(results: dict) -> None:
    """Prints a table."""
    table = Table("loop", *(f"H = {size}" for size in results["loops"]))
    columns = list(results["loops"].values())
    for name in columns[0]:
        cells = (f"{c[name]['instructions']} ({c[name]['spills']} spills)" for c in columns)
        table.add_row(name, *cells)
    Console().print(table)


def main(settings: Settings) -> None:
    """Measures, prints, writes."""
    results = report(settings)
    if settings.print or settings.output is None:
        show(results)
    if settings.output is not None:
        settings.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        compile_here(*map(int, sys.argv[2:4]), *sys.argv[4:])
    else:
        main(tyro.cli(Settings, description=__doc__))
