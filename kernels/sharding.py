"""Runs an attention kernel on each device's own part of the batch.

A loop whose length depends on data cannot be split by the compiler without talking to the other
devices at every step. Under `jax.set_mesh` the kernel is therefore put into `jax.shard_map`, with
batches over the axes "data" and "fsdp": each device stops its own walk when its own rows have
saturated, and nothing is communicated. A Pallas kernel is not split by the compiler at all: there
heads go over the axis "tensor", and what no axis divides is computed on every device.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from posjax.axes import HEADS
from posjax.problem import Problem
from posjax.types import Array, Num

__all__ = ["over_mesh"]

_BATCH_AXES = ("data", "fsdp")
_HEAD_AXES = ("tensor",)


def over_mesh(
    run: Callable[[Problem], Array], problem: Problem, *, split: str
) -> Num[Array, "B T N E"]:
    """`run(problem)`, split over the batch axes of the current mesh.

    A batch that the mesh does not divide is computed whole on every device, and inside a
    `shard_map` of the caller nothing changes.

    Args:
        split: "no"; "batch"; or "heads" if the compiler cannot split `run` itself, because it is a
            Pallas kernel: heads are then split, too, over the axis "tensor", if it divides the
            key/value heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_pallas = split == "heads"
    axes = _dividing(mesh, _BATCH_AXES, problem.query.shape[0]) if split != "no" else ()
    if mesh.manual_axes or not (axes or (is_pallas and mesh.size > 1)):
        return run(problem)
    heads = _dividing(mesh, _HEAD_AXES, problem.key.shape[2]) if is_pallas else ()
    if problem.bias is not None and not problem.bias.can_split_heads(_parts(mesh, heads)):
        heads = ()

    def spec(letters: str, x: Array) -> P:
        """Batches and heads are split; axes of length 1 are shared by all."""
        names = {"B": axes} | dict.fromkeys(HEADS, heads)
        pairs = zip(letters, x.shape, strict=False)
        return P(*(names.get(letter) or None if size > 1 else None for letter, size in pairs))

    def of_own_heads(problem: Problem) -> Array:
        if heads and problem.bias is not None:
            part = jax.lax.axis_index(heads)
            problem = problem.with_own_heads(part, _parts(mesh, heads))
        return run(problem)

    # Loop states start as constants; checked for varying values, each would need a cast.
    return jax.shard_map(
        of_own_heads,
        in_specs=(problem.map_arrays(spec),),
        out_specs=P(axes or None, None, heads or None),
        axis_names=set(mesh.axis_names) if is_pallas else set(axes),
        check_vma=False,
    )(problem)


def _parts(mesh: jax.sharding.AbstractMesh, names: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _dividing(mesh: jax.sharding.AbstractMesh, names: tuple[str, ...], size: int) -> tuple:
    """The axes of the mesh, of these names, over which `size` things can be split."""
    axes = tuple(name for name in names if mesh.shape.get(name, 1) > 1)
    return () if size % _parts(mesh, axes) else axes
