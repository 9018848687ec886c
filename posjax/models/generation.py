"""Decoding with a cache: one prefill of the prompt, then one token at a time."""

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.models.transformer import Cache, Transformer
from posjax.types import Array, Float, Int, PyTree

__all__ = ["generate", "init_cache"]


def init_cache(model: Transformer, variables: PyTree, batch: int, length: int) -> Cache:
    """An empty cache with room for `length` tokens in each of `batch` rows."""
    checks.integer("batch", batch, low=1)
    checks.integer("length", length, low=1)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    _, shapes = jax.eval_shape(lambda tokens: model.apply(variables, tokens, keep=True), tokens)
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

    Raises:
        ValueError: steps < 1, an empty prompt, a negative temperature, or sampling without a key.
        posjax.positions.LengthError: prompt and steps together are longer than a table of the
        encoding.
    """
    checks.shape("prompt", prompt, ("batch", "length"), empty=False)
    checks.dtype("prompt", prompt, jnp.integer)
    checks.integer("steps", steps, low=1)
    checks.number("temperature", temperature, low=0)
    wanted = "a random key, with a temperature above 0"
    checks.require("key", key, temperature == 0 or key is not None, wanted)
    given = jax.random.key(0) if key is None else key
    run = _compiled if _is_hashable(model) else _generated
    return run(model, steps, temperature > 0, variables, prompt, temperature, given)


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
        token = jnp.argmax(last, axis=-1)
        if samples:
            token = jax.random.categorical(key, last / temperature)
        logits, cache = model.apply(variables, token[:, None].astype(jnp.int32), cache=cache)
        return (logits[:, -1], cache), token.astype(jnp.int32)

    _, tokens = jax.lax.scan(step, (logits[:, -1], cache), jax.random.split(key, steps))
    return tokens.T


# Compiled once for equal models, shapes and numbers of steps.
_compiled = jax.jit(_generated, static_argnums=(0, 1, 2))


def _is_hashable(model: Transformer) -> bool:
    """Whether models can be compared, to find what was compiled before."""
    try:
        hash(model)
    except TypeError:
        return False
    return True
