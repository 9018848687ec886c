"""Which devices a program is for, and whether their kernels can run there."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

__all__ = ["gpu_interpreter", "interpreted_gpu", "needs", "platform"]

_gpu_params: contextvars.ContextVar = contextvars.ContextVar("gpu_params", default=None)


def platform() -> str:
    """The devices that are traced for: "cpu", "gpu" or "tpu".

    Those of the current mesh (a described one, too, for compiling ahead of time), else of
    `jax.default_device`, else JAX's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform
    chosen = jax.config.jax_default_device
    if chosen is not None:
        return chosen if isinstance(chosen, str) else chosen.platform
    return jax.default_backend()


def needs(kind: str) -> str | None:
    """The reason why kernels for `kind` ("tpu" or "gpu") cannot run here; None if they can."""
    if _is_interpreted(kind):
        return None
    found = platform()
    if found != kind:
        return f"the {kind.upper()} kernels need {kind.upper()}s, and the devices are {found}s"
    capability = _compute_capability() if kind == "gpu" else None
    if capability is not None and capability[0] != 9:
        version = ".".join(map(str, capability))
        return f"the device has compute capability {version}; the GPU kernels are for 9.0 (Hopper)"
    return None


@contextlib.contextmanager
def interpreted_gpu(params: Any) -> Iterator[None]:
    """GPU kernels that are started inside run in Pallas's interpreter, with these parameters.

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


def _is_interpreted(kind: str) -> bool:
    if kind == "gpu":
        return gpu_interpreter() is not None
    # `pltpu.force_tpu_interpret_mode` sets this; JAX has no public way to read it.
    from jax._src import config

    setting = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
    return setting is not None and setting.value is not None


def _compute_capability() -> tuple[int, ...] | None:
    """That of the GPU; None if it is described, not there."""
    if jax.default_backend() != "gpu":
        return None
    words = str(getattr(jax.devices("gpu")[0], "compute_capability", "0"))
    return tuple(int(word) for word in words.split("."))
