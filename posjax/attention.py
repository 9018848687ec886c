"""`posjax.dot_product_attention`: makes a problem of its arguments and has it solved."""

from collections.abc import Sequence
from typing import Any

import jax

from posjax.biases.base import Bias
from posjax.implementations import choose, note, reasons
from posjax.kernels.sharding import over_mesh
from posjax.problem import Problem
from posjax.types import Array, Bool, Float, Implementation, Int, Num, Window

__all__ = ["dot_product_attention", "explain"]


def dot_product_attention(
    query: Num[Array, "B T N H"],
    key: Num[Array, "B S K H"],
    value: Num[Array, "B S K E"],
    bias: Bias | Float[Array, "#B #N T S"] | None = None,
    mask: Bool[Array, "#B #N T S"] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_positions: Int[Array, "#B T"] | Int[Array, "T"] | None = None,
    key_positions: Int[Array, "#B S"] | Int[Array, "S"] | None = None,
    query_segment_ids: Int[Array, "#B T"] | None = None,
    key_segment_ids: Int[Array, "#B S"] | None = None,
    local_window_size: Window = None,
    implementation: Implementation | Sequence[Implementation] | None = None,
) -> Num[Array, "B T N E"]:
    """Scaled dot-product attention with a described bias.

        output_i = sum_j softmax_j(scale * q_i . k_j + bias_ij) v_j        over the j that i sees

    It is called like `jax.nn.dot_product_attention`, and drops in for it. A query that may attend
    to no key gives 0. Softmax, gates and counts are float32 whatever the inputs.

    Args:
        query: N heads of float32, bfloat16 or float16; key and value have K heads, and K divides N
            (query head n uses key head n // (N / K)). Values may have a head size E of their own.
        bias: a description (`ContextualBias`, `RelativeBias`, ...) or an array; added after
            scaling. All its floating-point arrays receive gradients.
        mask: True where the query may attend to the key.
        scale: a Python number; None means H ** -0.5.
        is_causal: keys at positions greater than the query's are not seen.
        query_positions: place of each query in its sequence, for `is_causal`, `local_window_size`
            and relative biases; 0 ... T - 1 by default. Give offsets here when decoding. Keys must
            be stored in order of position; a contextual bias counts in storage order.
        query_segment_ids: tokens see only tokens of the same id (packed sequences). With T == S,
            `key_segment_ids` defaults to the same array.
        local_window_size: (left, right), or one number for both: keys farther from the query are
            not seen.
        implementation: "reference" (dense, float32 inside), "xla" (blockwise, O(T) memory, any
            backend), "jax" (`jax.nn.dot_product_attention`, without a bias and with at most
            `is_causal`), "tpu" (Pallas; float32 and bfloat16) or "gpu" (Pallas, Hopper; bfloat16
            and float16); the last two for no bias, a `ContextualBias`, each `RelativeBias` with
            `distance_only`, or their sum. Of several names the first that can is used. None
            chooses: "tpu" on TPUs for at least 128 queries if it can, then "jax", then "xla". With
            a `RelativeBias`, the Pallas kernels check positions at run time and fall back to "xla"
            unless consecutive tokens differ by one.

    Returns:
        [B, T, N, E] in query's dtype; E is the head size of value.

    Raises:
        ValueError: arguments that do not fit together, named with their values.
        NotImplementedError: a combination that the implementation cannot do, with what to use
            instead.

    >>> q = k = v = jax.numpy.ones((1, 4, 2, 8))
    >>> dot_product_attention(q, k, v, is_causal=True).shape
    (1, 4, 2, 8)
    """
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
        local_window_size=local_window_size,
    )
    chosen = choose(problem, implementation)
    note(chosen, problem)
    if not jax.sharding.get_abstract_mesh().axis_names:
        return chosen.run(problem)
    return over_mesh(chosen.run, problem, split=chosen.split)


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
