"""Contextual Position Encoding (CoPE, arXiv:2405.18719): gates count positions by context."""

import math
from typing import ClassVar, Literal, Self

import flax.linen as nn
import jax.numpy as jnp

from posjax import checks
from posjax.biases.contextual import ContextualBias
from posjax.encodings.base import PositionEncoding
from posjax.encodings.distance import TrainedBias

__all__ = ["CoPE"]


class CoPE(TrainedBias):
    """Contextual Position Encoding: the distance to a key is a sum of gates of query and key.

        g_ij  = sigmoid(q_i . k'_j * H^-0.5 + gate_bias)                    for every head
        p_ij  = min(sum of g_ik over k from j to i, num_positions - 1)
        logit = H^-0.5 q_i . k_j + interp(q_i . table, p_ij)

    The pure form is `posjax.ContextualBias`. Parameters, float32: `table`, and `gate_bias` [N] in
    each layer with `train_gate_bias`. Names that begin with -- are options of the official code.

    Any length is defined: beyond the trained one counts go on and saturate at P - 1. Attention must
    be causal.

    Args:
        num_positions: P, the rows of the table; all counts beyond P - 1 are position P - 1.
        per_head: one table for each head, [N, P, H], instead of one for all, [P, H] (the paper and
            its code).
        gate_source: k' is the key ("logits"), a projection of the layer's input ("key";
            --cope-sep-key), the value ("value"; --cope-val-gates), or every gate is 1 ("ones"): a
            relative table capped at P - 1, the control that shows the effect of the context.
        gate_bias: added to the gates' logits. Below 0 gates start rare, so counts reach far before
            they saturate; a saturated count has no gradient.
        train_gate_bias: whether the gate bias is a parameter, one number for each head.
        table_deviation: standard deviation of the table at the start. At 0 (the paper's code) gates
            get no gradient from positions until the table has moved, which may take long.
        share_layers: one table for all layers (--cope-shared).
        every: only the layers every - 1, 2 every - 1, ... use it (--cope-layers; from 0). The
            official code needs relative positions in all layers beside it: `cope+relative`.
        scaled: whether the position term is multiplied by H^-0.5 too. It is not in the paper's
            Appendix B; it is by default in the official repository (--cope-nodiv turns it off).

    References:
        Golovneva, Wang, Weston, Sukhbaatar, Contextual Position Encoding: Learning to Count What's
        Important, arXiv:2405.18719, equations 3 to 6 and Appendix B.
    """

    num_positions: int = 64
    per_head: bool = False
    gate_source: Literal["logits", "key", "value", "ones"] = "logits"
    gate_bias: float = -2.0
    train_gate_bias: bool = False
    table_deviation: float = 0.1
    share_layers: bool = False
    every: int = 1
    scaled: bool = False
    is_causal_only: ClassVar[bool] = True
    beyond: ClassVar = "clips"

    def __post_init__(self):
        checks.fields(
            self,
            num_positions=checks.at_least(2),
            table_deviation=checks.at_least(0),
            every=checks.at_least(1),
        )
        super().__post_init__()

    @classmethod
    def paper(cls) -> Self:
        """The published setting (Appendix B): a zero table and gates without bias."""
        return cls(gate_bias=0.0, table_deviation=0.0)

    @classmethod
    def capped(cls) -> Self:
        """The control with all gates 1: learned relative positions, capped at num_positions - 1."""
        return cls(gate_source="ones")

    @classmethod
    def gate_keys(cls) -> Self:
        """Gates from a separate projection (--cope-sep-key)."""
        return cls(gate_source="key")

    @classmethod
    def gate_values(cls) -> Self:
        """Gates from the values (--cope-val-gates)."""
        return cls(gate_source="value")

    @classmethod
    def shared_table(cls) -> Self:
        """One table for all layers (--cope-shared)."""
        return cls(share_layers=True)

    @classmethod
    def head_tables(cls) -> Self:
        """A table for each head."""
        return cls(per_head=True)

    def layer(self, index, layers):
        """No encoding in the layers that `every` leaves out."""
        if (index + 1) % self.every:
            return PositionEncoding(parent=None)
        return super().layer(index, layers)

    def setup(self):
        self.gate_projection = _HeadProjection()

    def cache(self, inputs, sizes, state=None):
        """Gate keys, if they have their own projection."""
        if self.gate_source != "key":
            return None
        return self.gate_projection(inputs, sizes.kv_heads, sizes.head_size)

    def bias(self, query, key, shared=None):
        """The contextual bias with the layer's table."""
        table = self.parameters_of_layer(query, key, shared)
        heads, size = query.x.shape[2:]
        bias_scale = size**-0.5 if self.scaled else 1.0
        if self.gate_source == "ones":
            return ContextualBias(
                table, None, jnp.float32(math.inf), gate_scale=0.0, bias_scale=bias_scale
            )
        gate_key = {"logits": None, "key": key.memory, "value": key.value}[self.gate_source]
        return ContextualBias(table, gate_key, self._gate_bias(heads), bias_scale=bias_scale)

    def parameters(self, sizes):
        """The table, [num_positions, H], or [N, num_positions, H] with `per_head`."""
        shape = (self.num_positions, sizes.head_size)
        shape = (sizes.heads, *shape) if self.per_head else shape
        return self._trained("table", nn.initializers.normal(self.table_deviation), shape)

    def _gate_bias(self, heads: int):
        if self.train_gate_bias:
            start = nn.initializers.constant(self.gate_bias)
            return self._trained("gate_bias", start, (heads,))
        return jnp.float32(self.gate_bias) if self.gate_bias else None

    @nn.compact
    def _trained(self, name: str, start, shape: tuple[int, ...]):
        return self.param(name, start, shape, jnp.float32)


class _HeadProjection(nn.Module):
    """A linear map to heads, sized when it is called."""

    @nn.compact
    def __call__(self, inputs, heads: int, head_size: int):
        return nn.DenseGeneral(
            (heads, head_size), use_bias=False, dtype=inputs.dtype, name="projection"
        )(inputs)
