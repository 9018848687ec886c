"""SelfExtend: keys beyond a window are seen from positions in groups, within the trained range."""

from typing import ClassVar

from posjax import checks
from posjax.biases.grouped import GroupedBias
from posjax.encodings.rope import rope_turn
from posjax.encodings.rotary import Layout, Rotary, turn
from posjax.types import Array, Num

__all__ = ["SelfExtend", "group_shifts"]


@checks.arguments(group=checks.at_least(1), window=checks.at_least(0))
def group_shifts(
    positions: Num[Array, "B T"], group: int, window: int
) -> tuple[Num[Array, "B T"], Num[Array, "B T"]]:
    """How far query and key positions move to their positions in groups, for distances >= window.

        query: floor(i / group) + window - window / group - i
        key:   floor(j / group) - j

    A key at distance `window`, the nearest far one, is then at `window` too, and distances grow
    by 1 for each `group` from there on.

    >>> import jax.numpy as jnp
    >>> query, key = group_shifts(jnp.array([[9]]), group=2, window=4)
    >>> query.item(), key.item()
    (-3, -5)
    """
    of_key = positions // group - positions
    return of_key + (window - window // group), of_key


class SelfExtend(Rotary):
    """Exact RoPE up to `window`; beyond it, RoPE at positions in groups. Needs no training.

        logit_ij = H^-0.5 rotate(q_i, i) . rotate(k_j, j)                         i - j < window
                   H^-0.5 rotate(q_i, i // G + window - window / G) . rotate(k_j, j // G)    else

    G is `group`. It extends a trained RoPE model as it is: all distances stay within the trained
    length L up to about (L - window) G + window tokens. Beyond, angles are new, as in RoPE.
    Attention is causal. The second line is a description (`posjax.biases.grouped.GroupedBias`), so
    blockwise attention computes two products for each pair and never builds an array of them.

    The official code uses window / G with a fraction when it reads the prompt and the floor when it
    decodes; here window must be a multiple of G, so that both are the same. Its optional factor
    max(1, ln(i + 1) / ln L) for queries is `log_length.clipped` before this encoding. Tested
    against the output of the official code.

    Args:
        group: G, the number of neighbouring positions that become one; at least 1, which is RoPE.
        window: distances below it are exact; a multiple of group.
        base: of RoPE's frequencies; above 1.
        fraction: share of each head's channels that are turned, above 0 and up to 1.
        layout: which channels are a pair.

    References:
        Jin et al., LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning,
        arXiv:2401.01325, section 3.

    >>> import jax.numpy as jnp
    >>> from posjax.encodings.base import Side
    >>> side = Side(jnp.ones((1, 3, 1, 4)), jnp.array([[0, 7, 19]]))
    >>> bias = SelfExtend(group=4, window=8).apply({}, side, side, method="bias")
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

    def turn_of(self, side):
        """RoPE's angles."""
        return rope_turn(side.indices, side.x.shape[-1], self.base, self.fraction)

    def bias(self, query, key, shared=None):
        """The difference for far pairs; turned query and key are turned on to grouped positions."""
        of_query, _ = group_shifts(query.indices, self.group, self.window)
        _, of_key = group_shifts(key.indices, self.group, self.window)
        shifts = query._replace(indices=of_query), key._replace(indices=of_key)
        features = (turn(side.x, *self.turn_of(side), layout=self.layout) for side in shifts)
        return GroupedBias(*features, query.indices, key.indices, self.window)
