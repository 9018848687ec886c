"""Several encodings on the same task, seeds and data, side by side."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posjax import checks
from posjax.encodings import registry
from posjax.training.config import Config, as_json
from posjax.training.figures import draw_bars, draw_losses
from posjax.training.loop import fit
from posjax.training.mesh import is_leader
from posjax.training.records import read_records, write_json, write_text
from posjax.training.report import environment, format_value, task_summary
from posjax.training.runs import RunError, open_run, taken_text

__all__ = ["compare_encodings", "compare_table", "show_comparison"]


def compare_encodings(
    config: Config,
    names: Sequence[str],
    seeds: Sequence[int],
    directory: Path | str | None = None,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains each encoding with each seed into `directory/ENCODING-seedS`; merges the reports.

    Everything but the encoding comes from `config`; runs with the same seed see the same batches.

    Args:
        names: of encodings, as `posjax.encodings.create` takes them.
        directory: `runs/name` of the config, if None.
        resume: keep what is finished in the folder and go on with the rest.

    Returns:
        The comparison, as in compare.json.

    Raises:
        ValueError: an unknown or repeated name or seed, or what `fit` raises.
        Interrupted: SIGINT or SIGTERM came; what is done is saved.
    """
    directory = Path(config.runs) / config.name if directory is None else Path(directory)
    console = console or Console(quiet=not is_leader())
    _check_unique("compare", names)
    _check_unique("seeds", seeds)
    members = _members(config, names, seeds, directory)
    _check_folder(directory, members, resume)
    reports = {}
    for number, ((name, seed), member) in enumerate(members.items(), 1):
        folder = directory / member.name
        console.print(
            f"run {number} of {len(members)}: {name}, seed {seed}", markup=False, highlight=False
        )
        reports[name, seed] = fit(member, folder, resume=folder.exists(), console=console)
    comparison = _merge(config, names, seeds, reports)
    if is_leader():
        _write(comparison, directory)
    return comparison


def _members(
    config: Config, names: Sequence[str], seeds: Sequence[int], directory: Path
) -> dict[tuple[str, int], Config]:
    """The config of every run; all encodings of a seed come before the next seed."""
    return {
        (name, seed): dataclasses.replace(
            config,
            encoding=registry.create(name),
            seed=seed,
            name=f"{name}-seed{seed}",
            runs=str(directory),
        )
        for seed in seeds
        for name in names
    }


def _check_unique(name: str, values: Sequence[Any]) -> None:
    differ = len(set(values)) == len(values) > 0
    checks.require(name, list(values), differ, "one or more, none of them twice")


def _check_folder(directory: Path, members: dict[Any, Config], resume: bool) -> None:
    """Every folder is looked at before the first run starts."""
    taken = directory.exists() and any(directory.iterdir())
    if taken and not resume:
        raise RunError(taken_text(directory))
    if resume and not taken:
        raise RunError(f"{directory} holds no comparison to resume; start one without --resume")
    for member in members.values():
        folder = directory / member.name
        if folder.exists():
            open_run(folder, as_json(member), resume=True)


def _merge(
    config: Config, names: Sequence[str], seeds: Sequence[int], reports: dict[Any, dict[str, Any]]
) -> dict[str, Any]:
    """The comparison: for each encoding the mean and every seed of every metric, and times."""
    encodings = {}
    for name in names:
        runs = [reports[name, seed] for seed in seeds]
        speeds = [run["steps_per_second"] for run in runs if run["steps_per_second"]]
        encodings[name] = {
            "encoding": as_json(registry.create(name)),
            "parameters": runs[0]["parameters"],
            "mean": _mean([run["metrics"] for run in runs]),
            "seeds": {str(seed): reports[name, seed]["metrics"] for seed in seeds},
            "unavailable": {k: v for run in runs for k, v in run["unavailable"].items()},
            "train_seconds": float(np.mean([run["train_seconds"] for run in runs])),
            "steps_per_second": float(np.mean(speeds)) if speeds else None,
            "runs": [f"{name}-seed{seed}" for seed in seeds],
        }
    return {
        "name": config.name,
        **task_summary(config.task),
        "seeds": list(seeds),
        "encodings": encodings,
        "baselines": reports[names[0], seeds[0]]["baselines"],
        "steps": config.train.steps,
        **environment(),
        "config": {k: v for k, v in as_json(config).items() if k not in ("encoding", "seed")},
    }


