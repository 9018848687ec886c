"""Candidates of benchmarks/tune_gpu.py, its choice, and the table that it writes."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable
from typing import NamedTuple

from posjax.kernels.blocks import GpuBlocks, gpu_sizes

__all__ = ["Problem", "candidates", "chosen", "name_of", "problems", "ranking", "rendered"]

FIELDS = [field.name for field in dataclasses.fields(GpuBlocks)]
# Of `GpuBlocks`, what a kernel without a contextual bias does not look at.
_COUNTING = ("count", "packed", "paired")


class Problem(NamedTuple):
    """One kind of attention: head size, rows of the table (0: no bias), gate keys, dtype."""

    size: int
    positions: int
    own_gate_key: bool
    dtype: str

    @property
    def name(self) -> str:
        """For people and for JSON."""
        kind = "no bias" if not self.positions else f"P {self.positions}"
        own = ", own gate key" if self.own_gate_key else ""
        return f"H {self.size}, {kind}{own}, {self.dtype}"


def problems(sizes: Iterable[int], positions: Iterable[int], dtypes: Iterable[str]):
    """All of them; without a bias there is no gate key."""
    own = (False, True)
    every = itertools.starmap(Problem, itertools.product(sizes, positions, own, dtypes))
    return [problem for problem in every if problem.positions or not problem.own_gate_key]


def candidates(problem: Problem, short: bool) -> list[GpuBlocks]:
    """Blocks that differ for this problem, those in use first.

    Args:
        short: only those that differ in one field from the one in use.
    """
    used = gpu_sizes(problem.size, problem.positions, problem.own_gate_key)
    used = used if problem.positions else _without_counting(used)
    found = [used]
    for key, count, stages, *flags in itertools.product(
        (64, 128), (64, 128), (1, 2, 3, 4), *[(False, True)] * 3
    ):
        if key % count == 0:
            blocks = GpuBlocks(key, count, stages, *flags)
            found.append(blocks if problem.positions else _without_counting(blocks))
    found = list(dict.fromkeys(found))
    return [x for x in found if _distance(x, used) <= 1] if short else found


def _without_counting(blocks: GpuBlocks) -> GpuBlocks:
    return dataclasses.replace(blocks, count=64, packed=True, paired=False)


def _distance(a: GpuBlocks, b: GpuBlocks) -> int:
    """Fields that differ; keys fetched and keys counted at a time are one of them."""
    differ = {name for name in FIELDS if getattr(a, name) != getattr(b, name)}
    return len({"key" if name == "count" else name for name in differ})


def name_of(blocks: GpuBlocks) -> str:
    """Such as "key 128, count 64, stages 2, packed"."""
    values = dataclasses.asdict(blocks)
    numbers = [f"{name} {values[name]}" for name in FIELDS if type(values[name]) is int]
    return ", ".join([*numbers, *(name for name in FIELDS if values[name] is True)])


def ranking(cases: list[dict]) -> list[tuple[float, dict]]:
    """Candidates that ran in all cases, best first, with the mean ratio to the best of each case.

    Args:
        cases: results of one row of the table, each with "timed": [{"blocks", "median"}].
    """
    ratios: dict[str, list[float]] = {}
    for case in cases:
        for gate in case["timed"][0]["median"] if case["timed"] else ():
            best = min(found["median"][gate] for found in case["timed"])
            for found in case["timed"]:
                name = json.dumps(found["blocks"])
                ratios.setdefault(name, []).append(found["median"][gate] / best)
    whole = max(map(len, ratios.values()), default=0)
    mean = lambda x: math.exp(sum(map(math.log, x)) / len(x))  # noqa: E731
    found = [(mean(x), json.loads(name)) for name, x in ratios.items() if len(x) == whole]
    return sorted(found, key=lambda x: x[0])


def chosen(cases: dict[str, dict]) -> dict[tuple[int, int, bool], dict]:
    """Row of the table -> the first of the ranking over dtypes and gates whose gradients passed."""
    rows: dict[tuple[int, int, bool], list[dict]] = {}
    for case in cases.values():
        problem = Problem(*case["problem"])
        rows.setdefault(problem[:3], []).append(case)
    table = {}
    for row, found in rows.items():
        refused = [blocks for case in found for blocks in case["refused"]]
        best = [blocks for _, blocks in ranking(found) if blocks not in refused]
        if best:
            table[row] = best[0]
    return table


def rendered(table: dict[tuple[int, int, bool], dict], source: str) -> str:
    """`kernels/gpu_table.py`."""
    lines = [
        '"""The sizes and choices of the GPU kernels for each kind of problem.',
        "",
        "`python benchmarks/tune_gpu.py --write` measures them and writes this file.",
        '"""',
        "",
        '__all__ = ["FASTEST", "SOURCE"]',
        "",
        f"SOURCE = {json.dumps(source)}" + "  # noqa: E501" * (len(source) > 89),
        "# (head size, most positions, a gate key of its own) -> fields of `GpuBlocks`.",
        "FASTEST = {",
    ]
    for row, blocks in sorted(table.items()):
        fields = [f'"{name}": {value}' for name, value in blocks.items()]
        line = f"    {row}: {{{', '.join(fields)}}},"
        long = [f"    {row}: {{", *(f"        {field}," for field in fields), "    },"]
        lines += [line] if len(line) <= 100 else long
    return "\n".join([*lines, "}"]) + "\n"
