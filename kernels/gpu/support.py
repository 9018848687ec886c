"""Calls that the GPU kernels support; importable without their compiler."""

import jax
import jax.numpy as jnp

from posjax.biases.base import Bias
from posjax.kernels.addends import contextual, refused
from posjax.masks import Mask
from posjax.types import Shaped

__all__ = ["SIZES", "unsupported"]

# Head sizes; others are padded.
SIZES = (64, 128)
_MOST_POSITIONS = 128


def unsupported(query: Shaped, value: Shaped, bias: Bias | None, mask: Mask) -> str | None:
    """The reason why these kernels cannot do this, or None if they can."""
    capability = _compute_capability()
    if capability is not None and capability[0] != 9:
        version = ".".join(map(str, capability))
        return f"the device has compute capability {version}; the GPU kernels are for 9.0 (Hopper)"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query has dtype {query.dtype}; the GPU kernels take bfloat16 and float16"
    largest = max(query.shape[3], value.shape[3])
    if largest > SIZES[-1]:
        return f"head size {largest} is greater than {SIZES[-1]}, the largest of the GPU kernels"
    if mask.array is not None:
        return "an explicit mask array has no block that the GPU kernels could leave out"
    own = contextual(bias)
    if own is not None and own.num_positions > _MOST_POSITIONS:
        return (
            f"the table has {own.num_positions} rows; the GPU kernels take up to {_MOST_POSITIONS}"
        )
    return refused(bias, "GPU")


def _compute_capability() -> tuple[int, ...] | None:
    """The compute capability of the GPU; None without one."""
    if jax.default_backend() != "gpu":
        return None
    words = str(getattr(jax.devices()[0], "compute_capability", "0"))
    return tuple(int(word) for word in words.split("."))
