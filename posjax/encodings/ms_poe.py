"""Multi-scale Positional Encoding (Ms-PoE): each head interpolates positions by its own ratio."""

from typing import Self

import jax.numpy as jnp
import numpy as np

from posjax import checks, forms
from posjax.encodings.rotary import Layout, Rotary, check_pairs, turn_at
from posjax.frequencies import rope_frequencies
from posjax.types import Array, Float, Int

__all__ = ["MsPoE", "ms_poe_ratios", "position_awareness"]


@checks.arguments(
    order=checks.at_least(0), min_ratio=checks.at_least(1), max_ratio=checks.at_least(1)
)
def ms_poe_ratios(
    order: tuple[int, ...], min_ratio: float = 1.2, max_ratio: float = 1.8
) -> np.ndarray:
    """min_ratio + (max_ratio - min_ratio) * order_n / N, by which head n divides positions.

    >>> ms_poe_ratios((1, 0)).round(2).tolist()
    [1.5, 1.2]
    """
    return min_ratio + (max_ratio - min_ratio) * np.asarray(order) / len(order)


@checks.arguments(threshold=checks.above(0))
def position_awareness(weights: Float[Array, "N T S"], threshold: float = 3.0) -> Int[Array, "N"]:
    """The order of heads by position-awareness, 0 for the most aware: an `MsPoE.order`.

        score_n = share of keys whose weight, for the last query, exceeds threshold * mean weight

    Heads with equal scores stay in their order. The official code uses the sorted list of heads as
    if it were the list of ranks, which is its inverse (`jnp.argsort` of the result gives it); this
    follows the paper. Its threshold is 3, and 4 in its last version.

    Args:
        weights: attention weights of one layer and one sequence, from a run without Ms-PoE.

    Raises:
        ValueError: known weights that are not a number (otherwise the order is -1 for every head).

    >>> level, peaked = [[0.25, 0.25, 0.25, 0.25]], [[0.97, 0.01, 0.01, 0.01]]
    >>> position_awareness(jnp.array([level, peaked])).tolist()
    [1, 0]
    """
    last = weights[:, -1, :].astype(jnp.float32)
    is_right = ~jnp.isnan(last).any()
    holds = forms.known(is_right)
    if holds is not None and not holds:
        raise ValueError("weights holds nan for the last query; it must be attention weights.")
    outliers = last > threshold * jnp.mean(last, axis=-1, keepdims=True)
    by_awareness = jnp.argsort(-jnp.sum(outliers, axis=-1), stable=True)
    order = jnp.argsort(by_awareness).astype(jnp.int32)
    return jnp.where(is_right, order, -1)


class MsPoE(Rotary):
    """RoPE with positions divided by each head's own ratio, from min_ratio up.

        ratio_n = min_ratio + (max_ratio - min_ratio) order_n / N
        logit_ij = H^-0.5 rotate(q_i, i / ratio_n) . rotate(k_j, j / ratio_n)

    It is for trained RoPE models, without further training: heads that attend to certain positions
    keep fine distances, others see further. The official code ranks heads by their weights in the
    first forward pass and keeps that; here run `position_awareness` once and pass its result as
    `order`. By default the order is reversed, the code's head type "normal". The code divides by N,
    as here, so that max_ratio is never reached. With grouped heads it turns a key by the ratio of
    its group's first head, but each query by its own, so that angles between them grow with the
    position; here the first head's ratio holds for the whole group. For K = N both are the same.

    Every position is defined. Up to about min_ratio times the trained length all angles were seen
    in training. Tested against a transcription of the official code in numpy.

    Args:
        min_ratio: at least 1.
        max_ratio: at least min_ratio.
        order: 0 ... N - 1 in any order, one for each head; head n has rank order_n. None: N - 1
            for the first head down to 0 for the last.
        skip_layers: number of layers, from the first on, with plain RoPE; 2 in the paper. Layers
            then differ, which `scan_layers` refuses.
        base: of RoPE's frequencies; above 1.
        layout: which channels are a pair, see `posjax.encodings.rotary.turn`.

    References:
        Zhang et al., Found in the Middle: How Language Models Use Long Contexts Better via
        Plug-and-Play Positional Encoding, arXiv:2403.04797, section 3.

    >>> from posjax.encodings.base import Side
    >>> side = Side(jnp.ones((1, 1, 2, 4)), jnp.array([[3]]))
    >>> query, _ = MsPoE().apply({}, side, side, method="rotate")
    >>> [f"{channel:.2f}" for channel in query[0, 0, :, 0]]
    ['-1.33', '-1.40']
    """

    min_ratio: float = 1.2
    max_ratio: float = 1.8
    order: tuple[int, ...] | None = None
    skip_layers: int = 0
    base: float = 10_000.0
    layout: Layout = "half"

    def __post_init__(self):
        checks.fields(
            self, min_ratio=checks.at_least(1), skip_layers=checks.at_least(0), base=checks.above(1)
        )
        wanted = f"at least min_ratio = {self.min_ratio}"
        checks.require("MsPoE max_ratio", self.max_ratio, self.max_ratio >= self.min_ratio, wanted)
        if self.order is not None:
            is_order = sorted(self.order) == list(range(len(self.order)))
            checks.require("MsPoE order", self.order, is_order, "0, 1, ... in any order, or None")
        super().__post_init__()

    @classmethod
    def paper(cls) -> Self:
        """The published setting: plain RoPE in the first two layers."""
        return cls(skip_layers=2)

    def layer(self, index, layers):
        """Plain RoPE below skip_layers, as ratios of 1."""
        if index >= self.skip_layers:
            return super().layer(index, layers)
        return self.clone(parent=None, name=None, min_ratio=1.0, max_ratio=1.0)

    def turns(self, query, key):
        """RoPE's angles at positions over the ratio of the group."""
        heads, size = query.x.shape[2:]
        check_pairs("MsPoE", size)
        order = tuple(reversed(range(heads))) if self.order is None else self.order
        if len(order) != heads:
            raise ValueError(f"MsPoE order is for {len(order)} heads, but query has {heads}.")
        group = heads // key.x.shape[2]
        ratios = ms_poe_ratios(order, self.min_ratio, self.max_ratio)[::group]
        slowed = rope_frequencies(size, self.base)[None, :] / ratios[:, None]
        queries = np.repeat(slowed, group, axis=0)
        return turn_at(query.indices, queries), turn_at(key.indices, slowed)
