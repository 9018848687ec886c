"""Tables, plot and page of benchmarks/attention.py."""

import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from attention_contenders import CONTENDERS, PASSES
from rich.console import Console
from rich.table import Table

__all__ = ["page", "show", "write_docs"]

DOCS = Path(__file__).resolve().parent.parent / "docs"
_BEGIN, _END = "<!-- attention -->", "<!-- /attention -->"


def show(console: Console, name: str, result: dict, base: str) -> None:
    """One table of one problem; ratios are to `base`."""
    table = Table(title=name, title_justify="left")
    for heading in ("", *(f"{p}, ms (x {base})" for p in PASSES), "peak GiB"):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, *cells in _cells(result, base):
        table.add_row(label, *cells)
    console.print(table)
    for gate, shares in result["unsaturated"].items():
        console.print(f"gates near {gate}: {_shares(shares)}", highlight=False)


def _shares(shares: dict) -> str:
    found = (f"{100 * share:.1f} % of {size} x {size}" for size, share in shares.items())
    return f"{' and '.join(found)} blocks count"


def _cells(result: dict, base: str) -> list[list[str]]:
    """Rows of text."""
    rows, found = result["rows"], []
    for row in rows.values():
        title = CONTENDERS[row["contender"]].title
        if CONTENDERS[row["contender"]].contextual:
            title += f", gates {row['gate']}"
        times = (_times(row, step, _base(rows, base, row, step)) for step in PASSES)
        found.append([title, *times, _memory(row)])
    return found


def _base(rows: dict, base: str, row: dict, step: str) -> float | None:
    """The median that ratios are to: of the same gate level where the base has gates."""
    for other in rows.values():
        same = not CONTENDERS[base].contextual or other["gate"] == row["gate"]
        if other["contender"] == base and same:
            return other["median_seconds"].get(step)
    return None


def _times(row: dict, step: str, base: float | None) -> str:
    if step in row["failed"]:
        return row["failed"][step]
    median, all_ = row["median_seconds"][step], row["seconds"][step]
    ratio = f" ({median / base:.2f})" if base else ""
    return f"{1e3 * median:.3g} [{1e3 * min(all_):.3g}, {1e3 * max(all_):.3g}]{ratio}"


def _memory(row: dict) -> str:
    peak = row.get("peak_gib")
    return peak if isinstance(peak, str) else "" if peak is None else f"{peak:.2f}"


def page(content: dict, base: str) -> str:
    """The results in Markdown."""
    lines = [
        f"{content['device']}, jax {content['jax']}, torch {content['torch']}:",
        f"`{content['command']}`.",
        f"Milliseconds: median [least, most] of the rounds (ratio to {base}); peak memory of both",
        "passes in a process of its own.",
        "",
    ]
    for name, result in content["results"].items():
        lines += [f"**{name}**", ""]
        for gate, shares in result["unsaturated"].items():
            lines.append(f"- gates near {gate}: {_shares(shares)}")
        lines += ["", "| |" + "|".join((*PASSES, "peak GiB")) + "|", "|---" * 4 + "|"]
        lines += ["| " + " | ".join(cells) + " |" for cells in _cells(result, base)]
        lines.append("")
    missing = [f"- {name}: {reason}" for name, reason in content["missing"].items()]
    lines += ["Not run:", "", *missing, ""] if missing else []
    lines += [f"- {name}: no time was left" for name in content["left_out"]]
    return "\n".join([*lines, "", "![Times by length](performance-attention.png)"])


def write_docs(path: Path) -> None:
    """Puts results into docs/performance.md, and the plot beside it."""
    content, target = json.loads(path.read_text()), DOCS / "performance.md"
    text = target.read_text()
    if _BEGIN not in text or _END not in text:
        raise SystemExit(f"{target} has no place for it: {_BEGIN} {_END}")
    made = f"{_BEGIN}\n{page(content, content['settings']['base'])}\n{_END}"
    target.write_text(re.sub(f"{_BEGIN}.*?{_END}", lambda _: made, text, flags=re.DOTALL))
    plot(content, DOCS / "performance-attention.png")


def plot(content: dict, path: Path) -> None:
    """Forward and backward time over the length, one picture for each shape of heads."""
    shapes: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for result in content["results"].values():
        problem = result["problem"]
        shape = f"N {problem['heads']}/{problem['kv_heads']}, H {problem['head_size']}"
        for name, row in result["rows"].items():
            if PASSES[1] in row["median_seconds"]:
                point = problem["length"], 1e3 * row["median_seconds"][PASSES[1]]
                shapes.setdefault(shape, {}).setdefault(name, []).append(point)
    figure, axes = plt.subplots(
        1, max(1, len(shapes)), figsize=(6 * max(1, len(shapes)), 5), squeeze=False
    )
    for axis, (shape, lines) in zip(axes[0], shapes.items(), strict=False):
        for name, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.set(title=shape, xlabel="T", ylabel=f"ms, {PASSES[1]}", xscale="log", yscale="log")
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
