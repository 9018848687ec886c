"""The report of a run: report.json, and a table in the terminal."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from posjax.tasks import Task
from posjax.training.config import Config, as_json
from posjax.training.evaluate import Evaluation
from posjax.version import __version__

__all__ = ["environment", "format_value", "make_report", "report_table", "show_report"]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def make_report(
    config: Config, evaluation: Evaluation, results: dict[str, Any], baselines: dict[str, Any]
) -> dict[str, Any]:
    """Everything there is to say about a finished run, as JSON values.

    Args:
        results: what the loop measured: parameters, losses, times.
    """
    return {
        "name": config.name,
        "encoding": encoding_name(config),
        **task_summary(config.task),
        "metrics": evaluation.metrics,
        "unavailable": evaluation.unavailable,
        "baselines": baselines,
        **results,
        **environment(),
        "config": as_json(config),
    }


def encoding_name(config: Config) -> str:
    """The class of the encoding, or "none"."""
    return "none" if config.encoding is None else type(config.encoding).__name__


def task_summary(task: Task) -> dict[str, Any]:
    """The name of a task, its first metric and its splits."""
    return {
        "task": type(task).__name__,
        "primary": task.primary,
        "splits": {name: as_json(split) for name, split in task.splits.items()},
    }


def environment() -> dict[str, Any]:
    """Versions, device and commit."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    device = jax.devices()[0]
    return {
        "versions": {
            "python": platform.python_version(),
            **versions,
            "posjax": __version__,
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "system": platform.platform(),
        },
        "git_commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout that posjax comes from, with "+changes" if files differ."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def format_value(metric: str, value: float | None) -> str:
    """A metric for people: errors and accuracies in percent.

    >>> format_value("token_error", 0.0123), format_value("bits_per_byte", 2.0)
    ('1.23%', '2.000')
    """
    if value is None:
        return "n/a"
    if is_fraction(metric):
        return f"{100 * value:.2f}%"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def is_fraction(metric: str) -> bool:
    """Whether a metric is a part of a whole, shown in percent."""
    return metric.endswith(("error", "accuracy"))


def report_table(report: dict[str, Any]) -> Table:
    """Splits as rows, metrics as columns, each model and baseline in its own block."""
    shown = [values for values in report["metrics"].values() if values]
    metrics = list(shown[0]) if shown else [report["primary"]]
    metrics.sort(key=lambda name: name != report["primary"])
    title = f"{report['task']} with {report['encoding']}, {report['parameters']:,} parameters"
    table = Table(title=title, title_justify="left")
    for heading in ("", "split", "length"):
        table.add_column(heading, justify="right" if heading == "length" else "left")
    for metric in metrics:
        table.add_column(metric.replace("_", " "), justify="right")
    blocks = {report["encoding"]: report["metrics"], **report["baselines"]}
    for name, block in blocks.items():
        for split, values in block.items():
            cells = [format_value(metric, (values or {}).get(metric)) for metric in metrics]
            length = report["splits"].get(split, {}).get("length", "")
            table.add_row(name, split, str(length), *cells)
            name = ""
        table.add_section()
    return table


def show_report(console: Console, report: dict[str, Any], directory: Path) -> None:
    """Prints the table, what is missing from it, and where the files are."""
    console.print(report_table(report))
    for split, reason in report["unavailable"].items():
        console.print(f"{split}: n/a ({reason})", markup=False, highlight=False)
    seconds, speed = report["train_seconds"], report["steps_per_second"]
    console.print(
        f"{report['steps']} steps in {seconds:.1f} s"
        + (f" ({speed:.1f} steps/s)" if speed else "")
        + f" on {report['device']['count']} x {report['device']['kind']}; files in {directory}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
