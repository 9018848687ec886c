"""Attention alignment: the temperature at which long sequences are attended as sharply as short.

Longer sequences spread attention thinner. Both functions compare logits sampled at the trained
length with logits sampled at a greater one, and find the tau for `posjax.encodings.Temperature`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.types import Array, Bool, Float

__all__ = ["align_entropy", "align_max_probability", "attention_entropy", "max_probability"]

# log tau is searched between -BOUND and BOUND, and halved so many times.
_BOUND = 7.0
_STEPS = 40


@checks.arguments()
def max_probability(
    logits: Float[Array, "*L T S"],
    temperature: Float[Array, ""] | float = 1.0,
    mask: Bool[Array, "*#L #T S"] | None = None,
) -> Float[Array, ""]:
    """The largest weight of softmax(logits / temperature), averaged over all rows.

    Args:
        mask: True if the query may attend; rows that see nothing do not count.

    >>> max_probability(jnp.zeros((1, 2, 4))).item()
    0.25
    """
    log_weights, counts = _log_weights(logits, temperature, mask)
    return _mean(jnp.exp(jnp.max(log_weights, axis=-1)), counts)


@checks.arguments()
def attention_entropy(
    logits: Float[Array, "*L T S"],
    temperature: Float[Array, ""] | float = 1.0,
    mask: Bool[Array, "*#L #T S"] | None = None,
) -> Float[Array, ""]:
    """The entropy -sum_j w_j ln w_j of softmax(logits / temperature), averaged over all rows.

    Args:
        mask: True if the query may attend; rows that see nothing do not count.

    >>> round(attention_entropy(jnp.zeros((1, 2, 4))).item(), 4)
    1.3863
    """
    log_weights, counts = _log_weights(logits, temperature, mask)
    weights = jnp.exp(log_weights)
    # 0 * -inf is 0 here.
    terms = jnp.where(weights == 0, 0.0, weights * jnp.where(weights == 0, 0.0, log_weights))
    return _mean(-jnp.sum(terms, axis=-1), counts)


@checks.arguments()
def align_max_probability(
    trained: Float[Array, "*L T S"],
    target: Float[Array, "*M U V"],
    trained_mask: Bool[Array, "*#L #T S"] | None = None,
    target_mask: Bool[Array, "*#M #U V"] | None = None,
) -> Float[Array, ""]:
    """The tau at which `max_probability` of target logits is that of the trained ones.

        max_probability(target, tau) = max_probability(trained, 1)

    Found by bisection; if no tau between e^-7 and e^7 does it, the nearer of these.

    Args:
        trained: logits of attention, biases included, at the trained length. Axes before the last
            two (samples, layers, heads) are averaged over; pass those of one head, or of all.
        target: likewise at the length to be used.
        trained_mask: True if the query may attend.
        target_mask: likewise.

    Returns:
        float32; 1 for equal logits. `Temperature(encoding, temperature=float(tau))` uses it.

    References:
        Chi, Fan, Rudnicky, Attention Alignment and Flexible Positional Embeddings Improve
        Transformer Length Extrapolation, arXiv:2311.00684.

    >>> logits = jnp.array([[[1.0, 3.0, 2.0]]])
    >>> round(align_max_probability(logits, 2 * logits).item(), 4)
    2.0
    """
    return _align(max_probability, -1.0, trained, target, trained_mask, target_mask)


@checks.arguments()
def align_entropy(
    trained: Float[Array, "*L T S"],
    target: Float[Array, "*M U V"],
    trained_mask: Bool[Array, "*#L #T S"] | None = None,
    target_mask: Bool[Array, "*#M #U V"] | None = None,
) -> Float[Array, ""]:
    """The tau at which `attention_entropy` of target logits is that of the trained ones.

        attention_entropy(target, tau) = attention_entropy(trained, 1)

    Arguments, result and reference are those of `align_max_probability`.

    >>> logits = jnp.array([[[1.0, 3.0, 2.0]]])
    >>> round(align_entropy(logits, 2 * logits).item(), 4)
    2.0
    """
    return _align(attention_entropy, 1.0, trained, target, trained_mask, target_mask)


def _align(
    statistic: Callable[..., Array],
    sign: float,
    trained: Array,
    target: Array,
    trained_mask: Array | None,
    target_mask: Array | None,
) -> Float[Array, ""]:
    """Bisection in log tau for a statistic that rises with tau (sign 1) or falls (sign -1)."""
    wanted = statistic(trained, 1.0, trained_mask)

    def halve(_, interval):
        low, high = interval
        middle = (low + high) / 2
        too_high = sign * (statistic(target, jnp.exp(middle), target_mask) - wanted) > 0
        return jnp.where(too_high, low, middle), jnp.where(too_high, middle, high)

    start = jnp.float32(-_BOUND), jnp.float32(_BOUND)
    low, high = jax.lax.fori_loop(0, _STEPS, halve, start)
    is_known = ~jnp.isnan(wanted) & ~jnp.isnan(statistic(target, 1.0, target_mask))
    return jnp.where(is_known, jnp.exp((low + high) / 2), jnp.nan)


def _log_weights(logits: Array, temperature: Array | float, mask: Array | None):
    """Log of the weights, and which rows see any key."""
    if not isinstance(temperature, jax.Array):
        checks.number("temperature", temperature, above=0)
    logits = logits.astype(jnp.float32) / temperature
    if mask is None:
        return jax.nn.log_softmax(logits, axis=-1), jnp.ones(logits.shape[:-1], bool)
    mask = jnp.broadcast_to(mask, logits.shape)
    return jax.nn.log_softmax(logits, axis=-1, where=mask), jnp.any(mask, axis=-1)


def _mean(values: Array, counts: Bool[Array, "*L T"]) -> Float[Array, ""]:
    return jnp.sum(jnp.where(counts, values, 0.0)) / jnp.sum(counts, dtype=jnp.float32)
