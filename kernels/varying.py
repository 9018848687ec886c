"""Values that vary over the axes of a caller's `jax.shard_map`.

With `check_vma`, JAX knows of each value over which axes of the mesh it differs, and a loop must
begin with values that differ over as many as those it ends with. Constants differ over none.
"""

import jax

from posjax.types import PyTree

__all__ = ["varying_axes", "varying_over"]


def varying_axes(tree: PyTree) -> frozenset[str]:
    """The axes over which some array of the tree varies."""
    return frozenset().union(*(_axes(x) for x in jax.tree.leaves(tree)))


def varying_over(axes: frozenset[str], tree: PyTree) -> PyTree:
    """The tree, its arrays varying over all of `axes`; gradients are summed over those added."""

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree) if axes else tree


def _axes(x: jax.Array) -> frozenset[str]:
    return frozenset(getattr(jax.typeof(x), "vma", ()))
