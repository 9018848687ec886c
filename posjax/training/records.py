"""Files that a run writes while it trains: metrics.jsonl and TensorBoard."""

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["Records", "read_records", "write_json"]


class Records:
    """Appends lines to metrics.jsonl and the same numbers to TensorBoard.

    Lines of training are {"step", "loss", "gradient_norm", "learning_rate", "tokens_per_second"};
    lines of evaluation are {"step", "evaluation": {split: {metric: value}}}.

    Args:
        directory: the folder of the run.
        step: steps done; what an interrupted run wrote after them is dropped.
        last: the last step of the run; its evaluation comes after its checkpoint, and will be made
            again.
    """

    def __init__(self, directory: Path, step: int, last: int) -> None:
        from tensorboardX import SummaryWriter

        path = directory / "metrics.jsonl"
        kept = [
            line
            for line in read_records(directory)
            if line["step"] <= step and not ("evaluation" in line and line["step"] == last)
        ]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        purge = step + 1 if step else None
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

    def train(self, step: int, values: dict[str, float]) -> None:
        """One line of training."""
        self._line({"step": step, **values})
        for name, value in values.items():
            self._board.add_scalar(f"train/{name}", value, step)

    def evaluation(self, step: int, metrics: dict[str, dict[str, float | None] | None]) -> None:
        """One line of evaluation."""
        self._line({"step": step, "evaluation": metrics})
        for split, values in metrics.items():
            for name, value in (values or {}).items():
                if value is not None:
                    self._board.add_scalar(f"evaluation/{split}/{name}", value, step)

    def _line(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Writes out what is left."""
        self._file.close()
        self._board.close()


def read_records(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that was cut off is left out."""
    path = directory / "metrics.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file in one piece, as `write_json` does."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
