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

from posjax.biases.base import Bias
from posjax.masks import Mask
from posjax.types import Array

__all__ = ["over_mesh"]

_BATCH_AXES = ("data", "fsdp")
_HEAD_AXES = ("tensor",)


def over_mesh(
    run: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    bias: Bias | None,
    mask: Mask,
    *,
    opaque: bool = False,
) -> Array:
    """`run(query, key, value, bias, mask)`, split over the batch axes of the current mesh.

    A batch that the mesh does not divide is computed whole on every device, and inside a
    `shard_map` of the caller nothing changes.

    Args:
        opaque: whether the compiler cannot split `run` itself, because it is a Pallas kernel. Heads
            are then split over the axis "tensor", where it divides the key/value heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = _dividing(mesh, _BATCH_AXES, query.shape[0])
    if mesh.manual_axes or not (axes or (opaque and mesh.size > 1)):
        return run(query, key, value, bias, mask)
    heads = _dividing(mesh, _HEAD_AXES, key.shape[2]) if opaque else ()
    if bias is not None and not bias.can_split_heads(_parts(mesh, heads)):
        heads = ()
    batch = query.shape[0]

    def spec(x: Array, head_axis: int | None = None) -> P:
        parts = [None] * x.ndim
        if x.shape[0] == batch:
            parts[0] = axes
        if head_axis is not None and x.shape[head_axis] > 1:
            parts[head_axis] = heads
        return P(*parts)

    whole = P(axes, None, heads)
    bias_specs = None if bias is None else bias.map_axes(spec, lambda _: P())
    if heads and bias is not None:
        bias_specs = bias.map_heads(spec, bias_specs)
    parts = _parts(mesh, heads)

    def of_own_heads(query: Array, key: Array, value: Array, bias: Bias | None, mask: Mask):
        if heads and bias is not None:
            bias = bias.own_heads(jax.lax.axis_index(heads), parts)
        return run(query, key, value, bias, mask)

    # Loop states start as constants, which the check of varying values would want cast one by one.
    split = jax.shard_map(
        of_own_heads,
        in_specs=(whole, whole, whole, bias_specs, jax.tree.map(spec, mask)),
        out_specs=whole,
        axis_names=set(mesh.axis_names) if opaque else set(axes),
        check_vma=False,
    )
    return split(query, key, value, bias, mask)


def _parts(mesh: jax.sharding.AbstractMesh, names: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _dividing(mesh: jax.sharding.AbstractMesh, names: tuple[str, ...], size: int) -> tuple:
    """The axes of the mesh, of these names, over which `size` things can be split."""
    axes = tuple(name for name in names if mesh.shape.get(name, 1) > 1)
    return () if size % _parts(mesh, axes) else axes
