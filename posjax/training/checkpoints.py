"""Checkpoints: parameters, optimizer, step, data position and config, with Orbax.

Orbax writes a checkpoint into a temporary folder and renames it when it is complete, so a save that
was killed is never seen again.
"""

import copy
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from posjax.training.config import differences
from posjax.training.state import TrainState

__all__ = ["CheckpointError", "Checkpoints"]


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or belongs to another config."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: made if it is missing.
        every: steps between saves.
        keep: newest checkpoints to keep.
    """

    def __init__(self, directory: Path, *, every: int, keep: int) -> None:
        self.directory = directory.absolute()
        self._every = every
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether a save belongs after `step`."""
        return step % self._every == 0

    def save(self, state: TrainState, data: dict[str, Any], meta: dict[str, Any]) -> None:
        """Saves in the background what are JSON values; a step that is there is left alone.

        The arguments may change right after the call.
        """
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(copy.deepcopy(data)),
            meta=ocp.args.JsonSave(copy.deepcopy(meta)),
        )
        self._manager.save(step, args=items)

    def restore(
        self, target: TrainState, config: dict[str, Any]
    ) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
        """The newest checkpoint, placed as `target` says: state, data position, meta.

        Args:
            target: shapes, types and placement, as from `abstract_state`.
            config: the JSON config of this run, to be compared with the saved one in `meta`.

        Raises:
            CheckpointError: there is none, it cannot be read, or it was made with another config.
        """
        step = self.latest()
        if step is None:
            raise CheckpointError(f"there is no complete checkpoint in {self.directory}")
        meta = self._read(step, meta=ocp.args.JsonRestore())["meta"]
        check_config(config, meta["config"], self.directory / str(step))
        items = self._read(
            step, state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()
        )
        return items["state"], items["data"], meta

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore raise many kinds.
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"the checkpoint {self.directory / str(step)} cannot be read "
                f"({type(error).__name__}: {reason}); delete this folder to go on from an older one"
            ) from error

    def wait(self) -> None:
        """Waits until what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go of threads."""
        self._manager.close()


def check_config(now: dict[str, Any], before: dict[str, Any], where: Path) -> None:
    """Raises `CheckpointError` if two JSON configs differ in a field that decides the result."""
    lines = differences(now, before)
    if lines:
        raise CheckpointError(
            f"{where} was made with another config; give the same fields, or another --name:\n  "
            + "\n  ".join(lines)
        )
