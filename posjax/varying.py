"""Values that vary over the axes of a caller's `jax.shard_map`.

With `check_vma`, JAX knows of each value over which axes of the mesh it differs, and a loop must
begin with values that differ over as many as those it ends with. Constants differ over none.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax._src.core import get_axis_env  # there is no public way to ask for these names

from posjax.types import PyTree

__all__ = [
    "alike",
    "is_mapped_over_mesh",
    "mapped_axes",
    "remembering_maps",
    "varying_axes",
    "varying_like",
    "varying_over",
]

_mapped_outside: contextvars.ContextVar[bool] = contextvars.ContextVar("mapped", default=False)


def varying_axes(tree: PyTree) -> frozenset[str]:
    """The axes over which some array of the tree varies."""
    return frozenset().union(*(_axes(x) for x in jax.tree.leaves(tree)))


def varying_over(axes: frozenset[str], tree: PyTree) -> PyTree:
    """The tree, its arrays varying over all of `axes`; gradients are summed over those added."""

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree) if axes else tree


def alike(tree: PyTree) -> PyTree:
    """The tree, all its arrays varying over the axes over which some do."""
    return varying_over(varying_axes(tree), tree)


def mapped_axes() -> frozenset[str]:
    """The axes of the mesh over which a `jax.vmap` around us splits what it maps over."""
    environment = get_axis_env()
    return environment.spmd_axis_names | environment.explicit_mesh_axis_names


def is_mapped_over_mesh() -> bool:
    """Whether there is a `jax.vmap` over an Explicit axis of the mesh."""
    return _mapped_outside.get() or bool(get_axis_env().explicit_mesh_axis_names)


@contextlib.contextmanager
def remembering_maps() -> Iterator[None]:
    """Keeps the answer of `is_mapped_over_mesh` inside a `shard_map`, which forgets it."""
    token = _mapped_outside.set(is_mapped_over_mesh())
    try:
        yield
    finally:
        _mapped_outside.reset(token)


def _axes(x: jax.Array) -> frozenset[str]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def varying_like(inputs: PyTree, shapes: PyTree) -> PyTree:
    """Shapes of a kernel's outputs, varying over the axes over which its inputs do."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return shapes
    kind = jax.sharding.ManualAxisType(varying=varying_axes(inputs))

    def declared(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=kind)

    return jax.tree.map(declared, shapes)
