"""`posjax.dot_product_attention`: checks its arguments and chooses an implementation."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax.biases.base import Bias, as_bias
from posjax.choice import choose, note, on_device
from posjax.kernels import blocks, blockwise, reference, sharding
from posjax.kernels.gpu.support import unsupported as gpu_unsupported
from posjax.kernels.tpu import attention as tpu
from posjax.masks import Mask, Side
from posjax.types import Array, Bool, Float, Implementation, Int, Num, Window

__all__ = ["dot_product_attention", "explain"]

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


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
    implementation: Implementation | None = None,
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
            and relative biases; 0 ... T - 1 by default. Give offsets here when decoding. Keys stand
            in memory in the order of their positions (a contextual bias counts in that order).
        query_segment_ids: tokens see only tokens of the same id (packed sequences). With T == S,
            `key_segment_ids` defaults to the same array.
        local_window_size: (left, right), or one number for both: keys farther from the query are
            not seen.
        implementation: "reference" (dense, float32 inside), "xla" (blockwise, O(T) memory, any
            backend), "tpu" (Pallas; float32 and bfloat16), "gpu" (Pallas, Hopper; bfloat16 and
            float16); the last two for no bias, a `ContextualBias`, each `RelativeBias` with
            `distance_only`, or their sum. None chooses: on TPUs "tpu" where it can and there are at
            least 128 queries; elsewhere, without bias and with at most `is_causal`,
            `jax.nn.dot_product_attention`; else "xla". With a `RelativeBias` the Pallas kernels
            look at the positions when they run, and are "xla" where they do not rise by one.

    Returns:
        [B, T, N, E] in query's dtype; E is the head size of value.

    Raises:
        ValueError: arguments that do not fit together, named with their values.
        NotImplementedError: a combination that the implementation cannot do, with what to use
            instead.

    >>> q = k = v = jnp.ones((1, 4, 2, 8))
    >>> dot_product_attention(q, k, v, is_causal=True).shape
    (1, 4, 2, 8)
    """
    call = _checked(
        query, key, value, bias, mask, scale, is_causal, query_positions, key_positions,
        query_segment_ids, key_segment_ids, local_window_size,
    )  # fmt: skip
    chosen = choose(implementation, _reasons(call))
    note(chosen)
    query, key, value, bias, mask, scale = call
    if chosen == "jax":
        return jax.nn.dot_product_attention(query, key, value, scale=scale, is_causal=is_causal)
    if chosen == "reference":
        return reference.attention(query, key, value, bias, mask, scale=scale)
    run = functools.partial(_kernel(chosen, query, key), scale=scale)
    opaque = chosen in ("tpu", "gpu")
    return sharding.over_mesh(run, query, key, value, bias, mask, opaque=opaque)


def explain(*arguments: Any, **settings: Any) -> str:
    """Which implementation `dot_product_attention` takes for these arguments, and why no other.

    Args:
        arguments: as those of `dot_product_attention`; shapes and dtypes are enough for query, key
            and value (`jax.ShapeDtypeStruct`).
        settings: likewise.

    Returns:
        Lines of text; the first one names the implementation.

    Raises:
        What `dot_product_attention` raises.

    >>> q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    >>> print(explain(q, q, q, local_window_size=7).splitlines()[0])
    xla
    """
    given = inspect.signature(dot_product_attention).bind(*arguments, **settings)
    given.apply_defaults()
    implementation = given.arguments.pop("implementation")
    call = _checked(**given.arguments)
    reasons = _reasons(call)
    chosen = choose(implementation, reasons)
    others = [f"not {name}: {why}" for name, why in reasons.items() if why and name != chosen]
    return "\n".join([chosen, *others])


class _Call(NamedTuple):
    """Arguments that were found right."""

    query: Array
    key: Array
    value: Array
    bias: Bias | None
    mask: Mask
    scale: float


def _checked(
    query, key, value, bias, mask, scale, is_causal, query_positions, key_positions,
    query_segment_ids, key_segment_ids, local_window_size,
) -> _Call:  # fmt: skip
    _check_arrays(query, key, value)
    bias = as_bias(bias)
    if bias is not None:
        bias.check(query, key, is_causal)
    batch, length, keys = query.shape[0], query.shape[1], key.shape[1]
    key_segment_ids = _key_segments(query_segment_ids, key_segment_ids, length, keys)
    mask = Mask(
        query=_side("query", batch, length, query_positions, query_segment_ids),
        key=_side("key", batch, keys, key_positions, key_segment_ids),
        array=_checked_mask(mask, query, key),
        is_causal=is_causal,
        window=_window(local_window_size),
        placed=query_positions is not None or key_positions is not None,
    )
    return _Call(query, key, value, bias, mask, _checked_scale(scale, query.shape[3]))


