"""Tasks: data to train a model on, and how it is scored.

A new task is a new file, and one line below for editors and type checkers. The class that
selective_copy.py defines is `TASKS["selective_copy"]`. `posjax.tasks.data` feeds tasks to a
training loop; it is imported on its own, because it needs Grain.
"""

import importlib
import inspect
import pkgutil

from posjax.tasks.base import Batch as Batch
from posjax.tasks.base import Split as Split
from posjax.tasks.base import Task as Task
from posjax.tasks.base import Vocabulary as Vocabulary
from posjax.tasks.flip_flop import FlipFlop as FlipFlop
from posjax.tasks.selective_copy import SelectiveCopy as SelectiveCopy
from posjax.tasks.text import Text as Text


def _find_tasks() -> dict[str, type[Task]]:
    """The concrete task classes of this folder by the name of their module, sorted."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name == "data":
            continue
        module = importlib.import_module(f"{__name__}.{info.name}")
        for _, value in inspect.getmembers(module, inspect.isclass):
            own = issubclass(value, Task) and value.__module__ == module.__name__
            if own and not inspect.isabstract(value):
                found[info.name] = value
    return found


TASKS = _find_tasks()
