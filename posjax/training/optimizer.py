"""The optimizer: clipping, AdamW, a learning rate that warms up and falls."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posjax import checks
from posjax.training.config import OptimizerConfig
from posjax.types import Array, PyTree

__all__ = ["make_optimizer", "make_schedule"]


@checks.arguments(steps=checks.at_least(1))
def make_schedule(config: OptimizerConfig, steps: int) -> Callable[[Array | int], Array]:
    """The learning rate of step 0, 1, ..., steps - 1.

    The warm-up gives learning_rate * (step + 1) / warmup_steps. Then comes learning_rate * f, where
    f falls from 1 at step warmup_steps towards final_fraction at step `steps`: as (1 + cos) / 2,
    linearly, or not at all. A run shorter than the warm-up ends inside it.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    falling = max(1, steps - warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, falling, alpha=config.final_fraction),
        "linear": optax.linear_schedule(peak, peak * config.final_fraction, falling),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]

    def learning_rate(step: Array | int) -> Array:
        step = jnp.asarray(step, jnp.float32)
        if not warmup:
            return jnp.asarray(after(step), jnp.float32)
        rising = peak * (step + 1.0) / warmup
        return jnp.where(step < warmup, rising, after(jnp.maximum(step - warmup, 0.0)))

    return learning_rate


@checks.arguments()
def make_optimizer(
    config: OptimizerConfig, schedule: Callable[[Array | int], Array]
) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay, learning rate.

    Weight decay acts on leaves named "kernel" outside encodings. Leaves under a path part
    "encoding" have their step multiplied by `encoding_learning_rate_multiplier`.
    """
    parts = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    if config.encoding_learning_rate_multiplier != 1.0:
        scale = optax.scale(config.encoding_learning_rate_multiplier)
        parts.append(optax.masked(scale, of_encoding))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts)


def decayed(params: PyTree) -> PyTree:
    """True at the leaves that decay."""
    return _mask(params, lambda path: path[-1] == "kernel" and "encoding" not in path)


def of_encoding(params: PyTree) -> PyTree:
    """True at the leaves of position encodings."""
    return _mask(params, lambda path: "encoding" in path)


def _mask(params: PyTree, holds: Callable[[tuple[str, ...]], bool]) -> PyTree:
    def at(path: tuple[Any, ...], _: Any) -> bool:
        return holds(tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path))

    return jax.tree_util.tree_map_with_path(at, params)
