"""Runs an attention kernel on each device's own part of the batch.

A loop whose length depends on data cannot be split by the compiler without talking to the other
devices at every step. Under `jax.set_mesh` the kernel is therefore put into `jax.shard_map`, with
batches over the axes that batches usually have: each device stops its own walk when its own rows
have saturated, and nothing is communicated. A Pallas kernel is not split by the compiler at all:
there heads go over axes that heads usually have, and what no axis divides is computed on every
device. Over Explicit axes, batches and heads are split as those of the query are.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from posjax.axes import HEADS
from posjax.kernels.common import Attended
from posjax.problem import Problem
from posjax.types import Array
from posjax.varying import mapped_axes, remembering_maps

__all__ = ["over_mesh"]

# Names of Auto axes.
_BATCH_AXES = ("data", "fsdp", "batch", "replica")
_HEAD_AXES = ("tensor", "model")


class _Split(NamedTuple):
    """The axes of the mesh over which batches and heads are split, and all that become manual."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    manual: tuple[str, ...]

    def spec(self, letters: str, x: Array) -> P:
        """Batches and heads are split; axes of length 1 are shared by all."""
        names = {"B": self.batch} | dict.fromkeys(HEADS, self.heads)
        pairs = zip(letters, x.shape, strict=False)
        return P(*(names.get(letter) or None if size > 1 else None for letter, size in pairs))


def over_mesh(chosen: Any, problem: Problem) -> Attended:
    """`chosen.run(problem)`, split over the current mesh.

    A batch that the mesh does not divide is computed whole on every device. Inside a `shard_map` of
    the caller, only axes that are not the caller's own are split.

    Args:
        chosen: an `Implementation`; its `split` says over what: "no"; "batch"; or "heads" if the
            compiler cannot split it itself, because it is a Pallas kernel: heads are then split,
            too, if the axes divide the key/value heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = _split(mesh, problem, chosen.split)
    if split is None:
        return chosen.run(problem)
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(problem))
    return (_run_split if traced else _compiled)(chosen, split, problem)


def _run_split(chosen: Any, split: _Split, problem: Problem) -> Attended:
    mesh = jax.sharding.get_abstract_mesh()
    parts = _parts(mesh, split.heads)

    def of_own_heads(problem: Problem) -> Attended:
        if split.heads and problem.bias is not None:
            problem = problem.with_own_heads(jax.lax.axis_index(split.heads), parts)
        return chosen.run(problem)

    specs = problem.map_arrays(split.spec)
    if _explicit(mesh, split.manual):
        problem = jax.tree.map(jax.sharding.reshard, problem, specs)
    batch, heads = split.batch or None, split.heads or None
    run = jax.shard_map(
        of_own_heads,
        in_specs=(specs,),
        out_specs=Attended(
            P(batch, None, heads),
            P(batch, None, heads) if problem.needs_log_sum_exp else None,
            P(batch, heads) if problem.returns_weights else None,
        ),
        axis_names=set(split.manual),
        # Pallas has no interpreter that knows over which axes values vary.
        check_vma=chosen.split != "heads",
    )
    with remembering_maps():
        return run(problem)


# Eagerly, a `shard_map` over some axes of a mesh with several cannot place its output.
_compiled = functools.partial(jax.jit, static_argnums=(0, 1))(_run_split)


def _split(mesh: jax.sharding.AbstractMesh, problem: Problem, how: str) -> _Split | None:
    """How a problem is split over the axes that are not manual yet; None if it is not."""
    taken = {*mesh.manual_axes, *mapped_axes()}
    free = [name for name in mesh.axis_names if name not in taken]
    explicit, is_pallas = _explicit(mesh, free), how == "heads"
    sizes = problem.query.shape[0], problem.key.shape[2]
    if explicit:
        spec = jax.typeof(problem.query).sharding.spec
        batch, heads = (
            _dividing(mesh, _names(spec, axis), n) for axis, n in zip((0, 2), sizes, strict=True)
        )
    else:
        usual = ([name for name in names if name in free] for names in (_BATCH_AXES, _HEAD_AXES))
        batch, heads = (_dividing(mesh, names, n) for names, n in zip(usual, sizes, strict=True))
        batch, heads = batch if how != "no" else (), heads if is_pallas else ()
    parts = _parts(mesh, heads)
    if problem.bias is not None and not problem.bias.can_split_heads(parts):
        heads = ()
    whole = is_pallas and math.prod(mesh.shape[name] for name in free) > 1
    if not (explicit or batch or whole):
        return None
    return _Split(batch, heads, tuple(free) if explicit or is_pallas else batch)


def _explicit(mesh: jax.sharding.AbstractMesh, free: Sequence[str]) -> bool:
    """Whether some axes are Explicit: every operation must say how it is split over these."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return AxisType.Explicit in [kinds[name] for name in free]


def _names(spec: P, axis: int) -> list[str]:
    """The axes of the mesh over which an array's axis is split."""
    names = spec[axis] if axis < len(spec) else None
    return [names] if isinstance(names, str) else list(names or ())


def _parts(mesh: jax.sharding.AbstractMesh, names: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _dividing(mesh: jax.sharding.AbstractMesh, names: list[str], size: int) -> tuple[str, ...]:
    """The axes of the mesh, of these names, over which `size` things can be split."""
    axes = tuple(name for name in names if mesh.shape[name] > 1)
    return () if size % _parts(mesh, axes) else axes
