"""Training: configs, mesh, state, step, loop, checkpoints, report, comparison."""

import importlib
from typing import Any

from posjax.training.config import Config, MeshConfig, OptimizerConfig, TrainConfig

__all__ = ["Config", "MeshConfig", "OptimizerConfig", "TrainConfig", "compare_encodings", "fit"]

_LATER = {"fit": "loop", "compare_encodings": "compare"}


def __getattr__(name: str) -> Any:
    """`fit` and `compare_encodings`, imported when asked for: they need all of JAX and Orbax."""
    if name in _LATER:
        return getattr(importlib.import_module(f"posjax.training.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
