"""Checks of the tokens, rows, keys and variables that a model is given."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from posjax import checks
from posjax.forms import array_of, known
from posjax.types import Array, Bool, Int, PyTree

__all__ = ["check_params", "known_tokens", "random_key", "rows"]


def known_tokens(tokens: Int[Array, "B T"], vocab_size: int) -> Bool[Array, "B T"]:
    """Which tokens are in the vocabulary; all of them if their values are known."""
    checks.dtype("tokens", tokens, jnp.integer)
    last = min(vocab_size - 1, jnp.iinfo(tokens.dtype).max)
    holds = (tokens >= 0) & (tokens <= last)
    values = known(holds)
    if values is not None and not values.all():
        first = np.asarray(tokens)[~values].reshape(-1)[0].item()
        wanted = f"from 0 to {vocab_size - 1}, in the vocabulary"
        checks.require("a token", first, False, wanted)
    return holds


def rows(name: str, x: Any, batch: int, length: int) -> Int[Array, "B T"]:
    """An integer for each token of each row; [T] and [1, T] are the same in all rows."""
    return jnp.broadcast_to(checks.rows(name, array_of(name, x), batch, length), (batch, length))


def random_key(name: str, key: Any) -> Array:
    """A typed key of a typed or a raw one.

    >>> random_key("key", 1)
    Traceback (most recent call last):
    ValueError: key is 1; it must be one random key, such as jax.random.key(0).
    """
    wanted = "one random key, such as jax.random.key(0)"
    if getattr(key, "dtype", None) == np.uint32:
        try:
            key = jax.random.wrap_key_data(jnp.asarray(key))
        except TypeError as error:
            raise ValueError(f"{name} has shape {key.shape}; it must be {wanted}.") from error
    is_key = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    checks.require(name, key, is_key, wanted)
    if key.shape:
        raise ValueError(f"{name} has shape {key.shape}; it must be {wanted}.")
    return key


def check_params(variables: PyTree, wanted: PyTree) -> None:
    """The parameters in `variables` are those in `wanted`, of the same shapes.

    Args:
        variables: those given.
        wanted: those that `model.init` makes, or their shapes.
    """
    checks.instance("variables", variables, Mapping, "a dictionary, as model.init makes it")
    given, wanted = _by_path(variables), _by_path(wanted)
    for path, array in wanted.items():
        if path not in given:
            shape = f"an array {list(array.shape)}, as model.init makes it"
            checks.require(f"variables{path}", None, False, shape)
        checks.shape(f"variables{path}", given[path], tuple(array.shape))
    for path in given.keys() - wanted.keys():
        shape = getattr(given[path], "shape", None)
        raise ValueError(f"variables{path} has shape {shape}; it must be absent: model has none.")


def _by_path(variables: PyTree) -> dict[str, Any]:
    """The parameters by their path."""
    params = {"params": nn.unbox(unfreeze(variables).get("params", {}))}
    return {
        jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