def _reasons(call: _Call) -> dict[str, str | None]:
    """Why each implementation is not taken by itself; None for those that could be."""
    query, _, value, bias, mask, _ = call
    return {
        "tpu": tpu.unsupported(query, bias, mask) or on_device("tpu", query.shape[1]),
        "gpu": gpu_unsupported(query, value, bias, mask) or on_device("gpu", query.shape[1]),
        "jax": _not_plain(call),
        "xla": None,
        "reference": "it is dense, for tests",
    }


def _not_plain(call: _Call) -> str | None:
    """Why `jax.nn.dot_product_attention` is not the same."""
    mask = call.mask
    if call.bias is not None:
        return f"{type(call.bias).__name__} is not for jax.nn.dot_product_attention"
    if call.key.shape != call.value.shape:
        return f"values have a size of their own, {call.value.shape[3]}"
    if mask.placed or not _only_causal(mask, call.query.shape[1] == call.key.shape[1]):
        return "there is more than is_causal, on equal lengths, that restricts attention"
    return None


def _kernel(name: str, query: Array, key: Array) -> Callable[..., Array]:
    if name == "tpu":
        return tpu.attention
    if name == "gpu":
        # Its compiler takes a while to import.
        from posjax.kernels.gpu.attention import attention

        return attention
    sizes = blocks.blockwise_sizes(query.shape[1], key.shape[1])
    return functools.partial(blockwise.attention, blocks=sizes)


def _only_causal(mask: Mask, square: bool) -> bool:
    """Whether at most `is_causal`, on equally long queries and keys, restricts attention."""
    restricted = (mask.array, mask.query.segment_ids, mask.window)
    return all(part is None for part in restricted) and (square or not mask.is_causal)


def _check_arrays(query: Array, key: Array, value: Array) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} has shape {x.shape}; it must be [batch, length, heads, head size], "
                "none of them 0."
            )
        if x.dtype not in _DTYPES:
            raise ValueError(
                f"{name} has dtype {x.dtype}; it must be float32, bfloat16 or float16."
            )
        if x.dtype != query.dtype:
            raise ValueError(
                f"{name} has dtype {x.dtype}, but query has {query.dtype}; they must be equal."
            )
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key has shape {key.shape}, but value has {value.shape}; they must have equal batch "
            "sizes, lengths and heads."
        )
    for axis, what in ((0, "batch size"), (3, "head size")):
        if key.shape[axis] != query.shape[axis]:
            raise ValueError(
                f"key has {what} {key.shape[axis]}, but query has {query.shape[axis]}."
            )
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"key has {key.shape[2]} heads, which does not divide query's {query.shape[2]}."
        )


def _side(
    name: str, batch: int, length: int, positions: Array | None, segment_ids: Array | None
) -> Side:
    if positions is None:
        positions = jnp.arange(length, dtype=jnp.int32)
    positions = _checked_row(f"{name}_positions", positions, batch, length)
    if segment_ids is not None:
        segment_ids = _checked_row(f"{name}_segment_ids", segment_ids, batch, length)
    return Side(positions, segment_ids)


def _checked_row(name: str, x: Array, batch: int, length: int) -> Array:
    x = jnp.asarray(x)
    x = x[None] if x.ndim == 1 else x
    if x.ndim != 2 or x.shape[0] not in (1, batch) or x.shape[1] != length:
        raise ValueError(
            f"{name} has shape {x.shape}; it must be ({length},) or ({batch}, {length})."
        )
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {x.dtype}; it must be an integer array.")
    return x


def _key_segments(query: Array | None, key: Array | None, queries: int, keys: int) -> Array | None:
    if query is None and key is not None:
        raise ValueError("key_segment_ids is given without query_segment_ids; give both.")
    if query is not None and key is None:
        if queries != keys:
            raise ValueError(
                "query_segment_ids is given without key_segment_ids, but there are "
                f"{queries} queries and {keys} keys."
            )
        return query
    return key


def _checked_mask(mask: Array | None, query: Array, key: Array) -> Array | None:
    if mask is None:
        return None
    if mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask has dtype {mask.dtype}; it must be boolean, True where attention is allowed."
        )
    want = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    fits = (
        mask.ndim == 4
        and mask.shape[2:] == want[2:]
        and all(m in (1, w) for m, w in zip(mask.shape, want, strict=True))
    )
    if not fits:
        raise ValueError(
            f"mask has shape {mask.shape}; it must be [B or 1, N or 1, T, S] = {want}."
        )
    return mask


def _window(window: Window) -> tuple[int, int] | None:
    if window is None:
        return None
    left, right = (window, window) if isinstance(window, int) else window
    if left < 0 or right < 0:
        raise ValueError(f"local_window_size is {window}; both sides must be 0 or more.")
    return int(left), int(right)


def _checked_scale(scale: float | None, size: int) -> float:
    if scale is None:
        return size**-0.5
    if isinstance(scale, jax.Array):
        raise ValueError(
            "scale is an array; it must be a Python number. Scale the query for anything else."
        )
    return float(scale)
