"""Evaluation of a model on every split of its task."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
from jax.sharding import Mesh

from posjax.positions import LengthError
from posjax.tasks import Task
from posjax.tasks.data import split_batches
from posjax.training.mesh import to_devices
from posjax.training.step import NOT_NUMBERS
from posjax.types import PyTree

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of every split (None where the model cannot read it), and why some are missing."""

    metrics: dict[str, dict[str, float | None] | None] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


class _NotNumbersError(ArithmeticError):
    """A model gives no numbers where it is scored."""


def evaluate(
    step: Callable,
    task: Task,
    params: PyTree,
    mesh: Mesh,
    batch_size: int,
    check: Callable[[], None],
) -> Evaluation:
    """Scores the parameters on all splits.

    A split longer than a table of the encoding is not scored, and one with logits that are not
    numbers has no metrics; the reason is kept.

    Args:
        step: from `make_evaluate_step`.
        check: called before each batch; it may raise to stop.
    """
    result = Evaluation()
    for split in task.splits:
        try:
            result.metrics[split] = _score(step, task, split, params, mesh, batch_size, check)
        except (LengthError, _NotNumbersError) as error:
            result.metrics[split] = None
            result.unavailable[split] = str(error)
    return result


def _score(step, task, split, params, mesh, batch_size, check) -> dict[str, float | None]:
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for batch, _ in split_batches(task, split, batch_size=batch_size):
        check()
        for name, (total, count) in jax.device_get(
            step(params, to_devices(batch, mesh, whole=True))
        ).items():
            sums[name] = sums.get(name, 0.0) + float(total)
            counts[name] = counts.get(name, 0.0) + float(count)
    wrong, scored = sums.pop(NOT_NUMBERS, 0.0), counts.pop(NOT_NUMBERS, 0.0)
    if wrong:
        raise _NotNumbersError(
            f"the logits of {int(wrong)} of {int(scored)} scored tokens are not numbers"
        )
    pooled = {name: sums[name] / counts[name] if counts[name] else math.nan for name in sums}
    values = task.derive(pooled)
    names = sorted(values, key=lambda name: name != task.primary)
    return {name: values[name] if math.isfinite(values[name]) else None for name in names}
