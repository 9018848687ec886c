"""Times and metrics between two lines of metrics.jsonl."""

import math
import time
from typing import Any

import jax

__all__ = ["Clock", "NonFiniteLossError", "Window"]


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient is infinite or not a number."""


class Window:
    """Metrics of the steps since the last line; they stay on the devices until they are asked for.

    Args:
        steps: metrics of steps before a restart that no line has yet.
    """

    def __init__(self, steps: list[dict[str, Any]]) -> None:
        self._steps = list(steps)
        self._last = 0

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Notes the metrics of a step, without waiting for them."""
        self._last = step
        self._steps.append(metrics)

    def fetch(self) -> list[dict[str, float]]:
        """Waits for the metrics of all steps.

        Raises:
            NonFiniteLossError: naming the first step whose loss or gradient is not finite.
        """
        fetched = jax.device_get(self._steps)
        self._steps = [{name: float(value) for name, value in step.items()} for step in fetched]
        for step, values in enumerate(self._steps, self._last - len(self._steps) + 1):
            for name in ("loss", "gradient_norm"):
                if not math.isfinite(values[name]):
                    raise NonFiniteLossError(f"{name} is {values[name]} at step {step}")
        return self._steps

    def close(self) -> dict[str, float]:
        """Mean loss and gradient norm, and the last learning rate; the next window begins."""
        steps = self.fetch()
        self._steps = []
        means = {
            name: math.fsum(step[name] for step in steps) / len(steps)
            for name in ("loss", "gradient_norm")
        }
        return {**means, "learning_rate": steps[-1]["learning_rate"]}


class Clock:
    """Seconds of training steps alone: without compilation, evaluation and saving.

    Args:
        seconds: of the steps before a restart.
        steps: how many these were.
    """

    def __init__(self, seconds: float = 0.0, steps: int = 0) -> None:
        self.seconds, self.steps = seconds, steps
        self.compile_seconds: float | None = None
        self._mark: float | None = None
        self._window = [0.0, 0]

    def start(self) -> None:
        """Goes on, if it stood still."""
        if self._mark is None:
            self._mark = time.perf_counter()

    def step(self, metrics: dict[str, jax.Array]) -> None:
        """A step was started; the first one is waited for, as it is compiled, and not counted."""
        if self.compile_seconds is None:
            jax.block_until_ready(metrics)
            self.compile_seconds = time.perf_counter() - self._mark
            self._mark = time.perf_counter()
        else:
            self._window[1] += 1

    def pause(self) -> None:
        """Stands still until the next `start`; the devices should have finished."""
        if self._mark is not None:
            self._window[0] += time.perf_counter() - self._mark
            self._mark = None

    def lap(self) -> float:
        """Seconds per step since the last lap; of the first step alone, its compilation too."""
        self.pause()
        (seconds, steps), self._window = self._window, [0.0, 0]
        self.seconds += seconds
        self.steps += steps
        return seconds / steps if steps else seconds + (self.compile_seconds or 0.0)
