"""Transformer-XL's relative positions: queries times projected sinusoids of the distance."""

from typing import Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from posjax import checks
from posjax.biases.products import SinusoidBias
from posjax.encodings.distance import TrainedBias
from posjax.types import Array, Float

__all__ = ["TransformerXL"]


class TransformerXL(TrainedBias):
    """Adds a product of the query and a projected sinusoid of the distance to the logits.

        logit_ij = H^-0.5 ((q_i + u_n) . k_j + (q_i + v_n) . kernel_n^T R_{i-j})
        R_d      = (sin(d w_0), ..., cos(d w_0), ...)      w_m = base^(-2m / width), m < width / 2

    The pure form is `posjax.SinusoidBias`. Parameters of each layer, float32: kernel
    [width, N, H], content_bias u and position_bias v [N, H]; all normal with deviation 0.02 at the
    start, as in the official code. That trains one u and v for all layers (`untie_r=False`, and
    always in PyTorch), which is `TransformerXL.tied()`, or, in its published TensorFlow scripts,
    one pair in each layer, the default here; each layer always has its own projection. Its
    recurrence of segments is a matter of the cache, and its optional `clamp_len` (a cap on
    distances) is left out.

    Every distance is defined, but sinusoids at distances beyond the trained ones are new to the
    model. Without causal attention R of negative distances is used, as by Ruoss et al. and XLNet.
    Tested against Hugging Face's XLNet, in both directions.

    Args:
        width: numbers in R, even; None for N * H, which is the paper's model width.
        base: of the frequencies; greater than 1.
        share_layers: one u and v for all layers, or one pair in each layer.
        initial_deviation: standard deviation of all parameters at the start.

    References:
        Dai, Yang, Yang, Carbonell, Le, Salakhutdinov, Transformer-XL: Attentive Language Models
        Beyond a Fixed-Length Context, arXiv:1901.02860, section 3.3 and appendix B.

    >>> from posjax.encodings.base import Side
    >>> x, p = jnp.ones((1, 3, 2, 4)), jnp.array([[0, 1, 2]])
    >>> variables = TransformerXL().init(jax.random.key(0), Side(x, p), Side(x, p), method="bias")
    >>> variables["params"]["kernel"].shape
    (8, 2, 4)
    """

    width: int | None = None
    base: float = 10_000.0
    share_layers: bool = False
    initial_deviation: float = 0.02

    def __post_init__(self):
        checks.fields(
            self,
            width=checks.Limits(low=2, multiple_of=2),
            base=checks.above(1),
            initial_deviation=checks.at_least(0),
        )
        super().__post_init__()

    @classmethod
    def tied(cls) -> Self:
        """One u and v for all layers."""
        return cls(share_layers=True)

    def parameters(self, sizes):
        """The biases u and v, [N, H] each."""
        shape = (sizes.heads, sizes.head_size)
        return self._trained("content_bias", shape), self._trained("position_bias", shape)

    def bias(self, query, key, shared=None):
        """All terms of the logit but the product of query and key."""
        heads, size = query.x.shape[2:]
        width = heads * size if self.width is None else self.width
        if width % 2:
            raise ValueError(f"TransformerXL width is N * H = {width} here; set an even `width`.")
        u, v = self.parameters_of_layer(query, key, shared)
        return SinusoidBias(
            kernel=self._trained("kernel", (width, heads, size)),
            query_bias=v,
            key_logits=_products(key.x, u),
            query_positions=query.indices,
            key_positions=key.indices,
            base=self.base,
        )

    @nn.compact
    def _trained(self, name: str, shape: tuple[int, ...]) -> Array:
        start = nn.initializers.normal(self.initial_deviation)
        return self.param(name, start, shape, jnp.float32)


def _products(key: Array, u: Float[Array, "N H"]) -> Float[Array, "B S N"]:
    """u_n . k_j for the key head of each query head."""
    batch, length, kv_heads, size = key.shape
    u = u.reshape(kv_heads, -1, size)
    exact = jax.lax.Precision.HIGHEST
    products = jnp.einsum("bskh,kgh->bskg", key.astype(jnp.float32), u, precision=exact)
    return products.reshape(batch, length, kv_heads * u.shape[1])
