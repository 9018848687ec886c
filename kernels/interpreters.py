"""Pallas's interpreters, which run kernels on devices that they are not for."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, Literal

__all__ = ["gpu_interpreter", "interpreted_gpu", "is_interpreted"]

_gpu_params: contextvars.ContextVar = contextvars.ContextVar("gpu_params", default=None)


def is_interpreted(kind: Literal["tpu", "gpu"]) -> bool:
    """Whether kernels for this kind of devices run in an interpreter."""
    if kind == "gpu":
        return gpu_interpreter() is not None
    # `pltpu.force_tpu_interpret_mode` sets this; JAX has no public way to read it.
    from jax._src import config

    setting = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
    return setting is not None and setting.value is not None


@contextlib.contextmanager
def interpreted_gpu(params: Any) -> Iterator[None]:
    """Runs the GPU kernels that are started inside in Pallas's interpreter, with these parameters.

    Args:
        params: `plgpu.InterpretGPUParams` (jax 0.11.2 or newer).
    """
    token = _gpu_params.set(params)
    try:
        yield
    finally:
        _gpu_params.reset(token)


def gpu_interpreter() -> Any:
    """The parameters of the interpreter that runs GPU kernels; None if the device runs them."""
    return _gpu_params.get()
