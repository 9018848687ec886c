"""Attention as its formula with all arguments, in NumPy's float64 or in jax.numpy for gradients."""

from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["attention", "visible"]


def attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    *,
    allowed: Any = True,
    scale: Any = None,
    logits_soft_cap: float | None = None,
    sinks: Any = None,
    xp: ModuleType = np,
) -> tuple[Any, Any]:
    """The output and the log-sum-exp; a query without any weight gives 0 and -inf.

    Args:
        query: [*B, T, N, H]; key and value may have fewer heads.
        bias: broadcasts to [*B, N, T, S].
        allowed: likewise; `visible` makes it.
        xp: `numpy`, which computes in float64, or `jax.numpy` in query's type.
    """
    dtype = np.float64 if xp is np else query.dtype
    query, key, value = (xp.asarray(x).astype(dtype) for x in (query, key, value))
    groups = query.shape[-2] // key.shape[-2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = (xp.repeat(x, groups, axis=-2) for x in (key, value))
    logits = scale * xp.einsum("...tnh,...snh->...nts", query, key)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * xp.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits = logits + xp.broadcast_to(xp.asarray(bias).astype(dtype), logits.shape)
    logits = xp.where(xp.broadcast_to(xp.asarray(allowed), logits.shape), logits, -np.inf)
    columns = logits
    if sinks is not None:
        sink = xp.asarray(sinks).astype(dtype)[:, None, None]
        columns = xp.concatenate([logits, xp.broadcast_to(sink, (*logits.shape[:-1], 1))], axis=-1)
    top = xp.max(columns, axis=-1, keepdims=True)
    top = xp.where(top == -np.inf, 0.0, top)
    total = xp.sum(xp.exp(columns - top), axis=-1, keepdims=True)
    safe = xp.where(total == 0, 1.0, total)
    output = xp.einsum("...nts,...snh->...tnh", xp.exp(logits - top) / safe, value)
    log_sum_exp = xp.where(total == 0, -np.inf, top + xp.log(safe))[..., 0]
    return output, xp.swapaxes(log_sum_exp, -1, -2)


def visible(
    queries: int,
    keys: int,
    *,
    mask: Any = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    query_positions: Any = None,
    key_positions: Any = None,
    segments: tuple[Any, Any] | None = None,
    lengths: tuple[Any, Any] = (None, None),
) -> np.ndarray:
    """Which pairs may attend, as an array that broadcasts to [*B, N, T, S].

    Args:
        segments: ids of queries and of keys, [B, T] and [B, S].
        lengths: numbers of real queries and keys of each sequence, [*B].
    """
    rows, columns = np.arange(queries), np.arange(keys)
    here = rows if query_positions is None else np.asarray(query_positions)
    there = columns if key_positions is None else np.asarray(key_positions)
    distance = here[..., None, :, None] - there[..., None, None, :]
    allowed = np.ones((1, queries, keys), bool)
    if mask is not None:
        allowed = allowed & np.asarray(mask).astype(bool)
    if is_causal:
        allowed = allowed & (distance >= 0)
    if window is not None:
        allowed = allowed & (distance <= window[0]) & (distance >= -window[1])
    if segments is not None:
        of_queries, of_keys = (np.asarray(x) for x in segments)
        allowed = allowed & (of_queries[..., None, :, None] == of_keys[..., None, None, :])
    of_queries, of_keys = lengths
    if of_queries is not None:
        allowed = allowed & (rows < np.asarray(of_queries)[..., None])[..., None, :, None]
    if of_keys is not None:
        allowed = allowed & (columns < np.asarray(of_keys)[..., None])[..., None, None, :]
    return allowed
