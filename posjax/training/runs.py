"""Folders of runs: `runs/NAME` holds everything of one run, and is never overwritten."""

import json
from pathlib import Path
from typing import Any

from posjax.training.checkpoints import check_config
from posjax.training.records import write_json

__all__ = ["RunError", "create_run", "open_run"]


class RunError(ValueError):
    """A folder of a run is in the way, or is not there."""


def open_run(directory: Path, config: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """Checks that a run may start or go on in a folder.

    Args:
        config: the JSON config of the run.

    Returns:
        The report, if the run is finished.

    Raises:
        RunError: the folder is taken (`resume` False), or holds no run (`resume` True).
        CheckpointError: the run in it has another config.
    """
    taken = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    if not resume:
        if taken:
            raise RunError(taken_text(directory))
        return None
    if not (directory / "config.json").exists():
        raise RunError(f"{directory} holds no run to resume; start one without --resume")
    check_config(config, _read(directory / "config.json"), directory)
    report = directory / "report.json"
    return _read(report) if report.exists() else None


def create_run(directory: Path, config: dict[str, Any]) -> None:
    """Makes the folder of a run, with its config."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "config.json").exists():
        write_json(directory / "config.json", config)


def taken_text(directory: Path) -> str:
    """Advice about a folder that is taken."""
    return (
        f"{directory} exists, and runs are never overwritten. Give --resume to go on with it "
        f"(a finished run shows its report again), or --name {free_name(directory)} for a new one, "
        "or delete the folder"
    )


def free_name(directory: Path) -> str:
    """The first of NAME-2, NAME-3, ... that is free."""
    number = 2
    while directory.with_name(f"{directory.name}-{number}").exists():
        number += 1
    return f"{directory.name}-{number}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(f"{path} cannot be read ({error})") from error
