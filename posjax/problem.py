"""An attention call whose arguments have been checked; every implementation takes it as it is."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.axes import Lettered
from posjax.biases.base import Bias, as_bias
from posjax.masks import Mask, Tokens
from posjax.types import Array, Bool, Float, Int, Num, Window

__all__ = ["Problem"]

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem(Lettered):
    """Attention to compute: query, key, value, a description of the bias, the mask and the scale.

    A pytree. K divides N, and query head n uses key head n // (N / K). `Problem.of` checks
    everything once, and nothing that takes a problem checks it again.
    """

    query: Num[Array, "B T N H"]
    key: Num[Array, "B S K H"]
    value: Num[Array, "B S K E"]
    bias: Bias | None
    mask: Mask
    scale: float = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
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
    ) -> Self:
        """The problem of these arguments, which are those of `posjax.dot_product_attention`.

        Shapes and dtypes are enough for query, key and value (`jax.ShapeDtypeStruct`).

        Raises:
            ValueError: arguments that do not fit together, named with their values.
        """
        _check_arrays(query, key, value)
        is_causal = bool(checks.flag("is_causal", is_causal))
        if bias is not None:
            bias = as_bias(bias)
            bias.check(query, key, is_causal)
        if query_segment_ids is not None or key_segment_ids is not None:
            segments = _both_segments(query, key, query_segment_ids, key_segment_ids)
            query_segment_ids, key_segment_ids = segments
        mask = Mask(
            query=_tokens("query", query, query_positions, query_segment_ids),
            key=_tokens("key", key, key_positions, key_segment_ids),
            array=None if mask is None else _checked_mask(mask, query, key),
            is_causal=is_causal,
            window=None if local_window_size is None else _window(local_window_size),
            has_given_positions=query_positions is not None or key_positions is not None,
        )
        scale = query.shape[3] ** -0.5 if scale is None else _checked_scale(scale)
        return cls(query, key, value, bias, mask, scale)

    def with_own_heads(self, part: Int[Array, ""], parts: int) -> Self:
        """The problem of one of `parts` parts of the heads, if its arrays have been split."""
        if self.bias is None:
            return self
        return dataclasses.replace(self, bias=self.bias.own_heads(part, parts))


def _check_arrays(query: Array, key: Array, value: Array) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.shape(name, x, ("batch", "length", "heads", "head size"), empty=False)
        checks.dtype(name, x, _DTYPES)
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
                f"key has {what} {key.shape[axis]}, but query has {query.shape[axis]}; they must "
                "be equal."
            )
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"key has {key.shape[2]} heads, which does not divide query's {query.shape[2]}."
        )


def _tokens(name: str, x: Array, positions: Array | None, segment_ids: Array | None) -> Tokens:
    batch, length = x.shape[:2]
    if positions is None:
        positions = jnp.arange(length, dtype=jnp.int32)[None]
    else:
        positions = checks.rows(f"{name}_positions", positions, batch, length)
    if segment_ids is not None:
        segment_ids = checks.rows(f"{name}_segment_ids", segment_ids, batch, length)
    return Tokens(positions, segment_ids)


def _both_segments(
    query: Array, key: Array, of_queries: Array | None, of_keys: Array | None
) -> tuple[Array, Array]:
    """Those of queries and of keys, which are the queries' if there are equally many."""
    if of_queries is None:
        raise ValueError("key_segment_ids is given without query_segment_ids; give both.")
    queries, keys = query.shape[1], key.shape[1]
    if of_keys is None and queries != keys:
        raise ValueError(
            "query_segment_ids is given without key_segment_ids, but there are "
            f"{queries} queries and {keys} keys; give both."
        )
    return of_queries, of_queries if of_keys is None else of_keys


def _checked_mask(mask: Array, query: Array, key: Array) -> Array:
    (batch, queries, heads, _), keys = query.shape, key.shape[1]
    checks.dtype("mask", mask, jnp.bool_)
    checks.shape("mask", mask, ((1, batch), (1, heads), queries, keys))
    return mask


def _window(window: Any) -> tuple[int, int]:
    pair = (window, window) if isinstance(window, int | np.integer) else window
    left, right = checks.integers("local_window_size", pair, count=2, low=0)
    return int(left), int(right)


def _checked_scale(scale: float) -> float:
    if isinstance(scale, jax.Array):
        raise ValueError("scale is an array; it must be a Python number (scale the query instead).")
    return float(checks.number("scale", scale))
