"""Attention layer, MLP and block. The attention layer calls places 3 and 4 of the encoding."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from posjax.attention import dot_product_attention
from posjax.encodings.base import PositionEncoding, Side
from posjax.encodings.stream import stream_of
from posjax.models.cache import LayerState, Remembered, write_all
from posjax.models.config import TransformerConfig
from posjax.types import Array, Float, Int, PyTree

__all__ = ["Attention", "Block", "Context"]


class Context(NamedTuple):
    """The arrays that all layers share in one call."""

    query_indices: PyTree  # of the encoding, [B, T, ...]
    key_indices: PyTree  # [B, S, ...]
    rows: Int[Array, "T"]  # places of these tokens among all tokens known so far
    query_positions: Int[Array, "B T"] | None  # place in the cache; None without a cache
    segment_ids: Int[Array, "B T"] | None
    shared: PyTree  # parameters of the encoding that all layers use
    offset: Int[Array, ""] | None  # tokens in the cache before this call; None without a cache


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
        known = write_all("cache.layers.attention", cached, new, context.offset)
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
        inputs = write_all(
            "cache.layers.stream_inputs",
            old.stream_inputs,
            of_stream.stream_inputs(stream),
            context.offset,
        )
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
