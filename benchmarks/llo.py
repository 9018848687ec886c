"""Loop bodies in the schedules that libtpu, the compiler for TPUs, writes down.

A TPU core issues one bundle of instructions a clock at best, so the bundles of the loop that holds
a kernel's mathematics say what the kernel costs at least. Of each program the compiler writes two
files: the bundles, and how many instructions of a bundle go to each unit.

    0x4aa LB: >>> { %v1 = vld [%s2] ;;  %3 = vmatmul.bf16.gmra.mxu0 %v4 } /* Start region 5 */
    0x7d8   : >>> { %6 = sbr.rel (!%p7) target = $region5 }

`>>>` is the depth of the loops around a bundle, LB where one begins, and PF where a branch leads. A
loop is a region at whose end stands a branch to its start.
"""

import collections
import dataclasses
import functools
import itertools
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax
from jax.experimental import topologies

# Chips, and a slice of each that libtpu can describe.
CHIPS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}

# A bundle: its address, a marker, the depth, the instructions.
_BUNDLE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*>*\s*\{(.*)")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_OPERATION = re.compile(r"=\s+([a-z][\w.]*)")
_REGION = re.compile(r"(Start|End) region (\d+)")
_BRANCH = re.compile(r"\bsbr\S* [^;]*?target = \$region(\d+)")
_USE, _BUNDLES = "final_hlo-static-per-bundle-utilization.txt", "final_bundles.txt"


def run(words: list[str], folder: str) -> str:
    """Runs a program that compiles for TPUs without having one; what it said where it failed.

    The compiler writes to `folder`. It reads where to write once, when JAX starts.
    """
    variables = {
        "JAX_PLATFORMS": "cpu",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    variables = os.environ | variables
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    return (done.stderr or f"ended with {done.returncode}") if done.returncode else ""


def compile_for(chip: str, function: Callable, arguments: tuple, backward: bool) -> None:
    """Compiles a function of shapes, or only its pullback, for a chip that need not be there."""
    device = topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    kind = jax.sharding.AbstractDevice(
        device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu"
    )
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind)):
        if backward:  # residuals become arguments, so that the forward pass is not compiled
            output, pull = jax.eval_shape(lambda *a: jax.vjp(function, *a), *arguments)
            function, arguments = lambda pull, cotangent: pull(cotangent), (pull, output)
        described = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
        )
        jax.jit(function).lower(*described).compile()


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Instructions that issue together; empty ones wait, and count as well."""

    marker: str
    text: str

    @functools.cached_property
    def operations(self) -> list[str]:
        """Names of its instructions."""
        return _OPERATION.findall(_COMMENT.sub("", self.text))

    @property
    def branches(self) -> list[str]:
        """The regions to which it may branch."""
        return _BRANCH.findall(self.text)


@dataclasses.dataclass(frozen=True)
class Body:
    """A run of bundles; `use` holds how much of each unit's slots is taken."""

    first: int
    bundles: int
    use: dict[str, float]
    fills: int
    spills: int
    operations: collections.Counter

    def count(self, pattern: str) -> int:
        """How many instructions begin with a pattern."""
        begins = re.compile(pattern)
        return sum(n for name, n in self.operations.items() if begins.match(name))


