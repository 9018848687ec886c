"""Attention layer, MLP and block. The attention layer calls places 3 and 4 of the encoding."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from posjax.attention import dot_product_attention
from posjax.encodings.base import PositionEncoding, Side
from posjax.encodings.stream import stream_of
from posjax.models.config import TransformerConfig
from posjax.types import Array, Float, Int, PyTree

__all__ = ["Attention", "Block", "Cache", "Context", "LayerState", "Remembered"]


class Context(NamedTuple):
    """The arrays that all layers share in one call."""

    query_indices: PyTree  # of the encoding, [B, T, ...]
    key_indices: PyTree  # [B, S, ...]
    rows: Int[Array, "T"]  # places of these tokens among all tokens known so far
    query_positions: Int[Array, "B T"] | None  # place in the cache; None without a cache
    segment_ids: Int[Array, "B T"] | None
    shared: PyTree  # parameters of the encoding that all layers use
    offset: Int[Array, ""] | None  # tokens in the cache before this call; None without a cache


class Remembered(NamedTuple):
    """The arrays that an attention layer keeps of each token."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    memory: PyTree  # of the encoding


class LayerState(NamedTuple):
    """The arrays that a layer keeps of each token."""

    attention: Remembered
    stream_inputs: PyTree  # of the encoding


class Cache(NamedTuple):
    """All arrays that the model keeps of the tokens seen so far; room for S tokens."""

    length: Int[Array, ""]  # tokens seen
    carry: PyTree  # of the encoding's positions
    indices: PyTree  # of the encoding, for the keys, [B, S, ...]
    layers: (
        tuple[LayerState, ...] | LayerState
    )  # with scan_layers one state with a leading layer axis


class Attention(nn.Module):
    """Grouped-head causal self-attention with a position encoding."""

    config: TransformerConfig
    encoding: PositionEncoding

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "B T D"],
        context: Context,
        cached: Remembered | None = None,
        state: PyTree = None,
    ) -> tuple[Float[Array, "B T D"], Remembered, Float[Array, "B T N E"] | None]:
        """The sublayer's output, its arrays of all tokens, averages of the encoding's values."""
        config, encoding, size = self.config, self.encoding, self.config.size_of_head
        query = _projection(config, (config.heads, size), "query")(inputs)
        new = Remembered(
            _projection(config, (config.key_heads, size), "key")(inputs),
            _projection(config, (config.key_heads, size), "value")(inputs),
            encoding.cache(inputs, config.sizes, state),
        )
        known = write_all(cached, new, context.offset)
        query = Side(query, context.query_indices, new.memory)
        key = Side(known.key, context.key_indices, known.memory, known.value)
        turned = encoding.rotate(query, key)
        query, key = query._replace(x=turned[0]), key._replace(x=turned[1])
        bias = encoding.bias(query, key, context.shared)
        value, extra = known.value, stream_of(encoding).extra_values(known.memory)
        if extra is not None:
            value = jnp.concatenate((value, extra.astype(value.dtype)), axis=-1)
        mixed = dot_product_attention(
            query.x,
            key.x,
            value,
            bias,
            is_causal=True,
            query_positions=context.query_positions,
            query_segment_ids=context.segment_ids,
            local_window_size=None if config.local_window is None else (config.local_window, 0),
            implementation=config.implementation,
        )
        output = _output_projection(config, (-2, -1), "output")(mixed[..., :size])
        return output, known, None if extra is None else mixed[..., size:]


class MLP(nn.Module):
    """Two matrices with an activation between them, or three if the activation is gated."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, inputs: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The sublayer's output."""
        config = self.config
        hidden = round(config.mlp_ratio * config.width)
        up = _projection(config, hidden, "up", use_bias=True)(inputs)
        if config.mlp in ("gelu", "relu"):
            up = nn.gelu(up) if config.mlp == "gelu" else nn.relu(up)
        else:
            gate = _projection(config, hidden, "gate", use_bias=True)(inputs)
            up = up * (nn.silu(gate) if config.mlp == "swiglu" else nn.gelu(gate))
        return _output_projection(config, -1, "down", use_bias=True)(up)