def _mean(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds of every metric on every split; None where a seed has no value."""
    mean: dict[str, Any] = {}
    for split, values in metrics[0].items():
        blocks = [block[split] for block in metrics]
        if values is None or None in blocks:
            mean[split] = None
            continue
        mean[split] = {}
        for metric in values:
            found = [block[metric] for block in blocks]
            mean[split][metric] = None if None in found else float(np.mean(found))
    return mean


def compare_table(comparison: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: encodings, then baselines; the first metric on every split, then times.

    A cell with several seeds is "mean [every seed]".
    """
    metric = comparison["primary"]
    headings = ["encoding", *(split.replace("_", " ") for split in comparison["splits"])]
    headings += ["train s", "steps/s"]
    rows = []
    for name, entry in comparison["encodings"].items():
        row = [name]
        for split in comparison["splits"]:
            seeds = [(block[split] or {}).get(metric) for block in entry["seeds"].values()]
            row.append(_cell(metric, (entry["mean"][split] or {}).get(metric), seeds))
        speed = entry["steps_per_second"]
        row += [f"{entry['train_seconds']:.1f}", f"{speed:.1f}" if speed else "n/a"]
        rows.append(row)
    for name, block in comparison["baselines"].items():
        values = [(block.get(split) or {}).get(metric) for split in comparison["splits"]]
        rows.append([name, *(format_value(metric, value) for value in values), "", ""])
    return headings, rows


def _cell(metric: str, mean: float | None, seeds: list[float | None]) -> str:
    text = format_value(metric, mean)
    if len(seeds) == 1:
        return text
    return f"{text} [{', '.join(format_value(metric, seed).removesuffix('%') for seed in seeds)}]"


def _title(comparison: dict[str, Any]) -> str:
    seeds = ", ".join(map(str, comparison["seeds"]))
    metric = comparison["primary"].replace("_", " ")
    several = len(comparison["seeds"]) > 1
    which = f"mean over seeds {seeds} [each]" if several else f"seed {seeds}"
    return f"{comparison['task']}: {metric}, {comparison['steps']} steps, {which}"


def _markdown(comparison: dict[str, Any]) -> str:
    headings, rows = compare_table(comparison)
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "".join(f"\n{note}\n" for note in _notes(comparison))
    return f"{_title(comparison)}\n\n{table}\n{notes}"


def _notes(comparison: dict[str, Any]) -> list[str]:
    return [
        f"{name}, {split}: n/a ({reason})"
        for name, entry in comparison["encodings"].items()
        for split, reason in entry["unavailable"].items()
    ]


def _write(comparison: dict[str, Any], directory: Path) -> None:
    entries = comparison["encodings"]
    losses = {
        name: [read_records(directory / run) for run in entry["runs"]]
        for name, entry in entries.items()
    }
    draw_losses(losses, comparison["task"], directory / "loss.png")
    values = {name: list(entry["seeds"].values()) for name, entry in entries.items()}
    values |= {name: [block] for name, block in comparison["baselines"].items()}
    draw_bars(values, comparison, directory / "compare.png")
    write_text(directory / "compare.md", _markdown(comparison))
    write_json(directory / "compare.json", comparison)


def show_comparison(console: Console, comparison: dict[str, Any], directory: Path) -> None:
    """Prints the table, what is missing from it, and where the files are."""
    headings, rows = compare_table(comparison)
    table = Table(title=Text(_title(comparison)), title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(cell.replace(" [", "\n[")) for cell in row))
    console.print(table)
    for note in _notes(comparison):
        console.print(note, markup=False, highlight=False)
    console.print(f"files in {directory}", markup=False, highlight=False, soft_wrap=True)
