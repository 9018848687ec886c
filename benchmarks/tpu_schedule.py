"""Cost of attention on TPUs, read from compiled programs; no TPU is needed.

    python benchmarks/tpu_schedule.py --output benchmarks/results/tpu-schedule.json
    python benchmarks/tpu_schedule.py --chips v5e --contender cope-forward --blocks 512x512 --print
    python benchmarks/tpu_schedule.py --docs        write docs/performance.md from the results

libtpu (`pip install "posjax[aot]"`) compiles each kernel for each chip, and `llo` reads the
schedule of its inner loops. A schedule counts in bundles of instructions, of which a core issues
one a clock at best; numbers are bundles per 128 x 128 pairs of a query and a key. What lies outside
of the loops, and waiting for memory, is not part of them. Compilations run one by one, each in a
process of its own; what the output holds already, of the same source, is not measured again.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import llo
import tyro
from contenders import BLOCKS, CONTENDERS, STEPS, Problem, sizes_of, split
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "tpu-schedule.json"
PAGE, PICTURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.png"
MARKS = "<!-- table -->", "<!-- /table -->"
# Rows of the table: title, contenders of which the best counts, label of the loop, and label of the
# loop by which the best blocks are chosen.
ROWS = (
    ("CoPE, counting", ("cope",), "counting", "counting"),
    ("CoPE, saturated", ("cope",), "plain", "counting"),
    ("a bias of the distance", ("alibi",), "plain", "plain"),
    ("no encoding", ("plain",), "plain", "plain"),
    ("JAX splash attention", ("splash", "splash-causal"), "plain", "plain"),
    ("JAX flash attention", ("flash", "flash-causal"), "plain", "plain"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure."""

    chips: tuple[str, ...] = tuple(llo.CHIPS)
    contender: tuple[str, ...] = ()
    """Such as cope-forward; none means all."""
    blocks: tuple[str, ...] = ()
    """Queries x keys of a tile, such as 512x512, and a third number: the keys in memory for our
    kernels, the keys of a step for JAX's. None means what each contender is known to like."""
    head_size: int = 128
    positions: int = 64
    """P, rows of CoPE's table."""
    output: str | None = None
    """JSON file; results that it holds are kept."""
    again: bool = False
    """Measure anew what the output holds."""
    print: bool = False
    """Print every loop, and the compiler's words where it fails."""
    docs: bool = False
    """Measure nothing; write the page and the picture from the output, or from where it belongs."""
    keep: str | None = None
    """Keep the compiler's files in this folder."""
    one: bool = False
    """Internal: compile here."""


# --- measuring ------------------------------------------------------------------------------------


def compile_here(settings: Settings) -> None:
    """Compiles one contender for one chip; the compiler writes its files."""
    contender, step = split(settings.contender[0])
    function, arguments = contender.build(
        Problem(settings.head_size, settings.positions), sizes_of(settings.blocks[0])
    )
    llo.compile_for(settings.chips[0], function, arguments, step == "backward")


def loops(folder: Path, name: str, blocks: str) -> list[dict]:
    """All inner loops of our kernels; of JAX's kernels the run with most products."""
    (contender, step), sizes, found = split(name), sizes_of(blocks), []
    maxima = 0 if step == "backward" else 1 if contender.ours else sizes[1] // sizes[-1]
    for kernel in getattr(contender, step):
        schedule = llo.read(folder, kernel)
        bodies = schedule.loops()
        if not contender.ours:
            bodies = [max(schedule.runs(), key=lambda body: body.count("vmatmul"))]
        costs = [llo.attention_cost(body, *sizes[:2], maxima) for body in bodies]
        found += [{"kernel": kernel} | one for one in costs]
    return found


def measure(settings: Settings, made: dict) -> dict:
    """What one compilation in a process of its own gives."""
    words = [sys.executable, __file__, "--one"]
    for option, field in (("chips", "chip"), ("contender", "contender"), ("blocks", "blocks")):
        words += [f"--{option}", made[field]]
    for field in ("head_size", "positions"):
        words += [f"--{field.replace('_', '-')}", str(made[field])]
    with tempfile.TemporaryDirectory() as folder:
        if settings.keep:
            folder = settings.keep + "/" + "-".join(str(value) for value in made.values())
            Path(folder).mkdir(parents=True)
        said = llo.run(words, folder)
        if not said:
            try:
                return made | {"loops": loops(Path(folder), made["contender"], made["blocks"])}
            except (LookupError, ValueError) as error:  # programs that look different
                said = f"{type(error).__name__}: {error}"
    if settings.print:
        print(said[-3000:], file=sys.stderr)
    errors = [x for x in said.splitlines() if re.match(r"[\w.]+(Error|Exit|Exception)\b", x)]
    return made | {"error": (errors or said.splitlines())[-1][:300]}


def show(console: Console, result: dict, everything: bool) -> None:
    """One line for a compilation, or a table of its loops."""
    names = ("contender", "chip", "blocks", "head_size")
    title = " ".join(str(result[name]) for name in names)
    if "error" in result or not everything:
        costs = [
            f"{x['label']}{' masked' * x['masked']} {x['per_pairs']}{'?' * (not x['certain'])}"
            for x in result.get("loops", ())
        ]
        console.print(f"{title}: {result.get('error') or ', '.join(costs)}", markup=False)
        return
    *columns, _ = result["loops"][0]
    table = Table(*columns[1:], *result["loops"][0]["use"], title=title, title_justify="left")
    for loop in result["loops"]:
        shares = [f"{share:.0%}" for share in loop["use"].values()]
        table.add_row(*(str(loop[column]) for column in columns[1:]), *shares)
    console.print(table)


