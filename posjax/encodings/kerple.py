"""KERPLE: logits fall with a trained logarithm, or a trained power, of the distance."""

import dataclasses
import math
import numbers
from typing import Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from posjax import checks
from posjax.encodings.distance import DistanceBias, OfDistance
from posjax.types import Array, Float, Num

__all__ = ["KERPLE", "KernelDistance", "keep_within"]

_SMALLEST, _GREATEST_POWER = 0.01, 2.0


def keep_within(x: Float[Array, "*shape"], low: float, high: float) -> Float[Array, "*shape"]:
    """clip(x, low, high), with a gradient outside the range too if it leads back inside.

    The gradient of a plain clip is 0 outside, so a parameter would stay there for ever.

    Args:
        low: -inf is no limit.
        high: at least low; inf is no limit.

    >>> jax.grad(lambda x: keep_within(x, 0.0, 1.0))(jnp.float32(-1.0)).item()
    0.0
    >>> jax.grad(lambda x: -keep_within(x, 0.0, 1.0))(jnp.float32(-1.0)).item()
    -1.0
    """
    checks.annotated("x", x, Float[Array, "*shape"])
    for name, limit in (("low", low), ("high", high)):
        is_number = isinstance(limit, numbers.Real) and not isinstance(limit, bool)
        checks.require(name, limit, is_number and not math.isnan(limit), "a number, or infinite")
    checks.require("high", high, high >= low, f"at least low = {low}")
    return _keep_within(x, low, high)


@jax.custom_vjp
def _keep_within(x: Array, low: float, high: float) -> Array:
    return jnp.clip(x, low, high)


def _keep_within_bwd(residuals, cotangent):
    x, low, high = residuals
    leads_out = ((x < low) & (cotangent > 0)) | ((x > high) & (cotangent < 0))
    return jnp.where(leads_out, 0.0, cotangent), None, None


_keep_within.defvjp(lambda x, low, high: (jnp.clip(x, low, high), (x, low, high)), _keep_within_bwd)


@dataclasses.dataclass(frozen=True)
class KernelDistance:
    """-r1 log(1 + r2 |distance|) or -r1 |distance|^r2 for each head."""

    kind: Literal["log", "power"] = "log"

    def __post_init__(self):
        checks.fields(self)

    def __call__(
        self,
        params: tuple[Float[Array, "N"], Float[Array, "N"]],
        distance: Num[Array, "#B 1 T S"],
    ) -> Float[Array, "#B N T S"]:
        """The bias in float32; `params` are r1 and r2, both above 0."""
        distance = jax.lax.stop_gradient(jnp.abs(distance).astype(jnp.float32))
        r1, r2 = (r.astype(jnp.float32)[None, :, None, None] for r in params)
        if self.kind == "log":
            return -r1 * jnp.log1p(r2 * distance)
        return -r1 * distance**r2  # at 0 JAX takes 0 for the derivative by r2, not 0 * log(0)


class KERPLE(DistanceBias):
    """Subtracts a kernel of the distance with two trained numbers for each head from the logits.

        logit_ij = H^-0.5 q_i . k_j - r1_n log(1 + r2_n |i - j|)        "log";   r1, r2 > 0
        logit_ij = H^-0.5 q_i . k_j - r1_n |i - j|^(r2_n)               "power"; r1 > 0, 0 < r2 <= 2

    It is not multiplied by the attention's scale. Parameters: r1 and r2, [N] each, float32, one
    pair for all layers. At the start, log: r1 from U(0, 2), r2 from U(0, 1); power: r1 from
    U(0, 1), r2 from U(0, 2), as in the official code. That clips the stored parameters to
    [0.01, inf) or [0.01, 2] in each forward pass. A function cannot change its parameters, so
    "clamp" clips on use, and a parameter outside gets only gradients that lead back inside
    (`keep_within`). "softplus" trains log(exp(r) - 1) instead, and the logit of r / 2 for the
    power's r2, from the same starts. Left out: the code's optional kernel that multiplies logits,
    and its untrained ALiBi form (`ALiBi`).

    Every distance is defined; the log form extrapolates best in the paper. Without causal attention
    it is symmetric. Tested against a transcription of the official code.

    Args:
        kind: "log" or "power".
        positivity: how r1 and r2 stay above 0.
        share_layers: one pair for all layers, as in the official code, or one in each layer.

    References:
        Chi, Fan, Ramadge, Rudnicky, KERPLE: Kernelized Relative Positional Embedding for Length
        Extrapolation, arXiv:2205.09921, section 4.

    >>> from posjax.encodings.base import Sizes
    >>> variables = KERPLE().init(jax.random.key(0), Sizes(2, 2, 4), method="shared")
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'r1': (2,), 'r2': (2,)}}
    """

    kind: Literal["log", "power"] = "log"
    positivity: Literal["clamp", "softplus"] = "clamp"
    share_layers: bool = True

    @classmethod
    def power(cls) -> Self:
        """A power of the distance."""
        return cls(kind="power")

    def function(self, heads):
        """The kernel."""
        return OfDistance(KernelDistance(self.kind))

    @nn.compact
    def parameters(self, sizes):
        """r1 and r2 within their ranges, [N] each."""
        is_log = self.kind == "log"
        r1 = self._positive("r1", sizes.heads, 2.0 if is_log else 1.0, jnp.inf)
        ends = (1.0, jnp.inf) if is_log else (2.0, _GREATEST_POWER)
        return r1, self._positive("r2", sizes.heads, *ends)

    def _positive(self, name: str, heads: int, width: float, high: float) -> Float[Array, "N"]:
        """A parameter that starts from U(0, width) and stays above 0 and at most `high`."""
        soft = self.positivity == "softplus"

        def start(rng: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
            value = jax.random.uniform(rng, shape, dtype, maxval=width)
            if not soft:
                return value
            value = jnp.clip(value, _SMALLEST, width - _SMALLEST)
            if high < jnp.inf:
                return jax.scipy.special.logit(value / high)
            return value + jnp.log(-jnp.expm1(-value))

        raw = self.param(name, start, (heads,), jnp.float32)
        if not soft:
            return keep_within(raw, _SMALLEST, high)
        return high * jax.nn.sigmoid(raw) if high < jnp.inf else jax.nn.softplus(raw)
