"""Training: configs, mesh, state, step, loop, checkpoints, report, comparison."""

import importlib
from typing import TYPE_CHECKING, Any

from posjax.training.config import Config as Config
from posjax.training.config import MeshConfig as MeshConfig
from posjax.training.config import OptimizerConfig as OptimizerConfig
from posjax.training.config import TrainConfig as TrainConfig

if TYPE_CHECKING:
    from posjax.training.compare import compare_encodings as compare_encodings
    from posjax.training.loop import fit as fit

_LATER = {"fit": "loop", "compare_encodings": "compare"}


def __getattr__(name: str) -> Any:
    """`fit` and `compare_encodings`, imported when asked for: they need all of JAX and Orbax."""
    if name in _LATER:
        return getattr(importlib.import_module(f"posjax.training.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
