"""Huang et al.'s four ways for trained relative positions to act on query and key."""

import dataclasses
from typing import Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.biases.relative import RelativeBias
from posjax.biases.sum import BiasSum
from posjax.biases.tables import ClippedTableBias, MultiplierBias
from posjax.encodings.base import PositionEncoding, Side
from posjax.encodings.distance import OfDistance
from posjax.positions import LengthError
from posjax.types import Array, Float, Num

__all__ = ["Huang", "NothingBeyond"]


@dataclasses.dataclass(frozen=True)
class NothingBeyond:
    """NaN for distances beyond `max_distance`, else 0."""

    max_distance: int

    def __post_init__(self):
        checks.fields(self, max_distance=checks.at_least(1))

    def __call__(self, params: None, distance: Num[Array, "#B 1 T S"]) -> Float[Array, "#B 1 T S"]:
        """The bias in float32."""
        return jnp.where(jnp.abs(distance) > self.max_distance, jnp.nan, 0.0).astype(jnp.float32)


class Huang(PositionEncoding):
    """Lets trained numbers or vectors of the relative position act on query and key.

        method 1: logit_ij = H^-0.5 w_n[|i - j|] (q_i . k_j)          a number for each head
        method 2: logit_ij = H^-0.5 w_n[j - i] (q_i . k_j)            a number for each head
        method 3: logit_ij = H^-0.5 sum_c w[j - i, c] q_ic k_jc       vectors
        method 4: logit_ij = H^-0.5 (q_i . k_j + q_i . a[j - i] + k_j . a[j - i])

    The pure forms are `posjax.biases.tables.MultiplierBias` and, for method 4, the paper's best,
    `ClippedTableBias`. Parameters of each layer, float32: `multipliers` [N, max_distance + 1] (1),
    [N, 2 max_distance + 1] (2), [2 max_distance + 1, H] (3), or `table` [2 max_distance + 1, H]
    (4). Multipliers start at 1, where they change nothing; the table is normal with deviation 0.02
    (BERT's). Vectors are shared by the heads, as in the BERT of earlier versions of Hugging Face's
    library ("relative_key_query" is method 4, its rows in the opposite order).

    The table has a row for every distance of the paper's 512 tokens, and there is no rule for
    others; looking one up is an error in Hugging Face's code. Here the last row serves all further
    distances, or, with `strict`, they raise `posjax.positions.LengthError` if positions are known
    and give NaN if the program is compiled. Fractions of a position are interpolated. Tested
    against loops over the formulas.

    Args:
        method: 1, 2, 3 or 4.
        max_distance: greatest distance with its own row; at least 1.
        per_head: whether each head has its own vectors (methods 3 and 4).
        strict: whether distances beyond `max_distance` are refused.
        initial_deviation: standard deviation of method 4's table at the start.

    References:
        Huang, Liang, Xu, Xiang, Improve Transformer Models with Better Relative Position
        Embeddings, arXiv:2009.13658, methods 1 to 4.

    >>> import jax
    >>> from posjax.encodings.base import Side
    >>> x, p = jnp.ones((1, 3, 2, 4)), jnp.array([[0, 1, 2]])
    >>> variables = Huang().init(jax.random.key(0), Side(x, p), Side(x, p), method="bias")
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'table': (1023, 4)}}
    """

    method: Literal[1, 2, 3, 4] = 4
    max_distance: int = 511
    per_head: bool = False
    strict: bool = False
    initial_deviation: float = 0.02

    def __post_init__(self):
        checks.fields(self, max_distance=checks.at_least(1), initial_deviation=checks.at_least(0))
        super().__post_init__()

    @property
    def beyond(self) -> str:
        """Distances beyond `max_distance` raise with `strict`, else they are clipped."""
        return "raises" if self.strict else "clips"

    @classmethod
    def m1(cls) -> Self:
        """A number for each head and distance, multiplied."""
        return cls(method=1)

    @classmethod
    def m2(cls) -> Self:
        """A number for each head and relative position, multiplied."""
        return cls(method=2)

    @classmethod
    def m3(cls) -> Self:
        """A vector for each relative position, multiplied."""
        return cls(method=3)

    @classmethod
    def m4(cls) -> Self:
        """A vector for each relative position, added to query and key."""
        return cls(method=4)

    def bias(self, query, key, shared=None):
        """The terms that make the product of query and key the logit of the method."""
        terms = self._terms(query, key)
        if not self.strict:
            return terms
        places = query.indices, key.indices
        self._refuse_known(*places)
        function = OfDistance(NothingBeyond(self.max_distance))
        return BiasSum((terms, RelativeBias(function, None, *places, distance_only=True)))

    @nn.compact
    def _terms(self, query: Side, key: Side) -> ClippedTableBias | MultiplierBias:
        heads, size = query.x.shape[2:]
        left = 0 if self.method == 1 else self.max_distance
        rows = left + self.max_distance + 1
        vectors = (heads, rows, size) if self.per_head else (rows, size)
        settings = {
            "query_positions": query.indices,
            "key_positions": key.indices,
            "clip": (left, self.max_distance),
        }
        if self.method == 4:
            start = nn.initializers.normal(self.initial_deviation)
            table = self.param("table", start, vectors, jnp.float32)
            return ClippedTableBias(query_table=table, key_table=table, key=key.x, **settings)
        by_channel = self.method == 3
        shape = vectors if by_channel else (heads, rows)
        return MultiplierBias(
            self.param("multipliers", nn.initializers.ones, shape, jnp.float32),
            key=key.x if by_channel else None,
            absolute=self.method == 1,
            by_channel=by_channel,
            **settings,
        )

    def _refuse_known(self, *positions: Array) -> None:
        """Raises LengthError if positions are known and two of them are too far apart."""
        if any(isinstance(x, jax.core.Tracer) for x in positions):
            return
        known = np.concatenate([np.asarray(x) for x in positions], axis=1)
        distance = np.ptp(known, axis=1).max(initial=0)
        if distance > self.max_distance:
            got = f"Huang has max_distance={self.max_distance}, but positions are {distance} apart"
            raise LengthError(f"{got}; build it with max_distance >= {distance}.")