def wanted(settings: Settings) -> Iterator[dict]:
    """What identifies each compilation."""
    fixed = {"head_size": settings.head_size, "positions": settings.positions}
    for chip in settings.chips:
        if chip not in llo.CHIPS:
            raise SystemExit(f"unknown chip {chip!r}; known are {', '.join(llo.CHIPS)}")
        for name in settings.contender or [f"{one}-{step}" for one in CONTENDERS for step in STEPS]:
            contender, step = split(name)
            for blocks in settings.blocks or BLOCKS[contender.ours, step]:
                yield {"chip": chip, "contender": name, "blocks": blocks} | fixed


def source(name: str) -> str:
    """A digest of the code that a contender compiles, where it is ours."""
    texts = [path.read_bytes() for path in sorted((ROOT / "kernels" / "tpu").glob("*.py"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:12] if split(name)[0].ours else ""


def measure_all(settings: Settings) -> None:
    """Measures, prints, and writes after each compilation."""
    console, results = Console(width=160), []
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    path = Path(settings.output) if settings.output else None
    if path and path.exists():
        before = json.loads(path.read_text())
        if before["versions"] != versions:
            raise SystemExit(f"{path} was made with {before['versions']}, and this is {versions}")
        results = before["results"]
    for made in track(list(wanted(settings)), "compiling", console=console, transient=True):
        same = [old for old in results if made.items() <= old.items()]
        code = source(made["contender"])
        if same and same[0]["source"] == code and not settings.again:
            continue
        result = measure(settings, made) | {"source": code}
        show(console, result, settings.print)
        results = [old for old in results if old not in same] + [result]
        if path:
            command = "python benchmarks/tpu_schedule.py " + " ".join(sys.argv[1:])
            today = datetime.date.today().isoformat()
            content = {"command": command, "date": today, "versions": versions, "results": results}
            path.write_text(json.dumps(content, indent=1) + "\n")


# --- the page -------------------------------------------------------------------------------------


def cost(result: dict, label: str) -> float:
    """Bundles per 128 x 128 pairs of the loops with a label, over all kernels; without masked ones.

    JAX's kernels have one loop, so a masked one counts.
    """
    ours = split(result["contender"])[0].ours
    loops = [x for x in result.get("loops", ()) if x["label"] == label]
    loops = [x for x in loops if not (ours and x["masked"])]
    # Of two loops alike the one that handles more tiles a round does the work.
    chosen = {x["kernel"]: x for x in sorted(loops, key=lambda x: x["tiles"])}.values()
    if not chosen or not all(x["certain"] for x in chosen):
        return math.inf
    return sum(x["per_pairs"] for x in chosen)


def best(results: list[dict], chip: str, size: int, step: str, row: tuple) -> tuple[float, str]:
    """The cost of a row of the table on a chip, and the blocks; infinite where there is none."""
    _, names, label, chooser = row
    wanted = {(f"{name}-{step}", chip, size) for name in names}
    key = lambda x: (x["contender"], x["chip"], x["head_size"])  # noqa: E731
    fitting = [x for x in results if key(x) in wanted]
    if not fitting:
        return math.inf, ""
    first = min(fitting, key=lambda x: cost(x, chooser))
    return cost(first, label), first["blocks"]


def table(results: list[dict]) -> str:
    """The costs as Markdown, a table for each head size."""
    pages = []
    for size in sorted({x["head_size"] for x in results}, reverse=True):
        chips = [
            c for c in llo.CHIPS if any((x["chip"], x["head_size"]) == (c, size) for x in results)
        ]
        lines = [f"| D = {size} | {' | '.join(chips)} |", "|---" * (len(chips) + 1) + "|"]
        for step in STEPS:
            for row in ROWS:
                found = [best(results, chip, size, step, row) for chip in chips]
                cells = [f"{n:.0f} ({b})" if math.isfinite(n) else "" for n, b in found]
                lines.append(f"| {step}, {row[0]} | {' | '.join(cells)} |")
        pages.append("\n".join(lines))
    return "\n\n".join(pages)


def picture(results: list[dict], size: int) -> Figure:
    """The same as bars; forward and backward."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    chips = [c for c in llo.CHIPS if any((x["chip"], x["head_size"]) == (c, size) for x in results)]
    for panel, step in zip(figure.subplots(1, 2), STEPS, strict=True):
        for i, row in enumerate(ROWS):
            heights = [best(results, chip, size, step, row)[0] for chip in chips]
            heights = [height if math.isfinite(height) else 0 for height in heights]
            places = [j + (i - len(ROWS) / 2 + 0.5) * 0.16 for j in range(len(chips))]
            bars = panel.bar(places, heights, 0.15, label=row[0])
            panel.bar_label(bars, [f"{h:.0f}" if h else "" for h in heights], fontsize=7)
        panel.set_xticks(range(len(chips)), chips)
        panel.set(title=step, ylabel="bundles per 128 x 128 pairs")
        panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize="small", frameon=False)
    return figure


def write_page(path: Path) -> None:
    """Table and picture from a file of results."""
    content = json.loads(path.read_text())
    results, versions = content["results"], content["versions"]
    picture(results, max(x["head_size"] for x in results)).savefig(PICTURE, dpi=150)
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    image = f"![Bars of the table's numbers]({PICTURE.name})"
    inside = f"{table(results)}\n\nCompiled on {content['date']} with {made}.\n\n{image}"
    before, rest = PAGE.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(f"{before}{MARKS[0]}\n{inside}\n{MARKS[1]}{after}")


def main(settings: Settings) -> None:
    if settings.one:
        compile_here(settings)
    elif settings.docs:
        write_page(Path(settings.output or RESULTS))
    else:
        measure_all(settings)


if __name__ == "__main__":
    main(tyro.cli(Settings))
