"""Transformer-XL's relative positions: queries look at projected sinusoids of the distance."""

from typing import Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from posjax import checks
from posjax.biases.products import SinusoidBias
from posjax.encodings.base import PositionEncoding
from posjax.encodings.t5 import check_shared
from posjax.types import Array, Float

__all__ = ["TransformerXL"]


class TransformerXL(PositionEncoding):
    """Adds a product of the query and a projected sinusoid of the distance to the logits.

        logit_ij = H^-0.5 ((q_i + u_n) . k_j + (q_i + v_n) . kernel_n^T R_{i-j})
        R_d      = (sin(d w_0), ..., cos(d w_0), ...)        w_m = base^(-2m / width), width of them

    The pure form is `posjax.SinusoidBias`. Parameters of each layer, float32: kernel
    [width, N, H], content_bias u and position_bias v [N, H]; all normal with deviation 0.02 at the
    start, as in the official code. That trains one u and v for all layers (`untie_r=False`, and
    always in PyTorch) or, in its published TensorFlow scripts, one pair in each; the projection
    is always of the layer: `TransformerXL.tied()` and the default. Its recurrence of segments is a
    matter of the cache, and its optional `clamp_len` (a cap on distances) is left out.

    Every distance is defined, but sinusoids at distances beyond the trained ones have not been
    seen. Without causal attention R of negative distances is used (Ruoss et al. and XLNet do so).
    Tested live against Hugging Face's XLNet, in both directions.

    Args:
        width: numbers in R, even; None for N * H, which is the paper's model width.
        base: of the frequencies; greater than 1.
        share_layers: one u and v for all layers.
        initial_deviation: standard deviation of all parameters at the start.

    References:
        Dai, Yang, Yang, Carbonell, Le, Salakhutdinov, Transformer-XL: Attentive Language Models
        Beyond a Fixed-Length Context, arXiv:1901.02860, section 3.3 and appendix B.

    >>> x, p = jnp.ones((1, 3, 2, 4)), jnp.array([[0, 1, 2]])
    >>> variables = TransformerXL().init(jax.random.key(0), x, x, x, p, p, method="bias")
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

    def shared(self, sizes):
        """The u and v of all layers; None where each layer has its own."""
        return self._biases(sizes.heads, sizes.head_size) if self.share_layers else None

    def bias(self, query, key, value, query_indices, key_indices, memory=None, shared=None):
        """The terms that the logit has beside the product of query and key."""
        heads, size = query.shape[2:]
        width = heads * size if self.width is None else self.width
        if width % 2:
            raise ValueError(f"TransformerXL width is N * H = {width} here; set an even `width`.")
        if self.share_layers:
            check_shared("TransformerXL", shared)
        u, v = shared if self.share_layers else self._biases(heads, size)
        return SinusoidBias(
            kernel=self._trained("kernel", (width, heads, size)),
            query_bias=v,
            key_logits=_products(key, u),
            query_positions=query_indices,
            key_positions=key_indices,
            base=self.base,
        )

    def _biases(self, heads: int, size: int) -> tuple[Float[Array, "N H"], Float[Array, "N H"]]:
        shape = (heads, size)
        return self._trained("content_bias", shape), self._trained("position_bias", shape)

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
    return products.reshape(batch, length, -1)