class Block(nn.Module):
    """Attention and MLP, each with norm, dropout and residual sum."""

    config: TransformerConfig
    encoding: PositionEncoding
    deterministic: bool = True

    @nn.compact
    def __call__(
        self,
        flow: tuple[Float[Array, "B T D"], PyTree],
        cached: LayerState | None,
        context: Context,
    ) -> tuple[tuple[Float[Array, "B T D"], PyTree], LayerState]:
        """The residual stream and the encoding's state after the block; the state of the layer."""
        (stream, state), encoding = flow, self.encoding
        of_stream, old = stream_of(encoding), cached or LayerState(None, None)
        inputs = write_all(old.stream_inputs, of_stream.stream_inputs(stream), context.offset)
        stream = of_stream.update_stream(stream, inputs, context.query_indices, context.rows)
        attention = Attention(self.config, encoding, name="attention")
        before, after = (norm, _identity) if self.config.norm == "pre" else (_identity, norm)
        drop = nn.Dropout(self.config.dropout, deterministic=self.deterministic)
        output, known, mixed = attention(
            before(self.config, "attention_norm")(stream),
            context,
            old.attention,
            state,
        )
        middle = after(self.config, "attention_norm")(stream + drop(output))
        changed = MLP(self.config, name="mlp")(before(self.config, "mlp_norm")(middle))
        stream = after(self.config, "mlp_norm")(middle + drop(changed))
        return (stream, of_stream.update_state(state, changed, mixed)), LayerState(known, inputs)


def norm(config: TransformerConfig, name: str) -> nn.Module:
    """The configured normalisation; statistics in float32, output in the compute type."""
    kind = nn.LayerNorm if config.norm_kind == "layer" else nn.RMSNorm
    return kind(epsilon=1e-5, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def write_at(old: Array, new: Array, offset: Int[Array, ""]) -> Array:
    """`old` [B, S, ...] with the tokens of `new` [B, T, ...] written from `offset` on.

    Tokens beyond S are left out.
    """
    room, count, new = old.shape[1], new.shape[1], new.astype(old.dtype)
    if count == 1:
        # Where there is no room, the last token is written again.
        start = jnp.minimum(offset, room - 1)
        before = jax.lax.dynamic_slice_in_dim(old, start, 1, axis=1)
        new = jnp.where(offset < room, new, before)
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
    places = offset + jnp.arange(count, dtype=jnp.int32)
    return old.at[:, places].set(new, mode="drop", unique_indices=True)


def write_all(old: PyTree, new: PyTree, offset: Int[Array, ""] | None) -> PyTree:
    """`write_at` for every array; `new` itself if there is no cache.

    Raises:
        ValueError: the cache holds other arrays.
    """
    if offset is None:
        return new
    drop_length = lambda shape: (shape[0], *shape[2:])  # noqa: E731
    check_held("cache", old, new, drop_length)
    return jax.tree.map(lambda o, n: write_at(o, n, offset), old, new)


def check_held(name: str, old: PyTree, new: PyTree, axes: Callable = tuple) -> None:
    """Checks that a cache holds arrays such as the model makes.

    Args:
        axes: which axes of a shape are the same.
    """

    def form(x: Array) -> str:
        # Positions may be of any integer type.
        kind = "int" if jnp.issubdtype(x.dtype, jnp.integer) else x.dtype
        return f"{kind}{list(axes(x.shape))}"

    held, wanted = (jax.tree.map(form, tree) for tree in (old, new))
    if held != wanted:
        each = "" if axes is tuple else " of each token"
        raise ValueError(f"{name} is {held}; it must be one that holds {wanted}{each}.")


def _identity(config: TransformerConfig, name: str):
    return lambda x: x


def _projection(
    config: TransformerConfig, features, name: str, use_bias: bool = False
) -> nn.DenseGeneral:
    """Kernels start normal with variance 1 / inputs."""
    return nn.DenseGeneral(
        features,
        use_bias=use_bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
        name=name,
    )


def _output_projection(
    config: TransformerConfig, axis, name: str, use_bias: bool = False
) -> nn.DenseGeneral:
    """Kernels that write to the residual stream start smaller by sqrt(2 * layers)."""
    return nn.DenseGeneral(
        config.width,
        axis=axis,
        use_bias=use_bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nn.initializers.variance_scaling(0.5 / config.layers, "fan_in", "normal"),
        name=name,
    )
