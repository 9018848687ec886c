"""The arrays that a model keeps of all tokens seen so far, and the checks of those it is given."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.forms import known
from posjax.models.config import TransformerConfig
from posjax.types import Array, Bool, Float, Int, PyTree

__all__ = ["Cache", "LayerState", "Remembered", "check_cache", "check_carry", "room", "write_all"]


class Remembered(NamedTuple):
    """The arrays that an attention layer keeps of each token."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    memory: PyTree  # of the encoding


class LayerState(NamedTuple):
    """The arrays that a layer keeps of each token."""

    attention: Remembered
    stream_inputs: PyTree  # of the encoding


class Cache(NamedTuple):
    """All arrays that the model keeps of the tokens seen so far; room for S tokens."""

    length: Int[Array, ""]  # tokens seen
    carry: PyTree  # of the encoding's positions
    indices: PyTree  # of the encoding, for the keys, [B, S, ...]
    layers: (
        tuple[LayerState, ...] | LayerState
    )  # with scan_layers one state with a leading layer axis


def check_cache(cache: Any, config: TransformerConfig, batch: int) -> None:
    """A cache has the layers, heads and rows of a model; `write_all` checks what encodings keep."""
    checks.instance("cache", cache, Cache, "a Cache, as init_cache makes it")
    checks.shape("cache.length", cache.length, ())
    checks.dtype("cache.length", cache.length, jnp.integer)
    length = known(cache.length)
    if length is not None:
        checks.integer("cache.length", length.item(), low=0)
    wanted = "one LayerState" if config.scan_layers else f"a tuple of {config.layers} LayerState"
    states = [cache.layers] if config.scan_layers else cache.layers
    is_tuple = isinstance(states, tuple | list) and not isinstance(states, LayerState)
    if not is_tuple or not all(isinstance(state, LayerState) for state in states):
        kind = type(cache.layers).__name__
        raise ValueError(f"cache.layers is a {kind}; it must be {wanted}.")
    if not config.scan_layers and len(states) != config.layers:
        raise ValueError(f"cache.layers has {len(states)} layers; it must have {config.layers}.")
    sizes = (batch, "room", config.key_heads, config.size_of_head)
    for index, state in enumerate(states):
        name = "cache.layers" if config.scan_layers else f"cache.layers[{index}]"
        for part in ("key", "value"):
            array = getattr(state.attention, part, None)
            axes = (config.layers, *sizes) if config.scan_layers else sizes
            checks.shape(f"{name}.attention.{part}", array, axes)
            checks.dtype(f"{name}.attention.{part}", array, (jnp.dtype(config.dtype),))


def check_carry(old: PyTree, new: PyTree) -> None:
    """The carry in a cache has the form of the one that the encoding returns."""
    _check_form("cache.carry", old, new, tuple)


def room(cache: Cache, count: int) -> Bool[Array, "T"]:
    """For which of `count` more tokens the cache has room; for all if its length is known."""
    layers = cache.layers if isinstance(cache.layers, LayerState) else cache.layers[0]
    room, length = layers.attention.key.shape[-3], known(cache.length)
    if count > room or (length is not None and length + count > room):
        before = "" if length is None else f" {length} tokens, and"
        raise ValueError(
            f"cache has{before} room for {room}, but tokens has {count} more; make a larger one "
            "with init_cache."
        )
    return cache.length + jnp.arange(count, dtype=jnp.int32) < room


def write_all(name: str, old: PyTree, new: PyTree, offset: Int[Array, ""] | None) -> PyTree:
    """`write_at` for every array; `new` itself if there is no cache.

    Args:
        name: of `old`, for messages.
    """
    if offset is None:
        return new
    _check_form(name, old, new, lambda shape: (shape[0], "room", *shape[2:]))
    return jax.tree.map(lambda o, n: write_at(o, n, offset), old, new)


def write_at(old: Array, new: Array, offset: Int[Array, ""]) -> Array:
    """`old` [B, S, ...] with the tokens of `new` [B, T, ...] written from `offset` on.

    Tokens beyond S are left out.
    """
    room, count, new = old.shape[1], new.shape[1], new.astype(old.dtype)
    if count == 1:
        # Where there is no room, the last token is written again.
        start = jnp.minimum(offset, room - 1)
        before = jax.lax.dynamic_slice_in_dim(old, start, 1, axis=1)
        new = jnp.where(offset < room, new, before)
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
    places = offset + jnp.arange(count, dtype=jnp.int32)
    return old.at[:, places].set(new, mode="drop", unique_indices=True)


def _check_form(name: str, old: PyTree, new: PyTree, axes: Any) -> None:
    """Arrays of a cache are those of the model: as many, of such shapes, of such dtypes."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        wanted = f"{jax.tree.map(_form, new)}, as the encoding of this model keeps it"
        checks.require(name, jax.tree.map(_form, old), False, wanted)
    paths, arrays = jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new)
    for (path, kept), array in zip(paths, arrays, strict=True):
        place = name + jax.tree_util.keystr(path)
        checks.shape(place, kept, axes(array.shape))
        are_integers = all(jnp.issubdtype(x.dtype, jnp.integer) for x in (kept, array))
        if not are_integers:
            checks.dtype(place, kept, (array.dtype,))


def _form(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else type(x).__name__
