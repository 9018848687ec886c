"""An attention call whose arguments have been checked; every implementation takes it as it is."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from posjax import checks, forms
from posjax.axes import Lettered
from posjax.biases.base import Bias, as_bias, check_fields
from posjax.dropout import Dropout
from posjax.forms import Shape
from posjax.masks import Mask, Tokens
from posjax.precision import wide
from posjax.types import Array, Bool, Float, Int, Num, Shaped, Window

__all__ = ["Problem"]

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem(Lettered):
    """Attention to compute: query, key, value, a description of the bias, the mask and the scale.

    A pytree. K divides N, and query head n uses key head n // (N / K). `Problem.of` checks
    everything once, and nothing that takes a problem checks it again.

    Args:
        known_scale: the scale, if it is known when the code is compiled.
        traced_scale: the scale otherwise.
        soft_cap: limits logits, before the bias; None: no limit.
        dropout: of weights; None: none.
        sinks: a logit for each query head that takes weight and gives nothing. The door applies it
            to what an implementation computes without.
        returns_log_sum_exp: whether the caller wants it.
        returns_weights: whether the caller wants the weights.
    """

    query: Num[Array, "B T N H"]
    key: Num[Array, "B S K H"]
    value: Num[Array, "B S K E"]
    bias: Bias | None
    mask: Mask
    known_scale: float | None = dataclasses.field(metadata={"static": True})
    traced_scale: Float[Array, ""] | None = None
    dropout: Dropout | None = None
    sinks: Float[Array, "N"] | None = None
    soft_cap: float | None = dataclasses.field(default=None, metadata={"static": True})
    returns_log_sum_exp: bool = dataclasses.field(default=False, metadata={"static": True})
    returns_weights: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def scale(self) -> float | Float[Array, ""]:
        """The factor of query . key; a Python number if it is known."""
        return self.traced_scale if self.known_scale is None else self.known_scale

    @property
    def needs_log_sum_exp(self) -> bool:
        """Whether the log-sum-exp is part of the result or of what makes it."""
        return self.returns_log_sum_exp or self.sinks is not None

    @property
    def is_empty(self) -> bool:
        """Whether there is no sequence, no query or no key."""
        return 0 in (*self.query.shape[:2], self.key.shape[1])

    @classmethod
    def of(
        cls,
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
    ) -> Self:
        """The problem of these arguments, which are those of `posjax.dot_product_attention`.

        Shapes and dtypes are enough for query, key and value (`jax.ShapeDtypeStruct`).

        Raises:
            ValueError: arguments that do not fit together, named with their values.
        """
        _check_precision(precision)
        shape, (query, key, value) = _arrays({"query": query, "key": key, "value": value}, dtype)
        is_causal = bool(checks.flag("is_causal", is_causal))
        if bias is not None:
            bias = _bias(bias, shape)
            check_fields(bias)
            bias.check(query, key, is_causal)
            _check_softmax(bias, sinks, return_residual)
        segments = _both_segments(shape, query_segment_ids, key_segment_ids)
        lengths = query_seq_lengths, key_value_seq_lengths
        segments = forms.with_lengths(segments, lengths, shape)
        array, holds = (None, None) if mask is None else forms.mask_of(mask, shape)
        if holds is not None and not isinstance(query, jax.ShapeDtypeStruct):
            query = jnp.where(holds, query, jnp.nan)
        mask = Mask(
            query=_tokens("query", shape, shape.queries, query_positions, segments[0]),
            key=_tokens("key", shape, shape.keys, key_positions, segments[1]),
            array=array,
            is_causal=is_causal,
            window=None if local_window_size is None else _window(local_window_size),
            has_given_positions=query_positions is not None or key_positions is not None,
        )
        scale = query.shape[3] ** -0.5 if scale is None else _checked_scale(scale)
        is_known = isinstance(scale, float)
        settings = {"rng": dropout_rng, "rate": dropout_rate, "broadcast": broadcast_dropout}
        return cls(
            query,
            key,
            value,
            bias,
            mask,
            known_scale=scale if is_known else None,
            traced_scale=None if is_known else scale,
            dropout=_dropout(shape, **settings, deterministic=deterministic),
            sinks=None if sinks is None else _checked_sinks(sinks, shape),
            soft_cap=_soft_cap(logits_soft_cap),
            returns_log_sum_exp=bool(checks.flag("return_residual", return_residual)),
            returns_weights=_is_module(module),
        )

    def unsupported_settings(self, who: str) -> str | None:
        """The reason why `who`, which has only plain weights, cannot solve it; None if it may.

        Args:
            who: in the plural, such as "the TPU kernels".
        """
        if self.dropout is not None:
            return f"{who} have no attention dropout"
        if self.soft_cap is not None:
            return f"{who} have no logits_soft_cap"
        if self.traced_scale is not None:
            return f"{who} need a scale that is known when they are compiled (scale the query)"
        if self.returns_weights:
            return f"{who} have no weights to give to a module"
        return None

    def with_own_heads(self, part: Int[Array, ""], parts: int) -> Self:
        """The problem of one of `parts` parts of the heads, if its arrays have been split."""
        if self.bias is None:
            return self
        return dataclasses.replace(self, bias=self.bias.own_heads(part, parts))


def _arrays(arrays: dict[str, Any], dtype: Any) -> tuple[Shape, list[Shaped]]:
    """Query, key and value with one batch axis, checked, and the axes of the call."""
    arrays = {name: forms.array_of(name, x) for name, x in arrays.items()}
    if dtype is not None:
        arrays = {name: _converted(x, dtype) for name, x in arrays.items()}
    query, key = arrays["query"], arrays["key"]
    for name, x in arrays.items():
        checks.shape(name, x, (..., "length", "heads", "head size"))
        checks.dtype(name, x, _DTYPES)
        if x.dtype != query.dtype:
            raise ValueError(
                f"{name} has dtype {x.dtype}, but query has {query.dtype}; they must be equal "
                "(`dtype` converts all)."
            )
        checks.require(f"{name}'s number of heads", x.shape[-2], x.shape[-2] != 0, "at least 1")
        checks.require(f"{name}'s head size", x.shape[-1], x.shape[-1] != 0, "at least 1")
    _check_fit(**arrays)
    shape = Shape(tuple(query.shape[:-3]), query.shape[-2], query.shape[-3], key.shape[-3])
    return shape, [forms.batched(x) for x in arrays.values()]


def _check_fit(query: Array, key: Array, value: Array) -> None:
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"key has shape {key.shape}, but value has {value.shape}; they must have equal batch "
            "sizes, lengths and heads."
        )
    if key.shape[:-3] != query.shape[:-3]:
        one = key.ndim == query.ndim == 4
        found, wanted = (x.shape[0] if one else tuple(x.shape[:-3]) for x in (key, query))
        raise ValueError(f"key has batch size {found}, but query has {wanted}; they must be equal.")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key has head size {key.shape[-1]}, but query has {query.shape[-1]}; they must be "
            "equal."
        )
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"key has {key.shape[-2]} heads, which does not divide query's {query.shape[-2]}."
        )


def _converted(x: Shaped, dtype: Any) -> Shaped:
    try:
        wanted = jnp.dtype(dtype)
    except TypeError:
        wanted = None
    checks.require("dtype", dtype, wanted in _DTYPES, "None or a floating-point type")
    is_struct = isinstance(x, jax.ShapeDtypeStruct)
    return jax.ShapeDtypeStruct(x.shape, wanted) if is_struct else x.astype(wanted)


def _bias(bias: Any, shape: Shape) -> Bias:
    """A description; an array may broadcast to [*batch, N, T, S]."""
    if isinstance(bias, Bias):
        return bias
    return as_bias(forms.broadcastable("bias", forms.array_of("bias", bias), shape))


def _check_softmax(bias: Bias, sinks: Any, return_residual: Any) -> None:
    """Sinks take part in a softmax, and the log-sum-exp is its denominator."""
    given = "sinks" if sinks is not None else "return_residual=True" if return_residual else None
    if given is not None and not bias.uses_softmax:
        name = type(bias).__name__
        raise ValueError(f"{given} is for a softmax, and attention with {name} has none.")


def _tokens(
    name: str, shape: Shape, length: int, positions: Array | None, segment_ids: Array | None
) -> Tokens:
    if positions is None:
        positions = jnp.arange(length, dtype=jnp.int32)[None]
    else:
        positions = forms.row_of(f"{name}_positions", positions, shape, length)
    return Tokens(positions, segment_ids)


def _both_segments(
    shape: Shape, of_queries: Array | None, of_keys: Array | None
) -> tuple[Array | None, Array | None]:
    """Those of queries and of keys, which are the queries' if there are equally many."""
    if of_queries is None and of_keys is None:
        return None, None
    if of_queries is None:
        raise ValueError("key_segment_ids is given without query_segment_ids; give both.")
    if of_keys is None and shape.queries != shape.keys:
        raise ValueError(
            "query_segment_ids is given without key_segment_ids, but there are "
            f"{shape.queries} queries and {shape.keys} keys; give both."
        )
    of_queries = forms.row_of("query_segment_ids", of_queries, shape, shape.queries)
    if of_keys is None:
        return of_queries, of_queries
    return of_queries, forms.row_of("key_segment_ids", of_keys, shape, shape.keys)


