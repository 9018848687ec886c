"""Random feature propagation: random vectors, spread over the graph again and again."""

from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from posjax import checks
from posjax.graphs.base import GraphEncoding, prepare
from posjax.graphs.laplacian import normalized_adjacency, normalized_laplacian
from posjax.types import Array, Float

__all__ = ["RFP", "orthonormal", "propagate"]

_DEPENDENT = 1e-5  # a column with this part of its length, or less, is a sum of the ones before it


@checks.arguments()
def orthonormal(x: Float[Array, "*B n k"]) -> Float[Array, "*B n k"]:
    """The columns made orthogonal and of length 1, one after another (Gram-Schmidt).

    A column that depends on the ones before it becomes 0.

    >>> (orthonormal(jnp.array([[3.0, 1.0, 5.0], [0.0, 2.0, 5.0]])) + 0.0).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    least = _DEPENDENT * jnp.linalg.norm(x, axis=-2)

    def add(index: int, done: Array) -> Array:
        column = x[..., index, None]
        for _ in range(2):  # once more for what rounding left
            along = jnp.matmul(done.mT, column, precision="highest")
            column = column - jnp.matmul(done, along, precision="highest")
        length = jnp.linalg.norm(column, axis=-2)[..., 0]
        dependent = length <= least[..., index]  # not where it is not a number
        column = column[..., 0] / jnp.where(dependent, 1, length)[..., None]
        return done.at[..., index].set(jnp.where(dependent[..., None], 0, column))

    return jax.lax.fori_loop(0, x.shape[-1], add, jnp.zeros_like(x))


@checks.arguments(steps=checks.size())
def propagate(
    operator: Float[Array, "*B n n"],
    features: Float[Array, "*B n k"],
    steps: int,
    normalization: Literal["orthonormal", "length"] = "orthonormal",
) -> Float[Array, "*B n trajectory"]:
    """The features and what becomes of them when the operator is applied again and again.

        X_0 = norm(features),  X_t = norm(operator X_{t-1})
        trajectory = [X_0, X_1, ..., X_steps]                           (steps + 1) * k channels

    norm makes all columns orthonormal ("orthonormal"; X_t goes to eigenvectors of the k eigenvalues
    of greatest size: subspace iteration), or divides each column by its length ("length": all of
    them go to the first eigenvector).

    >>> propagate(jnp.diag(jnp.array([2.0, 1.0])), jnp.ones((2, 1)), 30)[:, -1].round(4).tolist()
    [1.0, 0.0]
    """
    norm = orthonormal if normalization == "orthonormal" else _of_length_one

    def step(x: Array, _: None) -> tuple[Array, Array]:
        x = norm(jnp.matmul(operator, x, precision="highest"))
        return x, x

    first = norm(features)
    later = jax.lax.scan(step, first, length=steps)[1]
    trajectory = jnp.moveaxis(jnp.concatenate((first[None], later)), 0, -2)
    return trajectory.reshape(*features.shape[:-1], -1)


class RFP(GraphEncoding):
    """A linear map of random features and their trajectory over the graph (`propagate`).

        vector_i = W [R, norm(S R), norm(S norm(S R)), ...]_i + b        R_ij drawn from N(0, 1)

    S is D^-1/2 A D^-1/2 or the normalised Laplacian. The trajectory goes from random features,
    which tell all nodes apart, to eigenvectors of S, without an eigenvalue solver; their signs and
    basis are those of R. R is drawn at every call (rng stream "encoding"), in training and
    afterwards, and is normalised too; the numbering of nodes matters to the draw only. The paper
    also learns S, and averages over several trajectories; neither is here. Tested against a
    Gram-Schmidt process in float64, and against the eigenvectors it converges to. Parameters,
    float32: linear (kernel [(steps + 1) * features, width], bias). No gradient flows to the
    adjacency matrix.

    Args:
        features: k, columns of R; at least 1. Beyond the number of nodes orthonormal columns are 0.
        steps: at least 1.

    References:
        Eliasof, Frasca, Bevilacqua, Treister, Chechik, Maron, Graph Positional Encoding via Random
        Feature Propagation, arXiv:2303.02918, section 3.

    >>> edges = jnp.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    >>> keys = {"params": jax.random.key(0), "encoding": jax.random.key(1)}
    >>> RFP(width=4).init_with_output(keys, edges)[0].shape
    (3, 4)
    """

    features: int = 4
    steps: int = 8
    operator: Literal["adjacency", "laplacian"] = "adjacency"
    normalization: Literal["orthonormal", "length"] = "orthonormal"
    is_random: ClassVar[bool] = True

    def __post_init__(self):
        checks.fields(self, features=checks.at_least(1), steps=checks.at_least(1))
        super().__post_init__()

    @nn.compact
    def __call__(self, adjacency, mask=None, *, deterministic=True):
        """Vectors in float32."""
        checks.flag("deterministic", deterministic)
        weights, real = prepare(adjacency, mask)
        make = normalized_adjacency if self.operator == "adjacency" else normalized_laplacian
        shape = (*real.shape, self.features)
        random = jnp.where(real[..., None], jax.random.normal(self.make_rng("encoding"), shape), 0)
        trajectory = propagate(make(weights, real), random, self.steps, self.normalization)
        vectors = nn.Dense(self.width, name="linear")(jax.lax.stop_gradient(trajectory))
        return jnp.where(real[..., None], vectors, 0)


def _of_length_one(x: Array) -> Array:
    length = jnp.linalg.norm(x, axis=-2, keepdims=True)
    return x / jnp.where(length == 0, 1, length)
