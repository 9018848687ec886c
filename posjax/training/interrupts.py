"""Ctrl-C and SIGTERM as a wish to stop after the step."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["Interrupted", "StopSignal"]


class Interrupted(Exception):
    """A signal stopped the run; what it had reached is saved.

    Args:
        number: of the signal.
        step: that is saved.
    """

    def __init__(self, number: int, step: int, directory: Path) -> None:
        name = signal.Signals(number).name
        super().__init__(f"{name}: stopped after step {step}, which is saved in {directory}")
        self.number, self.step, self.directory = number, step, directory


class StopSignal:
    """While it is entered, the first SIGINT or SIGTERM is noted; a second one acts as usual."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        """Takes over the signals (in the main thread, the only one that may)."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self.__exit__()

    def agreed(self) -> int:
        """The signal that any process got, 0 for none; all processes have to ask together."""
        if jax.process_count() > 1:
            numbers = multihost_utils.process_allgather(np.int32(self.number))
            self.number = int(np.max(numbers))
        return self.number
