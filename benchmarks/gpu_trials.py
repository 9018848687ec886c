"""One trial of benchmarks/tune_gpu.py: compile, compare, time."""

import contextlib
import dataclasses
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from gpu_choices import Problem
from jax.experimental import topologies

import posjax.problem
from posjax import ContextualBias, dot_product_attention
from posjax.kernels import gpu
from posjax.kernels.blocks import GpuBlocks
from posjax.kernels.interpreters import gpu_interpreter

__all__ = ["TOLERANCE", "compiled", "data", "errors", "no_gpu", "times", "wrong_gradients"]

TARGET = Path(__file__).resolve().parent.parent / "tests" / "data" / "h200.txtpb"
# Root mean square of the error over that of the result: sums of gates have float16 terms.
TOLERANCE = 1e-2


def no_gpu() -> str | None:
    """Why the kernels cannot run here; in the interpreter they can."""
    if gpu_interpreter() is not None:
        return None
    found = getattr(jax.devices()[0], "compute_capability", "")
    if str(found).split(".")[0] != "9":
        return f"{jax.devices()[0].device_kind} is no Hopper GPU, and the kernels need one"
    return None


def data(settings, problem: Problem, gate: float) -> dict[str, jax.Array]:
    """Arrays of one problem at one gate level.

    The table changes little from row to row: a count next to a whole number may take the slope of
    either side, and no two computations agree on it.
    """
    shapes = _shapes(settings, problem)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = {
        name: jax.random.normal(key, x.shape).astype(x.dtype)
        for key, (name, x) in zip(keys, shapes.items(), strict=True)
    }
    if problem.positions:
        wave = jnp.cos(jnp.pi * jnp.linspace(0.0, 1.0, problem.positions))
        arrays["table"] = problem.size**-0.5 * arrays["table"][:1] * wave[:, None]
        arrays["gate_bias"] = jnp.float32(np.log(gate / (1 - gate)))
    return arrays


def _shapes(settings, problem: Problem, length: int | None = None) -> dict:
    length = length or settings.length
    array = jax.ShapeDtypeStruct(
        (settings.batch, length, settings.heads, problem.size), problem.dtype
    )
    shapes = dict.fromkeys(("query", "key", "value"), array)
    if problem.positions:
        table = jax.ShapeDtypeStruct((problem.positions, problem.size), jnp.float32)
        shapes |= {"table": table, "gate_bias": jax.ShapeDtypeStruct((), jnp.float32)}
    if problem.own_gate_key:
        shapes["gate_key"] = array
    return shapes


def _bias(arrays: dict) -> ContextualBias | None:
    if "table" not in arrays:
        return None
    own = arrays.get("gate_key")
    return ContextualBias(arrays["table"], gate_key=own, gate_bias=arrays["gate_bias"])


def _ours(blocks: GpuBlocks, arrays: dict) -> jax.Array:
    """Causal attention by the GPU kernels."""
    names, scale = ("query", "key", "value"), arrays["query"].shape[3] ** -0.5
    inputs = (arrays[name] for name in names)
    problem = posjax.problem.Problem.of(*inputs, _bias(arrays), scale=scale, is_causal=True)
    return gpu.run(problem, blocks).output


@jax.jit
def _theirs(arrays: dict) -> jax.Array:
    """The same in float32 by XLA."""
    wide = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    names = ("query", "key", "value")
    inputs = (wide[name] for name in names)
    return dot_product_attention(*inputs, _bias(wide), is_causal=True, implementation="xla")


def compiled(settings, problem: Problem, blocks: GpuBlocks):
    """The program, or why there is none."""
    shapes, function = _shapes(settings, problem), functools.partial(_ours, blocks)
    here = contextlib.nullcontext()
    if settings.dry_run:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=TARGET.read_text(), topology="1x1x1"
        )
        place = jax.sharding.SingleDeviceSharding(described.devices[0])
        shapes = jax.tree.map(lambda x: x.update(sharding=place), shapes)
        h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=h200)
        here = jax.sharding.use_abstract_mesh(mesh)
    if gpu_interpreter() is not None:
        return jax.jit(function)
    try:
        with here:
            return jax.jit(function).lower(shapes).compile()
    except Exception as error:  # whatever a compiler says, the other candidates go on
        reason = str(error).strip() or type(error).__name__
        if "smem" in reason or "shared memory" in reason.lower():
            return f"needs too much shared memory: {reason[-200:]}"
        return f"{type(error).__name__}: {reason}"


def errors(problem: Problem, programs: dict, data: dict) -> dict[GpuBlocks, float]:
    """The largest error of each program over the gate levels, relative; not a number is one too."""
    found = dict.fromkeys(programs, 0.0)
    for arrays in data.values():
        want = _theirs(arrays)
        for blocks, program in programs.items():
            error = _relative(program(arrays), want)
            found[blocks] = max(found[blocks], error) if error == error else error
    return found


def _relative(got: jax.Array, want: jax.Array) -> float:
    error = jnp.sqrt(jnp.mean((got.astype(jnp.float32) - want) ** 2))
    return float(error / jnp.sqrt(jnp.mean(want**2)))


def times(settings, programs: dict, data: dict) -> dict[GpuBlocks, dict[float, list[float]]]:
    """Seconds of a launch in every round, by gate level; all programs take turns."""
    found = {blocks: {gate: [] for gate in data} for blocks in programs}
    launches = {}
    for blocks, program in programs.items():
        for gate, arrays in data.items():
            once = min(_seconds(program, arrays, 1) for _ in range(2))
            launches[blocks, gate] = max(1, min(200, int(settings.seconds / once)))
    for _ in range(settings.rounds):
        for blocks, program in programs.items():
            for gate, arrays in data.items():
                count = launches[blocks, gate]
                found[blocks][gate].append(_seconds(program, arrays, count))
    return found


def _seconds(program, arrays: dict, launches: int) -> float:
    start = time.perf_counter()
    for _ in range(launches):
        result = program(arrays)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / launches


def wrong_gradients(settings, problem: Problem, blocks: GpuBlocks) -> str | None:
    """Why training with these blocks would fail; at up to 512 tokens and a gate of 0.1."""
    short = dataclasses.replace(settings, length=min(settings.length, 512), heads=2)
    arrays = data(short, problem, 0.1)
    names = tuple(name for name in arrays if name != "gate_bias")  # a sum of both signs

    def loss(function, changed):
        output = function(arrays | changed).astype(jnp.float32)
        return jnp.sum(
            output * jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape)
        )

    trained = {name: arrays[name] for name in names}
    try:
        ours = functools.partial(_ours, blocks)
        got = jax.jit(jax.grad(functools.partial(loss, ours)))(trained)
    except Exception as error:  # a compiler's
        return f"the backward pass does not compile: {str(error)[-300:]}"
    want = jax.grad(functools.partial(loss, _theirs))(trained)
    for name in names:
        error = _relative(got[name], want[name].astype(jnp.float32))
        # The table's is a sum over all queries of both signs.
        if not error <= TOLERANCE * (2 if name == "table" else 1):
            return f"the gradient of {name} is wrong by {error:.1e}"
    return None
