"""Learned relative positions, one table for the whole model: the baseline of CoPE's paper."""

from typing import ClassVar, Self

import flax.linen as nn
import jax.numpy as jnp

from posjax import checks
from posjax.biases.relative import RelativeBias
from posjax.biases.sum import BiasSum
from posjax.biases.tables import ClippedTableBias
from posjax.encodings.distance import OfDistance, TrainedBias
from posjax.encodings.huang import NothingBeyond
from posjax.positions import check_length

__all__ = ["Relative"]


class Relative(TrainedBias):
    """Adds a trained vector of the distance to the keys: "Relative PE" in the paper of CoPE.

        logit_ij = H^-0.5 q_i . (k_j + table[i - j])        row min(i - j, P - 1) unless `strict`

    The pure form is `posjax.ClippedTableBias`. As in CoPE's official code (--pos-emb rel) one table
    serves all heads of all layers, with a row for each distance of the trained block, and rows
    start from N(0, 1 / H). `cope+relative` (--pos-emb cope+rel) is CoPE beside it. `Shaw` has
    tables of each layer, with rows for 16 tokens on either side. Parameter: table
    [num_positions, H], float32; the official one has its rows in the opposite order.

    There is no row beyond the table: a longer sequence raises `posjax.positions.LengthError` when
    the program is traced, and a greater distance gives NaN in a compiled program. Without `strict`
    (--rel-pos-max with --rel-pos-extend) the last row serves all further distances, which the
    paper found to carry to longer contexts. Attention must be causal. Tested against a
    transcription of the official code.

    Args:
        num_positions: P, the rows of the table; at least 1.
        strict: whether distances beyond the table are refused.
        share_layers: one table for all layers, or one in each layer.

    References:
        Golovneva, Wang, Weston, Sukhbaatar, Contextual Position Encoding: Learning to Count What's
        Important, arXiv:2405.18719, section 5 and figure 3.

    >>> import jax
    >>> from posjax.encodings.base import Sizes
    >>> variables = Relative(8).init(jax.random.key(0), Sizes(2, 2, 4), method="shared")
    >>> variables["params"]["table"].shape
    (8, 4)
    """

    num_positions: int = 1024
    strict: bool = True
    share_layers: bool = True
    is_causal_only: ClassVar[bool] = True

    def __post_init__(self):
        checks.fields(self, num_positions=checks.size())
        super().__post_init__()

    @property
    def beyond(self) -> str:
        """Distances beyond the table raise with `strict`, else they are clipped."""
        return "raises" if self.strict else "clips"

    @classmethod
    def capped(cls) -> Self:
        """As many rows as CoPE has, the last one for all further distances."""
        return cls(num_positions=64, strict=False)

    @nn.compact
    def parameters(self, sizes):
        """The table, [num_positions, H]."""
        start = nn.initializers.normal(sizes.head_size**-0.5)
        return self.param("table", start, (self.num_positions, sizes.head_size), jnp.float32)

    def bias(self, query, key, shared=None):
        """The rows at the distances of query and key."""
        table = self.parameters_of_layer(query, key, shared)
        places = {"query_positions": query.indices, "key_positions": key.indices}
        last = self.num_positions - 1
        rows = ClippedTableBias(query_table=table[::-1], clip=(last, 0), causal_only=True, **places)
        if not self.strict:
            return rows
        if jnp.issubdtype(key.indices.dtype, jnp.integer):
            check_length(key.x.shape[1], self.num_positions, "Relative")
        function = OfDistance(NothingBeyond(last))
        return BiasSum((rows, RelativeBias(function, None, distance_only=True, **places)))
