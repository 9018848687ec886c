"""Counts what a reader walks through from `dot_product_attention` to the kernel.

    python benchmarks/hops.py

For every implementation: calls of functions of this repository, distinct functions, files, and the
greatest depth, until the body of the kernel begins (for "reference" and "jax" until they return).
The call is traced, not run, for devices that are described.
"""

import contextlib
import dataclasses
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import tyro

import posjax

ROOT = Path(posjax.__file__).resolve().parent.parent
# Implementation -> its device, and the file and the function where the body of its kernel begins.
WAYS = {
    "tpu": (("tpu", "TPU v5 lite"), ("tpu/forward.py", "_kernel")),
    "gpu": (("gpu", "NVIDIA H200"), ("gpu/forward.py", "_kernel")),
    "xla": (None, ("blockwise.py", "one_block")),
    "reference": (None, None),
}


class Hops(NamedTuple):
    """Numbers until the body of the kernel."""

    calls: int
    functions: int
    files: int
    depth: int


class Reached(Exception):
    """The body of the kernel has begun."""


def described(device: tuple[str, str] | None):
    """A context in which kernels see a device that is not here."""
    if device is None:
        return contextlib.nullcontext()
    platform, kind = device
    abstract = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    return jax.sharding.use_abstract_mesh(mesh)


def count(function, end: tuple[str, str] | None) -> Hops:
    """Traces a function and counts."""
    seen, calls, depth, deepest = set(), 0, 0, 0

    def watch(frame, event, _):
        nonlocal calls, depth, deepest
        file = frame.f_code.co_filename
        if event not in ("call", "return") or file.startswith("<"):
            return
        path = Path(file).resolve()
        if not path.is_relative_to(ROOT) or path == THIS:
            return
        # Generators and comprehensions belong to the function around them; methods that dataclasses
        # write are in no file.
        if frame.f_code.co_name.startswith("<") and frame.f_code.co_name != "<lambda>":
            return
        depth += 1 if event == "call" else -1
        if event == "return":
            return
        if end is not None and path.as_posix().endswith(end[0]) and frame.f_code.co_name == end[1]:
            sys.setprofile(None)
            raise Reached
        calls, deepest = calls + 1, max(deepest, depth)
        seen.add((path, frame.f_code.co_qualname, frame.f_code.co_firstlineno))

    sys.setprofile(watch)
    try:
        function()
    except Reached:
        pass
    finally:
        sys.setprofile(None)
    return Hops(calls, len(seen), len({path for path, *_ in seen}), deepest)


THIS = Path(__file__).resolve()


@dataclasses.dataclass(frozen=True)
class Settings:
    """Counts functions and files from `dot_product_attention` to each kernel.

    Args:
        length: tokens.
    """

    length: int = 1024


def main(settings: Settings) -> None:
    """Prints a table."""
    query = jax.ShapeDtypeStruct((1, settings.length, 2, 128), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    print("| implementation | bias | calls | functions | files | depth |")
    print("|---|---|---|---|---|---|")
    for bias in ("none", "cope"):
        for name, (device, end) in WAYS.items():

            def attend(query, table, name=name, bias=bias):
                own = posjax.ContextualBias(table) if bias == "cope" else None
                return posjax.dot_product_attention(
                    query, query, query, own, is_causal=True, implementation=name
                )

            with described(device):
                trace = functools.partial(jax.eval_shape, attend, query, table)
                trace()  # what is imported and cached once is no part of the way
                jax.clear_caches()
                hops = count(trace, end)
            print(f"| {name} | {bias} | {' | '.join(map(str, hops))} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
