"""T5's relative bias: a trained number for each head and bucket of distances."""

import dataclasses
import functools
from typing import ClassVar, Self

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.encodings.distance import DistanceBias, OfDistance
from posjax.types import Array, Float, Int, Num

__all__ = ["T5", "BucketTable", "t5_buckets"]


@checks.arguments(num_buckets=checks.size(), max_distance=checks.size(reasonable=checks.LONGEST))
def t5_buckets(
    relative: Num[Array, "*shape"],
    *,
    num_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = False,
) -> Int[Array, "*shape"]:
    """The bucket of each relative position: near ones one by one, far ones in growing steps.

        causal:        n = num_buckets,      a = max(-relative, 0)
        bidirectional: n = num_buckets / 2,  a = |relative|;  n is added if relative > 0
        bucket = a                                                      if a < e = floor(n / 2)
                 min(e + floor(log(a / e) / log(max_distance / e) * (n - e)), n - 1)       else

    The edges of the buckets are computed once, in whole numbers, so all devices agree. Published
    code takes the logarithm in float32, whose rounding can put a distance that lies exactly on an
    edge into the bucket below.

    Args:
        relative: position of the key minus position of the query; fractions are rounded, and what
            is not a number has the bucket -1.
        num_buckets: at least 2; bidirectional at least 4 and even.
        max_distance: greater than e; all distances from here on share the last bucket (from 113 on
            with the causal defaults).

    Raises:
        ValueError: settings outside these ranges.

    >>> t5_buckets(jnp.array([-200, -113, -16, -15, 0, 9])).tolist()
    [31, 31, 16, 15, 0, 0]
    """
    buckets = jnp.asarray(_all_buckets(num_buckets, max_distance, bidirectional))
    found = buckets.at[_place(relative, max_distance)].get(mode="promise_in_bounds")
    return (
        found
        if jnp.issubdtype(relative.dtype, jnp.integer)
        else jnp.where(jnp.isnan(relative), -1, found)
    )


@dataclasses.dataclass(frozen=True)
class BucketTable:
    """table[bucket(-distance)] for each head."""

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False

    def __post_init__(self):
        far = checks.size(reasonable=checks.LONGEST)
        checks.fields(self, num_buckets=checks.size(), max_distance=far)

    def __call__(
        self, table: Float[Array, "P N"], distance: Num[Array, "#B 1 T S"]
    ) -> Float[Array, "#B N T S"]:
        """The bias in float32."""
        buckets = _all_buckets(self.num_buckets, self.max_distance, self.bidirectional)
        by_distance = table.astype(jnp.float32)[buckets]
        index = _place(-distance[:, 0], self.max_distance)
        found = jnp.moveaxis(by_distance.at[index].get(mode="promise_in_bounds"), -1, 1)
        if jnp.issubdtype(distance.dtype, jnp.integer):
            return found
        return jnp.where(jnp.isnan(distance), jnp.nan, found)


class T5(DistanceBias):
    """Adds a trained number to the logits for each head and bucket of distances (`t5_buckets`).

        logit_ij = H^-0.5 q_i . k_j + table[bucket(j - i), n]

    T5 itself has no H^-0.5 (its initial query kernel is smaller instead): pass `scale=1.0` to
    `posjax.dot_product_attention` to run T5 weights. Parameter: table [num_buckets, N], float32;
    normal with `initial_deviation` at the start.

    Every length is defined; far keys share the last bucket, so attention spreads thinner over
    longer contexts. Fractional distances are rounded. Tested against Hugging Face's buckets.

    Args:
        num_buckets: at least 2; bidirectional at least 4 and even.
        max_distance: distances from about here on share the last bucket.
        bidirectional: whether half of the buckets are for keys after the query; if not, all of
            those share bucket 0, which is right for causal attention.
        share_layers: one table for all layers, as in T5, or one in each layer.
        initial_deviation: standard deviation of the table at the start; D^-0.5 in Hugging Face's
            code.

    References:
        Raffel et al., Exploring the Limits of Transfer Learning with a Unified Text-to-Text
        Transformer, arXiv:1910.10683, section 2.1.

    >>> import jax
    >>> from posjax.encodings.base import Side
    >>> x, p = jnp.ones((1, 3, 2, 4)), jnp.array([[0, 1, 2]])
    >>> T5(share_layers=False).init(jax.random.key(0), Side(x, p), Side(x, p), method="bias")
    {'params': {'table': ...}}
    """

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False
    share_layers: bool = True
    initial_deviation: float = 0.02
    beyond: ClassVar = "clips"

    def __post_init__(self):
        far = checks.size(reasonable=checks.LONGEST)
        checks.fields(self, max_distance=far, initial_deviation=checks.at_least(0))
        _all_buckets(self.num_buckets, self.max_distance, self.bidirectional)
        super().__post_init__()

    @classmethod
    def per_layer(cls) -> Self:
        """A table in each layer."""
        return cls(share_layers=False)

    @classmethod
    def encoder(cls) -> Self:
        """Keys on both sides, as in T5's encoder."""
        return cls(bidirectional=True)

    def function(self, heads):
        """The table at the buckets."""
        return OfDistance(BucketTable(self.num_buckets, self.max_distance, self.bidirectional))

    @nn.compact
    def parameters(self, sizes):
        """The table, [num_buckets, N]."""
        start = nn.initializers.normal(self.initial_deviation)
        return self.param("table", start, (self.num_buckets, sizes.heads), jnp.float32)


def _place(relative: Array, max_distance: int) -> Int[Array, "*shape"]:
    """The index of a relative position in `_all_buckets`."""
    if not jnp.issubdtype(relative.dtype, jnp.integer):
        relative = jnp.round(jnp.clip(relative, -max_distance, max_distance)).astype(jnp.int32)
    return jnp.clip(relative, -max_distance, max_distance) + max_distance


@functools.cache
def _all_buckets(num_buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """The buckets of the relative positions -max_distance ... max_distance."""
    least, step = (4, 2) if bidirectional else (2, 1)
    checks.integer("T5 num_buckets", num_buckets, low=least, multiple_of=step)
    side = num_buckets // 2 if bidirectional else num_buckets
    exact = side // 2
    wanted = f"above {exact}, the distances with a bucket of their own"
    checks.require("T5 max_distance", max_distance, max_distance > exact, wanted)
    distance = np.arange(max_distance + 1)
    edges = [_edge(step, side - exact, exact, max_distance) for step in range(1, side - exact)]
    before = np.minimum(distance, exact) + np.searchsorted(edges, distance, side="right")
    after = before[1:] + side if bidirectional else np.zeros(max_distance, int)
    return np.concatenate((before[::-1], after)).astype(np.int32)


def _edge(step: int, steps: int, exact: int, max_distance: int) -> int:
    """The smallest a with log(a / exact) / log(max_distance / exact) * steps >= step."""
    edge = int(exact * (max_distance / exact) ** (step / steps)) - 1
    while edge**steps * exact**step < max_distance**step * exact**steps:
        edge += 1
    return edge
