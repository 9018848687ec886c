"""Shaw et al.'s relative positions: trained vectors of the distance, added to keys and values."""

from typing import ClassVar, Self

import flax.linen as nn
import jax.numpy as jnp

from posjax import checks
from posjax.biases.tables import ClippedTableBias
from posjax.encodings.base import PositionEncoding

__all__ = ["Shaw"]


class Shaw(PositionEncoding):
    """Adds trained vectors of the clipped relative position to keys and to values.

        logit_ij = H^-0.5 q_i . (k_j + key_table[r])                 r = clip(j - i, -k, k) + k
        output_i = sum_j weight_ij (v_j + value_table[r])            k = max_distance

    The pure form is `posjax.ClippedTableBias`. Parameters of each layer, float32: key_table
    and value_table, [2k + 1, H] each, shared by the heads; at the start Glorot-uniform, the default
    of the official code (Tensor2Tensor). `Shaw.keys()` leaves the values out, which the paper found
    to cost little; it is Hugging Face's "relative_key". The learned relative positions of CoPE's
    paper are `Relative`.

    All keys further away than k are alike. Fractions of a position are interpolated. Tested
    against Hugging Face's Wav2Vec2-BERT (keys) and against loops over the formula (values).

    Args:
        max_distance: k; at least 1. 16 is the paper's.
        with_values: whether values get vectors too.
        per_head: whether each head has its own tables, [N, 2k + 1, H].

    References:
        Shaw, Uszkoreit, Vaswani, Self-Attention with Relative Position Representations,
        arXiv:1803.02155, section 3.

    >>> import jax
    >>> from posjax.encodings.base import Side
    >>> x, p = jnp.ones((1, 3, 2, 4)), jnp.array([[0, 1, 2]])
    >>> variables = Shaw().init(jax.random.key(0), Side(x, p), Side(x, p), method="bias")
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'key_table': (33, 4), 'value_table': (33, 4)}}
    """

    max_distance: int = 16
    with_values: bool = True
    per_head: bool = False
    beyond: ClassVar = "clips"

    def __post_init__(self):
        checks.fields(self, max_distance=checks.at_least(1))
        super().__post_init__()

    @classmethod
    def keys(cls) -> Self:
        """Vectors for keys only."""
        return cls(with_values=False)

    @nn.compact
    def bias(self, query, key, shared=None):
        """The tables at the clipped relative positions."""
        heads, size = query.x.shape[2:]
        shape = (2 * self.max_distance + 1, size)
        shape = (heads, *shape) if self.per_head else shape
        start = nn.initializers.xavier_uniform(batch_axis=0 if self.per_head else ())
        value_table = None
        if self.with_values:
            value_table = self.param("value_table", start, shape, jnp.float32)
        return ClippedTableBias(
            query_table=self.param("key_table", start, shape, jnp.float32),
            value_table=value_table,
            query_positions=query.indices,
            key_positions=key.indices,
            clip=(self.max_distance, self.max_distance),
        )
