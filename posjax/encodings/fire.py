"""FIRE: a small network maps the distance, as a share of the query's position, to a bias."""

import dataclasses
import itertools
from typing import ClassVar, Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from posjax import checks
from posjax.encodings.distance import DistanceBias
from posjax.types import Array, Float, Num

__all__ = ["FIRE", "InterpolatedDistance"]

_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class InterpolatedDistance:
    """mlp(psi(i - j) / psi(max(L, i))) for each head, as a function for `RelativeBias`.

    Args:
        initial_threshold: `params["threshold"]` times this is L.
        normaliser: "query" divides by the query's position, "larger" by the later of the two.
    """

    initial_threshold: float = 512.0
    normaliser: Literal["query", "larger"] = "query"

    def __post_init__(self):
        checks.fields(self, initial_threshold=checks.above(0))

    def __call__(
        self,
        params: dict[str, Array],
        query_positions: Num[Array, "#B T"],
        key_positions: Num[Array, "#B S"],
    ) -> Float[Array, "#B N T S"]:
        """The bias in float32."""
        share = self.share(params, query_positions, key_positions)[..., None]
        layers = sum(name.startswith("kernel") for name in params)
        for layer in range(layers):
            kernel, bias = params[f"kernel_{layer}"], params[f"bias_{layer}"]
            share = jax.nn.relu(share) if layer else share
            exact = jax.lax.Precision.HIGHEST
            share = jnp.einsum("btsi,io->btso", share, kernel, precision=exact)
            share += bias[None, None, None, :]
        return jnp.moveaxis(share, 3, 1)

    def share(
        self,
        params: dict[str, Array],
        query_positions: Num[Array, "#B T"],
        key_positions: Num[Array, "#B S"],
    ) -> Float[Array, "#B T S"]:
        """psi(i - j) / psi(max(L, i)), which is in [0, 1] for keys that are not after the query."""
        i, j = query_positions[:, :, None], key_positions[:, None, :]
        last = i if self.normaliser == "query" else jnp.maximum(i, j)
        distance, last = (
            jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (jnp.abs(i - j), last)
        )
        threshold = jnp.abs(params["threshold"] * self.initial_threshold)
        psi = lambda x: jnp.log1p(jnp.abs(params["c"] * x))  # noqa: E731
        return psi(distance) / (psi(jnp.maximum(last, threshold)) + _EPSILON)


class FIRE(DistanceBias):
    """Adds a trained function of the distance as a share of the query's position (interpolation).

        logit_ij = H^-0.5 q_i . k_j + mlp(psi(i - j) / psi(max(L, i)))_n
        psi(x)   = log(|c x| + 1)                                            mlp: 1 -> 32 -> N, ReLU

    Longer contexts are squeezed into [0, 1]. For queries before L the divisor is constant, so
    nothing is interpolated there: set `initial_threshold` to the training length of short tasks.
    The bias is not multiplied by the attention's scale.

    Parameters of each layer, float32: c (), 0.1 at the start; threshold (), 1 at the start, times
    `initial_threshold` is L; kernel_l and bias_l of the network, uniform between +-(inputs)^-0.5 at
    the start (PyTorch's default). As in the reference listing of the paper (its appendix), |c x|
    keeps psi positive and 1e-6 is added to the divisor; the listing has one hidden layer, the
    paper's text two (`FIRE.two_hidden()`). FIRE-S has one network for all layers
    (`FIRE.shared_layers()`); heads always differ. To train on random positions, as the paper also
    does, wrap it: `Randomized(FIRE())`.

    Every position is defined. Keys after the query count by |i - j|, as in the listing; the share
    may then exceed 1, which normaliser="larger" (for encoders) avoids. In causal attention both are
    the same. Tested against a transcription of the listing.

    Args:
        hidden_layers: at least 1.
        hidden_width: units of a hidden layer; at least 1.
        initial_c: c at the start; above 0.
        initial_threshold: L at the start; above 0.
        normaliser: the position that divides the distance: the query's, or the larger one.
        share_layers: FIRE-S.

    References:
        Li et al., Functional Interpolation for Relative Positions Improves Long Context
        Transformers, arXiv:2310.04418, section 3.

    >>> from posjax.encodings.base import Side
    >>> x, p = jnp.ones((1, 3, 2, 4)), jnp.array([[0, 1, 2]])
    >>> variables = FIRE().init(jax.random.key(0), Side(x, p), Side(x, p), method="bias")
    >>> variables["params"]["kernel_0"].shape, variables["params"]["kernel_1"].shape
    ((1, 32), (32, 2))
    """

    hidden_layers: int = 1
    hidden_width: int = 32
    initial_c: float = 0.1
    initial_threshold: float = 512.0
    normaliser: Literal["query", "larger"] = "query"
    share_layers: bool = False
    distance_only: ClassVar[bool] = False

    def __post_init__(self):
        checks.fields(
            self,
            hidden_layers=checks.at_least(1),
            hidden_width=checks.at_least(1),
            initial_c=checks.above(0),
            initial_threshold=checks.above(0),
        )
        super().__post_init__()

    @classmethod
    def two_hidden(cls) -> Self:
        """Two hidden layers, as in the paper's text."""
        return cls(hidden_layers=2)

    @classmethod
    def shared_layers(cls) -> Self:
        """FIRE-S: one function for all layers."""
        return cls(share_layers=True)

    def function(self, heads):
        """The network at the shares."""
        return InterpolatedDistance(self.initial_threshold, self.normaliser)

    @nn.compact
    def parameters(self, sizes):
        """c, the threshold and the network's kernels and biases, by name."""
        constant = nn.initializers.constant
        params = {
            "c": self.param("c", constant(self.initial_c), (), jnp.float32),
            "threshold": self.param("threshold", constant(1.0), (), jnp.float32),
        }
        widths = (1, *(self.hidden_width,) * self.hidden_layers, sizes.heads)
        for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            start = _uniform(inputs**-0.5)
            for name, shape in (("kernel", (inputs, outputs)), ("bias", (outputs,))):
                name = f"{name}_{layer}"
                params[name] = self.param(name, start, shape, jnp.float32)
        return params


def _uniform(bound: float) -> nn.initializers.Initializer:
    """Uniform between -bound and bound."""
    return lambda rng, shape, dtype: jax.random.uniform(rng, shape, dtype, -bound, bound)