def _window(window: Any) -> tuple[int, int]:
    pair = (window, window) if isinstance(window, int | np.integer) else window
    left, right = checks.integers("local_window_size", pair, count=2, low=0)
    return int(left), int(right)


def _checked_scale(scale: Any) -> float | Float[Array, ""]:
    """A Python number if it is known when the code is compiled, else an array."""
    if not isinstance(scale, jax.Array | np.ndarray):
        return float(checks.number("scale", scale))
    checks.shape("scale", scale, ())
    checks.dtype("scale", scale, jnp.floating)
    value = forms.known(scale)
    return wide(scale) if value is None else float(value)


def _soft_cap(cap: Any) -> float | None:
    checks.number("logits_soft_cap", cap, optional=True, above=0)
    return None if cap is None else float(cap)


def _checked_sinks(sinks: Any, shape: Shape) -> Float[Array, "N"]:
    sinks = forms.array_of("sinks", sinks)
    checks.shape("sinks", sinks, (shape.heads,))
    checks.dtype("sinks", sinks, jnp.floating)
    return wide(sinks)


def _dropout(
    shape: Shape, *, rng: Any, rate: Any, broadcast: Any, deterministic: Any
) -> Dropout | None:
    checks.number("dropout_rate", rate, low=0, high=1)
    checks.flag("deterministic", deterministic)
    checks.flag("broadcast_dropout", broadcast)
    if rng is not None:
        rng = checks.key("dropout_rng", rng)
    if deterministic or rate == 0:
        return None
    of = (shape.sequences, shape.heads, shape.queries, shape.keys)
    return Dropout.of(rng, float(rate), of, broadcast=bool(broadcast))


def _is_module(module: Any) -> bool:
    """Whether there is a module to sow weights in."""
    holds = module is None or callable(getattr(module, "sow", None))
    checks.require("module", module, holds, "a Flax module, or None")
    return module is not None


def _check_precision(precision: Any) -> None:
    if precision is None:
        return
    one = jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        jax.eval_shape(lambda x: jax.lax.dot(x, x, precision=precision), one)
    except Exception as error:
        words = "None or a precision of jax.lax.dot, such as jax.lax.Precision.HIGHEST"
        raise ValueError(f"precision is {precision!r}; it must be {words}.") from error
