"""Attention without a bias by cuDNN's flash attention, through `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp

from posjax.kernels.common import Attended
from posjax.kernels.plain import unlike_jax
from posjax.problem import Problem

__all__ = ["refuses", "run", "unsupported"]


def refuses(problem: Problem) -> str | None:
    """The reason why cuDNN cannot solve a problem; None if it can."""
    return unsupported(problem) or _device_refuses(problem.query.shape[3])


def unsupported(problem: Problem) -> str | None:
    """The reason why it cannot be solved on any GPU; None if it can."""
    query, mask = problem.query, problem.mask
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query has dtype {query.dtype}; cuDNN takes bfloat16 and float16"
    if mask.window is not None and not mask.is_causal:
        return "cuDNN has a local window only with is_causal"
    return unlike_jax(problem)


def run(problem: Problem) -> Attended:
    """CuDNN's attention."""
    return Attended(
        jax.nn.dot_product_attention(
            problem.query,
            problem.key,
            problem.value,
            scale=problem.scale,
            is_causal=problem.mask.is_causal,
            local_window_size=problem.mask.window,
            implementation="cudnn",
        )
    )


def _device_refuses(size: int) -> str | None:
    """The reason why the GPU cannot do heads of this size; None if it can."""
    if jax.default_backend() != "gpu":
        return "cuDNN compiles on a machine with a GPU only"
    device = jax.devices("gpu")[0]
    if "cuda" not in device.client.platform_version.lower():
        return "cuDNN needs an NVIDIA GPU"
    capability = float(getattr(device, "compute_capability", "0"))
    if capability < 8.0:
        return f"the device has compute capability {capability}; cuDNN's attention needs 8.0"
    largest = 256 if capability >= 9.0 else 128
    if size > largest or size % 8:
        return f"head size is {size}; cuDNN takes multiples of 8 up to {largest}"
    return None
