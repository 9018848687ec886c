"""Decoding with a cache: one prefill of the prompt, then one token at a time."""

from collections.abc import Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze

from posjax import checks
from posjax.forms import known
from posjax.models.inputs import known_tokens
from posjax.models.transformer import Cache, Transformer
from posjax.types import Array, Float, Int, PyTree

__all__ = ["generate", "init_cache"]

# Stands for a token where there is none to choose.
_NONE = -1
# Smaller temperatures are 0 in float32, greater ones infinite.
_COLDEST, _HOTTEST = np.finfo(np.float32).tiny.item(), np.finfo(np.float32).max.item()


def init_cache(model: Transformer, variables: PyTree, batch: int, length: int) -> Cache:
    """An empty cache with room for `length` tokens in each of `batch` rows.

    Raises:
        ValueError: no model, variables of another one, or sizes below 1.
    """
    _check_model(model, variables)
    checks.integer("batch", batch, low=1, reasonable=checks.LARGEST)
    checks.integer("length", length, low=1, reasonable=checks.LONGEST)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    try:
        shapes = jax.eval_shape(lambda x: model.apply(variables, x, keep=True), tokens)[1]
    except flax.errors.FlaxError as error:
        raise ValueError(f"variables must be those of the model: {error}") from error
    _refuse_others(variables, jax.eval_shape(model.init, jax.random.key(0), tokens))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def generate(
    model: Transformer,
    variables: PyTree,
    prompt: Int[Array, "B T"],
    steps: int,
    *,
    temperature: float = 0.0,
    key: Array | None = None,
) -> Int[Array, "B steps"]:
    """Continues each row of `prompt` by `steps` tokens; compiled once for equal shapes and steps.

    Args:
        variables: as given to `model.apply`.
        temperature: 0 chooses the most likely token; above 0 samples from softmax(logits /
            temperature).
        key: random key for sampling.

    Returns:
        Tokens. In a function that is being compiled, and so cannot raise, tokens are -1 from where
        the logits of a row are not numbers, or the greatest is infinite.

    Raises:
        ValueError: steps < 1, an empty prompt, tokens outside the vocabulary, a negative
            temperature, sampling without a key, variables of another model, or logits that are not
            numbers.
        posjax.positions.LengthError: prompt and steps together are longer than a table of the
        encoding.
    """
    checks.shape("prompt", prompt, ("batch", "length"), empty=False)
    checks.dtype("prompt", prompt, jnp.integer)
    checks.integer("steps", steps, low=1, reasonable=checks.LARGEST)
    checks.number("temperature", temperature, low=0)
    is_normal = temperature == 0 or _COLDEST <= temperature <= _HOTTEST
    wanted = f"0 or from {_COLDEST} to {_HOTTEST}, in float32"
    checks.require("temperature", temperature, is_normal, wanted)
    wanted = "a random key, with a temperature above 0"
    checks.require("key", key, temperature == 0 or key is not None, wanted)
    given = jax.random.key(0) if key is None else checks.key("key", key)
    _check_model(model, variables)
    known_tokens(prompt, model.vocab_size)
    run = _compiled if _is_hashable(model) else _generated
    settings = model, int(steps), temperature > 0
    tokens = run(*settings, variables, prompt, np.float32(temperature), given)
    _check_tokens(tokens)
    return tokens


def _check_model(model: Any, variables: Any) -> None:
    checks.instance("model", model, Transformer)
    checks.instance("variables", variables, Mapping, "the variables of the model, a dictionary")


def _refuse_others(variables: PyTree, wanted: PyTree) -> None:
    """Raises ValueError for parameters that the model does not have, such as of more layers."""
    given, wanted = (_params_by_path(tree) for tree in (variables, wanted))
    for path in given.keys() - wanted.keys():
        shape = getattr(given[path], "shape", None)
        raise ValueError(
            f"variables{path} has shape {shape}; it must be absent, as the model has no such."
        )


def _params_by_path(variables: PyTree) -> dict[str, Any]:
    params = {"params": nn.unbox(unfreeze(variables).get("params", {}))}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _check_tokens(tokens: Int[Array, "B steps"]) -> None:
    """Raises ValueError if the model gave no logits to choose from, if that is known."""
    values = known(tokens)
    if values is None or not (values == _NONE).any():
        return
    row, step = np.argwhere(values == _NONE)[0].tolist()
    raise ValueError(
        f"the model's logits are not numbers in row {row} at step {step}, or are infinite; "
        "variables must be such that they are finite."
    )


def _generated(
    model: Transformer,
    steps: int,
    samples: bool,
    variables: PyTree,
    prompt: Int[Array, "B T"],
    temperature: Float[Array, ""],
    key: Array,
) -> Int[Array, "B steps"]:
    batch, length = prompt.shape
    cache = init_cache(model, variables, batch, length + steps)
    logits, cache = model.apply(variables, prompt, cache=cache)

    def step(state, key):
        last, cache = state
        token = _chosen(last, temperature, key if samples else None)
        logits, cache = model.apply(variables, token[:, None], cache=cache)
        return (logits[:, -1], cache), token

    _, tokens = jax.lax.scan(step, (logits[:, -1], cache), jax.random.split(key, steps))
    return tokens.T


def _chosen(
    logits: Float[Array, "B V"], temperature: Float[Array, ""], key: Array | None
) -> Int[Array, "B"]:
    """The most likely token, or one drawn with a key."""
    greatest = jnp.max(logits, axis=-1, keepdims=True)
    token = jnp.argmax(logits, axis=-1)
    if key is not None:
        # Low temperatures make differences infinite, but not that of the greatest logit.
        token = jax.random.categorical(key, (logits - greatest) / temperature)
    is_right = jnp.isfinite(greatest[:, 0])
    return jnp.where(is_right, token.astype(jnp.int32), _NONE)


# Compiled once for equal models, shapes and numbers of steps.
_compiled = jax.jit(_generated, static_argnums=(0, 1, 2))


def _is_hashable(model: Transformer) -> bool:
    """Whether models can be compared, to find what was compiled before."""
    try:
        hash(model)
    except TypeError:
        return False
    return True
