"""Laplacian position encoding: the slowest waves on a graph."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from posjax import checks
from posjax.graphs.base import Adjacency, GraphEncoding, prepare
from posjax.types import Array, Bool, Float

__all__ = ["LapPE", "laplacian_eigenvectors", "normalized_adjacency", "normalized_laplacian"]


@checks.arguments()
def normalized_adjacency(
    adjacency: Adjacency, mask: Bool[Array, "*B n"] | None = None
) -> Float[Array, "*B n n"]:
    """D^-1/2 A D^-1/2 with the degrees D; loops of a node to itself do not count.

    Its eigenvalues lie between -1 and 1. Nodes without edges have zeros.

    >>> normalized_adjacency(jnp.array([[1, 4], [4, 0]])).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    weights, _ = prepare(adjacency, mask)
    weights = weights * (1 - _identity(weights))
    degree = jnp.sum(weights, axis=-1)
    root = jnp.where(degree > 0, jax.lax.rsqrt(jnp.where(degree > 0, degree, 1)), 0)
    return root[..., :, None] * weights * root[..., None, :]


@checks.arguments()
def normalized_laplacian(
    adjacency: Adjacency, mask: Bool[Array, "*B n"] | None = None
) -> Float[Array, "*B n n"]:
    """I - D^-1/2 A D^-1/2, whose eigenvalues lie between 0 and 2.

    A node without edges has 1 on the diagonal, as in PyTorch Geometric (networkx has 0).

    >>> normalized_laplacian(jnp.array([[0, 1], [1, 0]])).tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    spread = normalized_adjacency(adjacency, mask)
    return _identity(spread) - spread


@checks.arguments(count=checks.size())
def laplacian_eigenvectors(
    adjacency: Adjacency,
    count: int | None = None,
    mask: Bool[Array, "*B n"] | None = None,
) -> tuple[Float[Array, "*B k"], Float[Array, "*B n k"], Bool[Array, "*B k"]]:
    """The smallest eigenvalues of the normalised Laplacian and their eigenvectors.

    Eigenvectors have length 1; their signs, and their directions where eigenvalues are equal, are
    the solver's choice. The derivative of an eigenvector does not exist where eigenvalues are
    equal, so no gradient flows to the adjacency matrix.

    Args:
        count: k; all n by default. Beyond the number of real nodes everything is 0.

    Returns:
        Eigenvalues in rising order from 0, the trivial ones included (there is one for each
        connected part with edges); eigenvectors; and which of the k there are.

    >>> values, _, known = laplacian_eigenvectors(jnp.array([[0, 1], [1, 0]]), 3)
    >>> values.round(5).tolist(), known.tolist()
    ([0.0, 2.0, 0.0], [True, True, False])
    """
    weights, mask = prepare(adjacency, mask)
    nodes = weights.shape[-1]
    count = nodes if count is None else count
    laplacian = normalized_laplacian(weights, mask)
    # Eigenvalues of padding stand behind all others, which are at most 2.
    padding = jnp.where(mask, 0.0, 2.0)[..., None] * _identity(weights)
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(laplacian + padding))
    missing = [(0, 0)] * (mask.ndim - 1) + [(0, max(count - nodes, 0))]
    values = jnp.pad(values, missing)[..., :count]
    vectors = jnp.pad(vectors, [*missing[:-1], (0, 0), missing[-1]])[..., :count]
    order = jnp.broadcast_to(jnp.arange(count), values.shape)
    known = order < jnp.sum(mask, axis=-1)[..., None]
    vectors = jnp.where(known[..., None, :] & mask[..., None], vectors, 0)
    return jnp.where(known, jnp.maximum(values, 0), 0), vectors, known


class LapPE(GraphEncoding):
    """A network of each eigenvector's value at the node and its eigenvalue, summed over them.

        vector_i = sum over the k smallest eigenvalues lambda_m of f(V_im, lambda_m)
        f: layers of (linear, ReLU): 2 -> 2 width -> ... -> 2 width -> width

    Signs of eigenvectors have no meaning, so in training each is multiplied by 1 or -1 at random
    (rng stream "encoding"), for each graph; GraphGPS draws one sign for the m-th eigenvectors of a
    whole batch. As there, the trivial eigenvector counts among the k, the Laplacian is the
    symmetric one, and graphs with fewer nodes have fewer terms. This is GraphGPS's DeepSet encoder;
    its other one is a transformer over the eigenvectors. Tested against the same layers in PyTorch.
    Parameters, float32: layer_0, layer_1, ...: kernels and biases.

    Args:
        eigenvectors: k, at least 1.
        layers: at least 1; with one it is 2 -> width.

    References:
        Dwivedi, Bresson, A Generalization of Transformer Networks to Graphs, arXiv:2012.09699,
        section 2 (the eigenvectors).
        Rampášek et al., Recipe for a General, Powerful, Scalable Graph Transformer,
        arXiv:2205.12454 (the network).

    >>> edges = jnp.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    >>> vectors, _ = LapPE(width=4).init_with_output(jax.random.key(0), edges)
    >>> vectors.shape
    (3, 4)
    """

    eigenvectors: int = 10
    layers: int = 2
    is_sign_invariant: ClassVar[bool] = False
    is_basis_invariant: ClassVar[bool] = False

    def __post_init__(self):
        checks.fields(self, eigenvectors=checks.at_least(1), layers=checks.at_least(1))
        super().__post_init__()

    @nn.compact
    def __call__(self, adjacency, mask=None, *, deterministic=True):
        """Vectors in float32."""
        checks.flag("deterministic", deterministic)
        values, vectors, known = laplacian_eigenvectors(adjacency, self.eigenvectors, mask)
        if not deterministic:
            signs = jax.random.rademacher(self.make_rng("encoding"), values.shape, jnp.float32)
            vectors = vectors * signs[..., None, :]
        x = jnp.stack((vectors, jnp.broadcast_to(values[..., None, :], vectors.shape)), axis=-1)
        sizes = [2 * self.width] * (self.layers - 1) + [self.width]
        for index, size in enumerate(sizes):
            x = nn.relu(nn.Dense(size, name=f"layer_{index}")(x))
        total = jnp.sum(jnp.where(known[..., None, :, None], x, 0), axis=-2)
        return total if mask is None else jnp.where(mask[..., None], total, 0)


def _identity(like: Array) -> Float[Array, "*B n n"]:
    return jnp.broadcast_to(jnp.eye(like.shape[-1]), like.shape)
