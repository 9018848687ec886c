"""Checks of a model's arguments: tokens, their positions and segments, and the cache."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.forms import array_of, known
from posjax.models.config import TransformerConfig
from posjax.models.layers import Cache, LayerState
from posjax.types import Array, Bool, Int

__all__ = ["check_cache", "known_tokens", "room", "row_of_each"]


def known_tokens(tokens: Int[Array, "B T"], vocab_size: int) -> Bool[Array, "B T"]:
    """Which tokens are in the vocabulary.

    Raises:
        ValueError: not all of them, if their values are known.
    """
    checks.shape("tokens", tokens, ("batch", "length"))
    checks.dtype("tokens", tokens, jnp.integer)
    last = min(vocab_size - 1, jnp.iinfo(tokens.dtype).max)
    holds = (tokens >= 0) & (tokens <= last)
    values = known(holds)
    if values is not None and not values.all():
        first = np.asarray(tokens)[~values].reshape(-1)[0].item()
        wanted = f"from 0 to {vocab_size - 1}, in the vocabulary"
        checks.require("a token", first, False, wanted)
    return holds


def row_of_each(name: str, x: Any, tokens: Int[Array, "B T"]) -> Int[Array, "B T"] | None:
    """Positions or segment ids for each token, of [T], [1, T] or [B, T]; None stays."""
    if x is None:
        return None
    return jnp.broadcast_to(checks.rows(name, array_of(name, x), *tokens.shape), tokens.shape)


def check_cache(cache: Any, config: TransformerConfig, batch: int) -> None:
    """Checks that a cache is of this model, as far as its config tells.

    Raises:
        ValueError: it is not.
    """
    checks.instance("cache", cache, Cache, "what init_cache and the model return, or None")
    checks.shape("length of cache", cache.length, ())
    checks.dtype("length of cache", cache.length, jnp.integer)
    length = known(cache.length)
    checks.integer("length of cache", 0 if length is None else length.item(), low=0)
    layers, before = cache.layers, (config.layers,) if config.scan_layers else ()
    scanned = isinstance(layers, LayerState)
    holds = scanned == config.scan_layers and (scanned or len(layers) == config.layers)
    if not holds:
        found = "scanned layers" if scanned else f"{len(layers)} layers"
        wanted = "scanned layers" if config.scan_layers else f"{config.layers} layers"
        raise ValueError(f"cache has {found}; it must be of this model, with {wanted}.")
    wanted = (*before, batch, "room", config.key_heads, config.size_of_head)
    for layer in [layers] if scanned else layers:
        checks.instance("layer of cache", layer, LayerState)
        checks.shape("array of keys in cache", layer.attention.key, wanted)
        checks.dtype("array of keys in cache", layer.attention.key, (jnp.dtype(config.dtype),))


def room(cache: Cache, count: int) -> Bool[Array, "T"]:
    """For which of `count` more tokens the cache has room.

    Raises:
        ValueError: not for all, if the length of the cache is known.
    """
    layers = cache.layers if isinstance(cache.layers, LayerState) else cache.layers[0]
    size, length = layers.attention.key.shape[-3], known(cache.length)
    if count > size or (length is not None and length + count > size):
        before = "" if length is None else f" {length} tokens, and"
        raise ValueError(
            f"cache has{before} room for {size}, but tokens has {count} more; make a larger one "
            "with init_cache."
        )
    return cache.length + jnp.arange(count, dtype=jnp.int32) < size
