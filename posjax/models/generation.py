"""Decoding with a cache: one prefill of the prompt, then one token at a time."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.forms import known
from posjax.models.cache import Cache
from posjax.models.door import check_params, known_tokens, random_key
from posjax.models.transformer import Transformer
from posjax.types import Array, Float, Int, PyTree

__all__ = ["generate", "init_cache"]

# Stands for a token of a row whose logits are NaN.
_NO_TOKEN = -1
# Smaller temperatures are 0 in float32, greater ones infinite.
_COLDEST, _HOTTEST = np.finfo(np.float32).tiny.item(), np.finfo(np.float32).max.item()


def init_cache(model: Transformer, variables: PyTree, batch: int, length: int) -> Cache:
    """An empty cache with room for `length` tokens in each of `batch` rows.

    Raises:
        ValueError: batch or length < 1; variables without the parameters of `model`, or with more.
    """
    checks.instance("model", model, Transformer)
    checks.integer("batch", batch, low=1)
    checks.integer("length", length, low=1)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    check_params(variables, jax.eval_shape(model.init, jax.random.key(0), tokens))
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

    Returns:
        Tokens, int32. Inside `jax.jit`, which cannot raise, a row is -1 from the step on at which
        its greatest logit is NaN or infinite, as with a token of the prompt outside the vocabulary.

    Raises:
        ValueError: arguments of other types or shapes; steps < 1; an empty prompt, or tokens
            outside the vocabulary; a negative temperature, or sampling without a key; variables
            of another model; logits that are NaN or infinite.
        posjax.positions.LengthError: prompt and steps together are longer than a table of the
        encoding.
    """
    checks.shape("prompt", prompt, ("batch", "length"), empty=False)
    checks.dtype("prompt", prompt, jnp.integer)
    checks.integer("steps", steps, low=1)
    checks.number("temperature", temperature, low=0)
    is_number = temperature == 0 or _COLDEST <= temperature <= _HOTTEST
    wanted = f"0 or from {_COLDEST} to {_HOTTEST}, in float32"
    checks.require("temperature", temperature, is_number, wanted)
    wanted = "a random key, with a temperature above 0"
    checks.require("key", key, temperature == 0 or key is not None, wanted)
    checks.instance("model", model, Transformer)
    known_tokens(prompt, model.vocab_size)
    checks.instance("variables", variables, Mapping, "a dictionary, as model.init makes it")
    given = jax.random.key(0) if key is None else random_key("key", key)
    run = _compiled if _is_hashable(model) else _generated
    settings = model, int(steps), temperature > 0
    tokens = run(*settings, variables, prompt, np.float32(temperature), given)
    _refuse_missing(tokens)
    return tokens


def _refuse_missing(tokens: Int[Array, "B steps"]) -> None:
    """Raises if a row has no token, as far as that is known."""
    values = known(tokens)
    if values is not None and (values == _NO_TOKEN).any():
        row, step = np.argwhere(values == _NO_TOKEN)[0].tolist()
        raise ValueError(
            f"variables gives logits of NaN or infinity in row {row} at step {step}; it must give "
            "finite ones."
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
        greatest = jnp.max(last, axis=-1, keepdims=True)
        token = jnp.argmax(last, axis=-1)
        if samples:
            token = jax.random.categorical(key, (last - greatest) / temperature)
        token = jnp.where(jnp.isfinite(greatest[:, 0]), token.astype(jnp.int32), _NO_TOKEN)
        logits, cache = model.apply(variables, token[:, None], cache=cache)
        return (logits[:, -1], cache), token

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
