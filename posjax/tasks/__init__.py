"""Tasks: what a model is trained on, and how it is scored.

Every module of this folder that defines a `Task` is found, so a new task is a new file and edits no
list. `TASKS["selective_copy"]` is the class of selective_copy.py, and `SelectiveCopy` stands in
this namespace too. `posjax.tasks.data` feeds tasks to a training loop; it is imported on its own,
because it needs Grain.
"""

import importlib
import inspect
import pkgutil

from posjax.tasks.base import Batch, Split, Task, Vocabulary


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
globals().update({task.__name__: task for task in TASKS.values()})

__all__ = ["TASKS", "Batch", "Split", "Task", "Vocabulary"]
__all__ += [task.__name__ for task in TASKS.values()]
