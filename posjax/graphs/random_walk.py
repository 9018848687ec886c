"""Random walk encoding: how likely a walk is back at its node after 1, 2, 3, ... steps."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from posjax import checks
from posjax.graphs.base import Adjacency, GraphEncoding, prepare
from posjax.types import Array, Bool, Float

__all__ = ["RWSE", "random_walk_returns"]


@checks.arguments(steps=checks.size())
def random_walk_returns(
    adjacency: Adjacency, steps: int, mask: Bool[Array, "*B n"] | None = None
) -> Float[Array, "*B n steps"]:
    """Probabilities that a random walk from a node is back at it after t steps.

        returns[i, t - 1] = (P^t)_ii            P = D^-1 A,  t = 1 ... steps

    Loops count; from a node without edges the walk is nowhere.

    >>> random_walk_returns(jnp.array([[0, 1], [1, 0]]), 3).tolist()
    [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    """
    weights, _ = prepare(adjacency, mask)
    degree = jnp.sum(weights, axis=-1, keepdims=True)
    step = jnp.where(degree == 0, 0, weights / jnp.where(degree == 0, 1, degree))

    def walk(power: Array, _: None) -> tuple[Array, Array]:
        home = jnp.diagonal(power, axis1=-2, axis2=-1)
        return jnp.matmul(power, step, precision="highest"), home

    returns = jax.lax.scan(walk, step, length=steps)[1]
    return jnp.moveaxis(returns, 0, -1)


class RWSE(GraphEncoding):
    """A linear map of the normalised probabilities that a random walk returns to the node.

        vector_i = W norm((P^1)_ii, ..., (P^steps)_ii) + b            `random_walk_returns`

    norm is batch normalisation over all real nodes of the batch; in training (`deterministic` is
    False) its statistics are those of the batch, and the collection "batch_stats" must be mutable.
    Nothing depends on signs or on the numbering of nodes. As in GraphGPS's setting for ZINC (steps
    1 ... 20, "Linear", "BatchNorm"), and tested against the same layers in PyTorch; PyTorch's
    running variance is the unbiased one. Parameters, float32: norm (scale, bias), linear (kernel,
    bias).

    Args:
        steps: at least 1.

    References:
        Dwivedi, Luu, Laurent, Bengio, Bresson, Graph Neural Networks with Learnable Structural and
        Positional Representations, arXiv:2110.07875, section 3.
        Rampášek et al., Recipe for a General, Powerful, Scalable Graph Transformer,
        arXiv:2205.12454.

    >>> edges = jnp.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    >>> vectors, _ = RWSE(width=4).init_with_output(jax.random.key(0), edges)
    >>> vectors.shape
    (3, 4)
    """

    steps: int = 20

    def __post_init__(self):
        checks.fields(self, steps=checks.at_least(1))
        super().__post_init__()

    @nn.compact
    def __call__(self, adjacency, mask=None, *, deterministic=True):
        """Vectors in float32."""
        checks.flag("deterministic", deterministic)
        returns = random_walk_returns(adjacency, self.steps, mask)
        norm = nn.BatchNorm(use_running_average=deterministic, momentum=0.9, name="norm")
        real = None if mask is None else mask[..., None]
        vectors = nn.Dense(self.width, name="linear")(norm(returns, mask=real))
        return vectors if real is None else jnp.where(real, vectors, 0)
