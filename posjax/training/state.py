"""The state of a run: what a checkpoint holds and a step changes."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from posjax.training.mesh import replicated
from posjax.types import Array, PyTree

__all__ = ["TrainState", "abstract_state", "count_parameters", "initial_state", "step_keys"]


@flax.struct.dataclass
class TrainState:
    """Steps done, parameters, optimizer state; random numbers follow from seed and step."""

    step: Array
    params: PyTree
    opt_state: PyTree


def initial_state(
    model: nn.Module, optimizer: optax.GradientTransformation, length: int, seed: int, mesh: Mesh
) -> TrainState:
    """The state before the first step, replicated over the mesh; the same on every mesh.

    Args:
        length: T of a training example.
    """
    make = _maker(model, optimizer, length, seed)
    return jax.jit(make, out_shardings=replicated(mesh))()


def abstract_state(
    model: nn.Module, optimizer: optax.GradientTransformation, length: int, seed: int, mesh: Mesh
) -> TrainState:
    """Shapes, types and placement of `initial_state`, without computing it."""
    shapes = jax.eval_shape(_maker(model, optimizer, length, seed))
    place = replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def _maker(model, optimizer, length, seed):
    def make() -> TrainState:
        names = ("params", "dropout", "encoding")
        keys = dict(zip(names, jax.random.split(_root(seed)[0], 3), strict=True))
        params = model.init(keys, jnp.zeros((1, length), jnp.int32))["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return make


def step_keys(seed: int, step: Array, part: Array | int = 0) -> dict[str, Array]:
    """Random keys of a training step, from (seed, step, part of the batch) alone."""
    key = jax.random.fold_in(jax.random.fold_in(_root(seed)[1], step), part)
    return dict(zip(("dropout", "encoding"), jax.random.split(key), strict=True))


def _root(seed: int) -> Array:
    return jax.random.split(jax.random.key(seed))


def count_parameters(params: PyTree) -> int:
    """How many numbers a tree of parameters holds."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))
