"""HeadScale: one trained scale for each head on the logits, for longer contexts with NoPE."""

import math
from typing import Self

import flax.linen as nn
import jax.numpy as jnp

from posjax import checks
from posjax.encodings.base import PositionEncoding
from posjax.encodings.kerple import keep_within
from posjax.types import Array, Float, Num

__all__ = ["HeadScale", "scale_heads"]


@checks.arguments()
def scale_heads(query: Num[Array, "B T N H"], scale: Float[Array, "#N"]) -> Num[Array, "B T N H"]:
    """Each head of the query times its scale; in float32, with query's dtype.

    >>> scale_heads(jnp.ones((1, 1, 2, 1)), jnp.array([1.0, 3.0]))[0, 0].tolist()
    [[1.0], [3.0]]
    """
    return (query.astype(jnp.float32) * scale[None, None, :, None]).astype(query.dtype)


class HeadScale(PositionEncoding):
    """Multiplies the logits of each head by a trained number of at least `lower_bound`, per layer.

        logit_ij = s_n H^-0.5 q_i . k_j        s_n = max(scale_n, lower_bound)

    It acts on the query. Without any position encoding (NoPE) this keeps attention from spreading
    in contexts longer than the trained ones: the authors add it to a trained NoPE model and train
    only the scales, for 200 steps at the new length (freeze the rest in the optimizer). Their
    parameter is bfloat16 and is clamped after every step; here the bound is in the forward pass,
    with a gradient that leads back up from below it (`posjax.encodings.kerple.keep_within`). It
    joins other encodings in combinations, "head_scale+rope", but the authors found that it helps
    NoPE, not RoPE. Parameter: scale [N], float32; none for `uniform`.

    Every length is defined. Tested against a transcription of the formula.

    Args:
        initial: the scales at the start, or always if they are not trained; at least
            lower_bound.
        lower_bound: above 0.
        trained: whether they are parameters.

    References:
        Wang, Ji, Wu, Yan, Gui, Zhang, Huang, Wang, Length Generalization of Causal Transformers
        without Position Encoding, arXiv:2404.12224.

    >>> from jax import random
    >>> from posjax.encodings.base import Side
    >>> side = Side(jnp.ones((1, 3, 2, 4)), jnp.arange(3)[None])
    >>> HeadScale(initial=1.5).init(random.key(0), side, side, method="rotate")
    {'params': {'scale': Array([1.5, 1.5], dtype=float32)}}
    """

    initial: float = 1.0
    lower_bound: float = 1.0
    trained: bool = True

    def __post_init__(self):
        checks.fields(self, lower_bound=checks.above(0))
        wanted = f"at least lower_bound = {self.lower_bound}"
        checks.require("HeadScale initial", self.initial, self.initial >= self.lower_bound, wanted)
        super().__post_init__()

    @classmethod
    def paper(cls) -> Self:
        """The authors' start for 4 times the trained length (2048 to 8192)."""
        return cls(initial=1.6)

    @classmethod
    def uniform(cls) -> Self:
        """UniformScale: one fixed factor for all heads, 1.2."""
        return cls(initial=1.2, trained=False)

    @nn.compact
    def rotate(self, query, key):
        """The query times its heads' scales, and the key as it is."""
        if not self.trained:
            return scale_heads(query.x, jnp.full((1,), self.initial, jnp.float32)), key.x
        start = nn.initializers.constant(self.initial)
        scale = self.param("scale", start, (query.x.shape[2],), jnp.float32)
        return scale_heads(query.x, keep_within(scale, self.lower_bound, math.inf)), key.x
