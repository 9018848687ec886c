"""SelfExtend: keys beyond a window are seen from positions in groups, within the trained range."""

from typing import ClassVar

from posjax import checks
from posjax.biases.grouped import GroupedBias
from posjax.encodings.base import PositionEncoding
from posjax.encodings.rope import Layout, rotate
from posjax.types import Array, Float, Num

__all__ = ["SelfExtend", "group_shifts"]


def group_shifts(
    positions: Num[Array, "B T"], group: int, window: int
) -> tuple[Num[Array, "B T"], Num[Array, "B T"]]:
    """How far query and key positions move to their positions in groups, for distances >= window.

        query: floor(i / group) + window - window / group - i
        key:   floor(j / group) - j

    A key at distance `window`, the nearest far one, then stands at `window` too, and distances grow
    by 1 for each `group` from there on.

    >>> import jax.numpy as jnp
    >>> query, key = group_shifts(jnp.array([[9]]), group=2, window=4)
    >>> query.item(), key.item()
    (-3, -5)
    """
    of_key = positions // group - positions
    return of_key + (window - window // group), of_key


class SelfExtend(PositionEncoding):
    """RoPE near by; beyond `window`, RoPE at positions in groups of `group`. Needs no training.

        logit_ij = H^-0.5 rotate(q_i, i) . rotate(k_j, j)                         i - j < window
                   H^-0.5 rotate(q_i, i // G + window - window / G) . rotate(k_j, j // G)    else

    G is `group`. It extends a trained RoPE model as it is: all distances stay within the trained
    length L up to about (L - window) G + window tokens. Beyond, angles are new, as in RoPE.
    Attention is causal. The second line is a description (`posjax.biases.grouped.GroupedBias`), so
    blockwise attention computes two products for each pair and never builds an array of them.

    The official code uses window / G with a fraction when it reads the prompt and the floor when it
    decodes; window must be a multiple of G here, where both are the same. Its optional factor
    max(1, ln(i + 1) / ln L) for queries is `log_length.clipped` before this encoding. Tested
    against the output of the official code.

    Args:
        group: G, so many neighbouring positions become one; at least 1, where it is RoPE.
        window: distances below it are exact; a multiple of group.
        base: of RoPE's frequencies; above 1.
        fraction: share of each head's channels that are turned, above 0 and up to 1.
        layout: which channels are a pair.

    References:
        Jin et al., LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning,
        arXiv:2401.01325, section 3.

    >>> import jax.numpy as jnp
    >>> x, p = jnp.ones((1, 3, 1, 4)), jnp.array([[0, 7, 19]])
    >>> bias = SelfExtend(group=4, window=8).apply({}, x, x, x, p, p, method="bias")
    >>> bias.window
    8
    """

    group: int = 8
    window: int = 1024
    base: float = 10_000.0
    fraction: float = 1.0
    layout: Layout = "half"
    is_causal_only: ClassVar[bool] = True

    def __post_init__(self):
        fraction = checks.Limits(above=0, high=1)
        one = checks.at_least(1)
        checks.fields(self, group=one, window=one, base=checks.above(1), fraction=fraction)
        wanted = f"a multiple of group = {self.group}"
        checks.require("SelfExtend window", self.window, self.window % self.group == 0, wanted)
        super().__post_init__()

    def rotate(self, query, key, query_indices, key_indices, query_memory=None, key_memory=None):
        """Query and key, turned by their own positions."""
        return self._turn(query, query_indices), self._turn(key, key_indices)

    def bias(self, query, key, value, query_indices, key_indices, memory=None, shared=None):
        """What far pairs differ by; turned query and key are turned on to grouped positions."""
        of_query, _ = group_shifts(query_indices, self.group, self.window)
        _, of_key = group_shifts(key_indices, self.group, self.window)
        features = self._turn(query, of_query), self._turn(key, of_key)
        return GroupedBias(*features, query_indices, key_indices, self.window)

    def _turn(self, x: Num[Array, "B T N H"], angles: Num[Array, "B T"]) -> Float[Array, "B T N H"]:
        return rotate(x, angles, base=self.base, fraction=self.fraction, layout=self.layout)