def attention_cost(body: Body, rows: int, keys: int, maxima: int) -> dict:
    """What a loop of attention costs per 128 x 128 pairs of `rows` queries and `keys` keys.

    How many such tiles a round of it handles is told by its exponentials: one for each pair, a
    second one for a gate, and one for each query as often as a tile updates its `maxima`. Where
    that is no whole number the result is not `certain`. All code in the loop counts, also what it
    may jump over: then it has more `branches` than its own.
    """
    pairs = rows * keys
    gates = body.count("vrcp|vtanh") >= pairs / 2048
    exponentials = body.count(r"v(exp|pow)2\.f32") + 2 * body.count(r"v(exp|pow)2\.bf16")
    tiles = exponentials / (pairs / 1024 * (1 + gates) + maxima * rows / 8)
    return {
        "label": "counting" if gates else "plain",
        "masked": body.count(r"vcmp\.\w+\.[su]32") >= pairs / 2048,
        "bundles": body.bundles,
        "tiles": round(tiles, 2),
        "certain": tiles > 0.9 and abs(tiles - round(tiles)) < 0.1,
        "per_pairs": round(body.bundles / max(1, round(tiles)) / pairs * 128 * 128, 1),
        "fills": body.fills,
        "spills": body.spills,
        "branches": body.count("sbr"),
        "use": {unit: round(share, 3) for unit, share in body.use.items()},
    }


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A program. `slots` is what each unit can take in a bundle, `taken` what it takes in each."""

    bundles: list[Bundle]
    slots: dict[str, int]
    taken: list[list[int]]

    def body(self, first: int, end: int) -> Body:
        """The bundles from `first` to `end` - 1."""
        totals = [sum(column) for column in zip(*self.taken[first:end], strict=True)]
        totals = dict(zip(self.slots, totals, strict=True))
        size = end - first
        operations = (name for bundle in self.bundles[first:end] for name in bundle.operations)
        return Body(
            first,
            size,
            {n: totals[n] / (size * slots) for n, slots in self.slots.items() if ":" not in n},
            totals["VLOAD:FILL"],
            totals["VSTORE:SPILL"],
            collections.Counter(operations),
        )

    def loops(self) -> list[Body]:
        """The loops without a loop inside that multiply matrices."""
        places = self.places()
        inner = [(a, b) for a, b in places if not any(a <= c < d < b for c, d in places)]
        return [body for a, b in inner if (body := self.body(a, b)).count("vmatmul")]

    def places(self) -> list[tuple[int, int]]:
        """First and last + 1 bundle of every loop: a branch leads back to where it starts."""
        starts, ends, found = {}, {}, []
        for i, bundle in enumerate(self.bundles):
            for kind, region in _REGION.findall(bundle.text):
                (starts if kind == "Start" else ends).setdefault(region, i)
        for i, bundle in enumerate(self.bundles):
            for region in bundle.branches:
                if starts.get(region, i + 1) <= i:  # behind the branch some bundles still issue
                    found.append((starts[region], max(i, ends.get(region, i)) + 1))
        return sorted(found)

    def runs(self) -> list[Body]:
        """The runs that no branch leads into or out of and that multiply matrices."""
        cuts = {0, len(self.bundles)} | {end for _, end in self.places()}
        for i, bundle in enumerate(self.bundles):
            cuts |= ({i} if bundle.marker else set()) | ({i + 1} if bundle.branches else set())
        pairs = itertools.pairwise(sorted(cuts))
        return [body for a, b in pairs if (body := self.body(a, b)).count("vmatmul")]


def read(folder: Path, kernel: str) -> Schedule:
    """The schedule of the one program whose name holds `kernel`.

    Raises:
        LookupError: where there is none, or more than one.
    """
    texts = []
    for ending in (_BUNDLES, _USE):
        pattern = re.compile(rf"\d+-[^/]*{kernel}[^/]*-\d+-{re.escape(ending)}")
        found = [path for path in sorted(folder.iterdir()) if pattern.fullmatch(path.name)]
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise LookupError(f"one file of {kernel} that ends in {ending} is needed, not {names}")
        texts.append(found[0].read_text())
    return parse(*texts)


def parse(program: str, use: str) -> Schedule:
    """A schedule from the texts of its two files."""
    bundles = []
    for line in program.splitlines():
        if match := _BUNDLE.match(line):
            bundles.append([match[1] or "", match[2]])
        elif bundles:  # a comment that goes on
            bundles[-1][1] += line
    rows = [line.strip() for line in use.splitlines() if line.strip()]
    names = [name.strip() for name in rows[1].split(",")]
    slots = dict(zip(names, map(int, rows[2].split()), strict=True))
    taken = [[int(number) for number in row.split()] for row in rows[4:]]
    if len(taken) != len(bundles):
        raise ValueError(f"{len(bundles)} bundles, but the use of {len(taken)}")
    return Schedule([Bundle(*bundle) for bundle in bundles], slots, taken)
