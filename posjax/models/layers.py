"""Attention layer, MLP and block. The attention layer calls places 3 and 4 of the encoding."""

from typing import NamedTuple

import flax.linen as nn
import jax

from posjax.attention import dot_product_attention
from posjax.encodings.base import PositionEncoding
from posjax.models.config import TransformerConfig
from posjax.types import Array, Float, Int, PyTree

__all__ = ["Block", "Context", "LayerState"]


class Context(NamedTuple):
    """What all layers share in one call."""

    query_indices: PyTree  # of the encoding, [B, T, ...]
    key_indices: PyTree  # [B, S, ...]
    query_positions: Int[Array, "B T"] | None  # place in the cache; None without a cache
    segment_ids: Int[Array, "B T"] | None
    shared: PyTree  # parameters of the encoding that all layers use
    offset: Int[Array, ""] | None  # tokens in the cache before this call; None without a cache


class LayerState(NamedTuple):
    """What a layer keeps of each token."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    memory: PyTree


class Attention(nn.Module):
    """Grouped-head causal self-attention with a position encoding."""

    config: TransformerConfig
    encoding: PositionEncoding

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "B T D"], context: Context, cached: LayerState | None
    ) -> tuple[Float[Array, "B T D"], LayerState]:
        """The sublayer's output, and the state of all tokens known so far."""
        config = self.config
        heads, kv_heads, size = config.heads, config.key_heads, config.size_of_head
        query = _projection(config, (heads, size), "query")(inputs)
        state = LayerState(
            _projection(config, (kv_heads, size), "key")(inputs),
            _projection(config, (kv_heads, size), "value")(inputs),
            self.encoding.remember(inputs, kv_heads, size),
        )
        if cached is not None:
            state = jax.tree.map(lambda old, new: write_at(old, new, context.offset), cached, state)
        indices = context.query_indices, context.key_indices
        query, key = self.encoding.rotate(query, state.key, *indices)
        bias = self.encoding.bias(query, key, state.value, *indices, state.memory, context.shared)
        mixed = dot_product_attention(
            query,
            key,
            state.value,
            bias,
            is_causal=True,
            query_positions=context.query_positions,
            query_segment_ids=context.segment_ids,
            local_window_size=None if config.local_window is None else (config.local_window, 0),
            implementation=config.implementation,
        )
        return _output_projection(config, (-2, -1), "output")(mixed), state


class MLP(nn.Module):
    """Two matrices with an activation between them, or three where the activation is gated."""

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
        self, inputs: Float[Array, "B T D"], cached: LayerState | None, context: Context
    ) -> tuple[Float[Array, "B T D"], LayerState]:
        """The residual stream after the block, and the layer's state."""
        attention = Attention(self.config, self.encoding, name="attention")
        before, after = (norm, _identity) if self.config.norm == "pre" else (_identity, norm)
        drop = nn.Dropout(self.config.dropout, deterministic=self.deterministic)
        mixed, state = attention(before(self.config, "attention_norm")(inputs), context, cached)
        middle = after(self.config, "attention_norm")(inputs + drop(mixed))
        changed = MLP(self.config, name="mlp")(before(self.config, "mlp_norm")(middle))
        return after(self.config, "mlp_norm")(middle + drop(changed)), state


def norm(config: TransformerConfig, name: str) -> nn.Module:
    """The configured normalisation; statistics in float32, output in the compute type."""
    kind = nn.LayerNorm if config.norm_kind == "layer" else nn.RMSNorm
    return kind(epsilon=1e-5, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def write_at(old: Array, new: Array, offset: Int[Array, ""]) -> Array:
    """`old` [B, S, ...] with the tokens of `new` [B, T, ...] written from `offset` on."""
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), offset, axis=1)


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
