"""The progress of a run: a live bar, or a few plain lines if there is no terminal."""

from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["TrainingProgress"]

_LINES = 10  # Lines of a whole run where there is no terminal.


class TrainingProgress:
    """Shows step, loss, tokens per second and remaining time.

    Args:
        name: stands before the bar.
        steps: of the whole run.
        done: steps that were done before.
    """

    def __init__(self, console: Console, name: str, steps: int, done: int) -> None:
        self._console, self._name, self._steps, self._shown = console, name, steps, done
        self._bar = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(name, total=steps, completed=done, text="compiling")

    def __enter__(self) -> "TrainingProgress":
        """Shows the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Takes the bar down."""
        if self._bar:
            self._bar.stop()

    def step(self, step: int) -> None:
        """A step was handed to the devices."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def log(
        self, step: int, loss: float, tokens_per_second: float, seconds_per_step: float
    ) -> None:
        """A line of metrics is there."""
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif step == self._steps or step - self._shown >= self._steps / _LINES:
            self._shown = step
            left = timedelta(seconds=round((self._steps - step) * seconds_per_step))
            self.say(f"{self._name}  step {step}/{self._steps}  {text}  {left} left")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
