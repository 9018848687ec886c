"""One step of training, and one batch of evaluation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from posjax.tasks import Batch, Task
from posjax.training.config import Config
from posjax.training.mesh import replicated, rows
from posjax.training.optimizer import make_optimizer, make_schedule
from posjax.training.state import TrainState, step_keys
from posjax.types import Array, Float, PyTree

__all__ = ["NOT_NUMBERS", "cross_entropy_sum", "make_evaluate_step", "make_train_step"]

NOT_NUMBERS = "scored tokens whose logits are not numbers"

Metrics = dict[str, Array]


def cross_entropy_sum(logits: Float[Array, "B T V"], batch: Batch) -> Float[Array, ""]:
    """sum_bt w_bt * -log softmax(logits_bt)[target_bt], in float32."""
    loss = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), batch["targets"]
    )
    return jnp.sum(loss * batch["loss_weights"])


def make_train_step(
    model: nn.Module, config: Config, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step: state and global batch in, new state and metrics out.

    The loss is the mean of the cross-entropy over the whole batch, weighted with `loss_weights`;
    with `accumulate` the parts are added up and divided by the weight of the whole batch, so it is
    the same loss (dropout and random positions are drawn for each part).
    """
    schedule = make_schedule(config.optimizer, config.train.steps)
    optimizer = make_optimizer(config.optimizer, schedule)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        weight = jnp.sum(batch["loss_weights"])
        weight = jnp.where(weight > 0, weight, jnp.ones_like(weight))

        def part_loss(params: PyTree, part: Batch, index: Array | int) -> Array:
            logits = model.apply(
                {"params": params},
                part["inputs"],
                deterministic=False,
                rngs=step_keys(config.seed, state.step, index),
            )
            return cross_entropy_sum(logits, part) / weight

        loss, gradient = _accumulated(part_loss, state.params, batch, config.train.accumulate, mesh)
        # Optax counts steps in int32 and multiplies them with floats.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            metrics = {
                "loss": loss,
                "gradient_norm": optax.tree.norm(gradient),
                "learning_rate": schedule(state.step),
            }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state), metrics

    whole = replicated(mesh)
    jitted = jax.jit(
        train_step, in_shardings=(whole, rows(mesh)), out_shardings=(whole, whole), donate_argnums=0
    )
    return _on_mesh(jitted, mesh)


def _accumulated(
    loss: Callable[..., Array], params: PyTree, batch: Batch, parts: int, mesh: Mesh
) -> tuple[Array, PyTree]:
    """Sum over the parts of a batch of `loss` and of its gradient."""
    value_and_grad = jax.value_and_grad(loss)
    if parts == 1:
        return value_and_grad(params, batch, 0)

    def split(array: Array) -> Array:
        # Part p has the rows p, p + parts, ...: every device keeps rows that it has.
        array = array.reshape(array.shape[0] // parts, parts, *array.shape[1:]).swapaxes(0, 1)
        place = NamedSharding(mesh, PartitionSpec(None, "data"))
        return jax.lax.with_sharding_constraint(array, place)

    def add(total: tuple[Array, PyTree], part: tuple[Batch, Array]) -> tuple[Any, None]:
        new = value_and_grad(params, *part)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, new), None

    zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), (jnp.zeros(()), params))
    parts_of_batch = (jax.tree.map(split, batch), jnp.arange(parts))
    (total, gradient), _ = jax.lax.scan(add, zero, parts_of_batch)
    return total, jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, params)


def make_evaluate_step(
    model: nn.Module, task: Task, mesh: Mesh
) -> Callable[[PyTree, Batch], dict[str, tuple[Array, Array]]]:
    """The jitted evaluation of one batch: (sum, count) of every metric of the task.

    With them comes NOT_NUMBERS: how many scored tokens have logits that are not numbers, of how
    many. Their most likely token would be token 0.
    """

    def evaluate_step(params: PyTree, batch: Batch) -> dict[str, tuple[Array, Array]]:
        logits = model.apply({"params": params}, batch["inputs"], deterministic=True)
        wrong = batch["scored"] & jnp.isnan(logits).any(axis=-1)
        counts = (jnp.sum(x, dtype=jnp.float32) for x in (wrong, batch["scored"]))
        return task.metrics(logits, batch) | {NOT_NUMBERS: tuple(counts)}

    whole = replicated(mesh)
    jitted = jax.jit(evaluate_step, in_shardings=(whole, rows(mesh)), out_shardings=whole)
    return _on_mesh(jitted, mesh)


def _on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Calls `function` with `mesh` set, so that attention kernels split their work over it."""

    def call(*arguments: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*arguments)

    return call
