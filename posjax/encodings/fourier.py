"""Learnable Fourier features: waves of trained frequencies and a small network, as embeddings."""

from typing import Self

import flax.linen as nn
import jax.numpy as jnp

from posjax import checks
from posjax.encodings.base import PositionEncoding
from posjax.grids import grid_positions
from posjax.types import Array, Float, Num

__all__ = ["Fourier", "fourier_features"]


@checks.arguments()
def fourier_features(
    x: Num[Array, "*places M"], frequencies: Float[Array, "half M"]
) -> Float[Array, "*places F"]:
    """Cosines and sines of a place with M coordinates, half = F / 2 waves of each.

        features = F^-0.5 [cos(frequencies x), sin(frequencies x)]

    With frequencies drawn from N(0, gamma^-2) two places have the product

        features(x) . features(y) = exp(-|x - y|^2 / (2 gamma^2)) / 2        on average

    Returns:
        float32, of norm 0.5^0.5.

    >>> fourier_features(jnp.zeros((1, 1)), jnp.ones((2, 1))).tolist()
    [[0.5, 0.5, 0.0, 0.0]]
    """
    angles = jnp.einsum("...m,fm->...f", x.astype(jnp.float32), frequencies, precision="highest")
    waves = jnp.concatenate((jnp.cos(angles), jnp.sin(angles)), axis=-1)
    return waves * waves.shape[-1] ** -0.5


class Fourier(PositionEncoding):
    """Adds a network of Fourier features of the position to the token embeddings, once.

        r = F^-0.5 [cos(W_r x), sin(W_r x)]     x = coordinates of the place / length  (`grid`)
        embedding + [GeLU(r W_1 + b_1) W_2 + b_2  for each group of coordinates]

    The coordinates are split into G groups of M; all groups share the parameters, and each gives
    D / G channels. W_r is trained; it starts from N(0, gamma^-2), where gamma^-2 is the variance
    (circulating PyTorch code takes it as the deviation). So gamma is the distance, in units of x,
    within which places are alike at the start. Kernels of the network start normal (truncated, with
    variance 1 / inputs), biases at 0. GeLU is the exact one.

    Every position is defined and is a continuous function of the place, fractions included; beyond
    the trained length the network sees features it was not trained on. Positions must be divided by
    the same `length` in training and afterwards. Tested against a transcription of the formula in
    float64. Parameters, float32: frequencies W_r [F / 2, M], up (W_1 [F, hidden], b_1), down
    (W_2 [hidden, D / G], b_2).

    Args:
        features: F, even.
        hidden: hidden size of the network.
        gamma: above 0.
        length: positions and coordinates are divided by it; above 0.
        grid: sizes of the axes of a grid that positions number row by row; None for one axis.
        groups: G; divides the number of coordinates and the width.

    Raises:
        ValueError: settings outside these ranges; a width that `groups` does not divide.

    References:
        Li, Si, Li, Hsieh, Bengio, Learnable Fourier Features for Multi-Dimensional Spatial
        Positional Encoding, arXiv:2106.02795, section 3, algorithm 1.

    >>> import jax
    >>> x, p = jnp.zeros((1, 3, 8)), jnp.array([[0, 1, 2]])
    >>> variables = Fourier().init(jax.random.key(0), x, p, method="embed")
    >>> jax.tree.map(jnp.shape, variables["params"]["frequencies"])
    (32, 1)
    """

    features: int = 64
    hidden: int = 32
    gamma: float = 0.01
    length: float = 1024.0
    grid: tuple[int, ...] | None = None
    groups: int = 1

    def __post_init__(self):
        checks.fields(
            self,
            features=checks.Limits(low=2, multiple_of=2),
            hidden=checks.at_least(1),
            gamma=checks.above(0),
            length=checks.above(0),
            grid=checks.at_least(1),
            groups=checks.at_least(1),
        )
        axes = 1 if self.grid is None else len(self.grid)
        wanted = f"a divisor of the number of coordinates, {axes}"
        checks.require("Fourier groups", self.groups, axes % self.groups == 0, wanted)
        super().__post_init__()

    @classmethod
    def image(cls) -> Self:
        """Both coordinates of 32 x 32 places in one group, so that distances are Euclidean."""
        return cls(grid=(32, 32), length=32.0, gamma=0.1)

    @nn.compact
    def embed(self, embeddings, indices):
        """The embeddings plus the network's output, summed in float32."""
        width, start = embeddings.shape[-1], nn.initializers.normal(1 / self.gamma)
        if width % self.groups:
            got = f"Fourier groups is {self.groups} and the width {width}"
            raise ValueError(f"{got}; groups must divide it.")
        x = grid_positions(indices, (1,) if self.grid is None else self.grid)
        x = x.reshape(*indices.shape, self.groups, x.shape[-1] // self.groups)
        x = x.astype(jnp.float32) / self.length
        shape = (self.features // 2, x.shape[-1])
        r = fourier_features(x, self.param("frequencies", start, shape, jnp.float32))
        size = width // self.groups
        up = nn.gelu(nn.Dense(self.hidden, dtype=jnp.float32, name="up")(r), approximate=False)
        out = nn.Dense(size, dtype=jnp.float32, name="down")(up).reshape(*indices.shape, width)
        return (embeddings.astype(jnp.float32) + out).astype(embeddings.dtype)
