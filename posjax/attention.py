"""`posjax.dot_product_attention`: makes a problem of its arguments and has it solved."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from posjax.biases.base import Bias
from posjax.implementations import choose, note, reasons
from posjax.kernels.common import Attended
from posjax.kernels.sharding import over_mesh
from posjax.precision import wide, wide_type
from posjax.problem import Problem
from posjax.types import Array, Bool, Float, Implementation, Int, Num, Window

__all__ = ["dot_product_attention", "explain"]


def dot_product_attention(
    query: Num[Array, "*B T N H"],
    key: Num[Array, "*B S K H"],
    value: Num[Array, "*B S K E"],
    bias: Bias | Float[Array, "*#B #N #T #S"] | None = None,
    mask: Bool[Array, "*#B #N #T #S"] | None = None,
    *,
    scale: float | Float[Array, ""] | None = None,
    is_causal: bool = False,
    query_positions: Int[Array, "#B T"] | Int[Array, "T"] | None = None,
    key_positions: Int[Array, "#B S"] | Int[Array, "S"] | None = None,
    query_segment_ids: Int[Array, "#B T"] | Int[Array, "T"] | None = None,
    key_segment_ids: Int[Array, "#B S"] | Int[Array, "S"] | None = None,
    query_seq_lengths: Int[Array, "B"] | None = None,
    key_value_seq_lengths: Int[Array, "B"] | None = None,
    local_window_size: Window = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = True,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    return_residual: bool = False,
    implementation: Implementation | Sequence[Implementation] | None = None,
) -> Num[Array, "*B T N E"]:
    """Scaled dot-product attention with a described bias.

        output_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j        over the j that i sees

    It is called like `jax.nn.dot_product_attention` and like the attention functions of Flax, and
    drops in for them. A query without any weight (it sees no key, or all its logits are -inf) gives
    0. Softmax, gates and counts are float32 whatever the inputs, or float64 for float64.

    Args:
        query: N heads of float32, bfloat16 or float16, or float64 in "reference" and "xla"; key and
            value have K heads, and K divides N (query head n uses key head n // (N / K)). Values
            may have a head size E of their own. There may be any number of batch axes, also none.
        bias: a description (`ContextualBias`, `RelativeBias`, ...), whose arrays have one batch
            axis, or an array that broadcasts to [*B, N, T, S]; added after scaling. All its
            floating-point arrays receive gradients.
        mask: True, or 1, if the query may attend to the key; it broadcasts to [*B, N, T, S].
        scale: None means H ** -0.5; an array (a scalar) receives a gradient.
        is_causal: keys at positions greater than the query's are not seen.
        query_positions: place of each query in its sequence, for `is_causal`, `local_window_size`
            and relative biases; 0 ... T - 1 by default. Give offsets here when decoding. Keys must
            be stored in order of position; a contextual bias counts in storage order.
        query_segment_ids: tokens see only tokens of the same id (packed sequences). With T == S,
            `key_segment_ids` defaults to the same array.
        query_seq_lengths: number of real queries of each sequence; those behind give 0.
        key_value_seq_lengths: number of real keys of each sequence; nothing sees those behind.
        local_window_size: (left, right), or one number for both: keys farther from the query are
            not seen.
        logits_soft_cap: scaled products are limited to cap * tanh(product / cap) before the bias is
            added, as in Gemma 2 (arXiv:2408.00118) and flash-attention.
        sinks: a logit for each query head that takes part in the softmax and has no value, as in
            gpt-oss (arXiv:2508.10925).
        dropout_rng: a random key; see `posjax.dropout.Dropout` for what is dropped.
        dropout_rate: probability with which a weight is dropped, in "reference" and "xla".
        broadcast_dropout: whether all sequences and heads drop the same pairs.
        deterministic: whether nothing is dropped.
        dtype: query, key and value are converted to it.
        precision: any of `jax.lax.Precision`; products are never less precise than it asks.
        module: a Flax module, to whose "intermediates" the weights before dropout are sown as
            "attention_weights", [*B, N, T, S]; only by "reference", which is then chosen.
        return_residual: whether to return the log-sum-exp of the logits, too; with gradients.
        implementation: "reference" (dense, float32 inside), "xla" (blockwise, O(T) memory, any
            backend), "jax" (`jax.nn.dot_product_attention`, without a bias and with at most
            `is_causal`), "cudnn" (the same by cuDNN), "tpu" (Pallas; float32 and bfloat16) or "gpu"
            (Pallas, Hopper; bfloat16 and float16); the last two for no bias, a `ContextualBias`,
            each `RelativeBias` with `distance_only`, or their sum. Of several names the first that
            can is used. None chooses: "tpu" on TPUs for at least 128 queries if it can, then
            "cudnn" on GPUs, then "jax" for few pairs, then "xla". With a `RelativeBias`, the Pallas
            kernels check positions at run time and fall back to "xla" unless consecutive tokens
            differ by one.

    Returns:
        [*B, T, N, E] in query's dtype; E is the head size of value. With `return_residual` a tuple
        of it and the log-sum-exp, [*B, T, N] in float32, with the sinks in it; -inf without any
        weight.

    Raises:
        ValueError: arguments that do not fit together, named with their values.
        NotImplementedError: a combination that the implementation cannot do, with what to use
            instead; docs/implementations.md has them all.

    >>> q = k = v = jax.numpy.ones((1, 4, 2, 8))
    >>> dot_product_attention(q, k, v, is_causal=True).shape
    (1, 4, 2, 8)
    """
    batch = jnp.shape(query)[:-3]
    problem = Problem.of(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        broadcast_dropout=broadcast_dropout,
        deterministic=deterministic,
        dtype=dtype,
        precision=precision,
        module=module,
        return_residual=return_residual,
    )
    result = _solved(problem, implementation)
    if module is not None:
        weights = result.weights
        _sow(module, weights.reshape(*batch, *weights.shape[1:]))
    output = result.output.reshape(*batch, *result.output.shape[1:])
    if not return_residual:
        return output
    return output, result.log_sum_exp.reshape(output.shape[:-1])


def _solved(problem: Problem, implementation: Any) -> Attended:
    """The result of the implementation, with the sinks."""
    chosen = choose(problem, implementation)
    note(chosen, problem)
    if problem.is_empty:
        result = _nothing(problem)
    elif jax.sharding.get_abstract_mesh().axis_names:
        result = over_mesh(chosen, problem)
    else:
        result = chosen.run(problem)
    return result if problem.sinks is None else _with_sinks(result, problem.sinks)


def _nothing(problem: Problem) -> Attended:
    """The result without sequences, queries or keys."""
    (batch, queries, heads, _), (_, keys, _, size) = problem.query.shape, problem.value.shape
    return Attended(
        jnp.zeros((batch, queries, heads, size), problem.query.dtype),
        jnp.full((batch, queries, heads), -jnp.inf, wide_type(problem.query.dtype)),
        jnp.zeros((batch, heads, queries, keys), problem.query.dtype),
    )


def _with_sinks(result: Attended, sinks: Float[Array, "N"]) -> Attended:
    """The result if each head has one more logit, whose value is 0."""
    without, sinks = result.log_sum_exp, sinks[None, None]
    # Without any weight, also if a sink is -inf.
    difference = jnp.where(without == -jnp.inf, -jnp.inf, without - sinks)
    of_keys = jax.nn.sigmoid(difference)[..., None]
    scaled = lambda x, factors: (wide(x) * factors).astype(x.dtype)  # noqa: E731
    return Attended(
        scaled(result.output, of_keys),
        jnp.logaddexp(without, sinks),
        None if result.weights is None else scaled(result.weights, jnp.swapaxes(of_keys, 1, 2)),
    )


def _sow(module: Any, weights: Float[Array, "*B N T S"]) -> None:
    """Stores the weights as Flax's attention does."""
    from flax import nnx

    where = nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates"
    module.sow(where, "attention_weights", weights)


def explain(
    *arguments: Any,
    implementation: Implementation | Sequence[Implementation] | None = None,
    **settings: Any,
) -> str:
    """Which implementation `dot_product_attention` uses for these arguments, and why no other.

    Args:
        arguments: as those of `dot_product_attention`; shapes and dtypes are enough for query, key
            and value (`jax.ShapeDtypeStruct`).
        settings: likewise.

    Returns:
        Lines of text; the first one names the implementation.

    Raises:
        ValueError: as `dot_product_attention`.
        NotImplementedError: as `dot_product_attention`.

    >>> q = jax.ShapeDtypeStruct((1, 256, 2, 64), jax.numpy.bfloat16)
    >>> print(explain(q, q, q, local_window_size=7).splitlines()[0])
    xla
    """
    problem = Problem.of(*arguments, **settings)
    chosen = choose(problem, implementation)
    others = {name: why for name, why in reasons(problem).items() if name != chosen.name}
    why_not = [f"not {name}: {why}" for name, why in others.items() if why is not None]
    return "\n".join([chosen.label(problem), *why_not])
