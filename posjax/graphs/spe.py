"""Stable and expressive position encoding (SPE) of graphs: soft partitions of the spectrum."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from posjax import checks
from posjax.graphs.base import GraphEncoding, prepare
from posjax.graphs.laplacian import laplacian_eigenvectors
from posjax.types import Array, Bool, Float

__all__ = ["SPE", "spectral_filters"]


@checks.arguments()
def spectral_filters(
    vectors: Float[Array, "*B n k"], filtered: Float[Array, "*B k M"]
) -> Float[Array, "*B n n M"]:
    """Matrices that scale each eigenvector by a function of its eigenvalue.

        W_m = V diag(psi_m(lambda)) V^T                    `filtered` is psi_m(lambda)

    Where equal eigenvalues have equal numbers in `filtered`, W does not depend on the choice of
    eigenvectors.

    >>> spectral_filters(jnp.eye(2), jnp.array([[3.0], [4.0]]))[..., 0].tolist()
    [[3.0, 0.0], [0.0, 4.0]]
    """
    return jnp.einsum("...ik,...jk,...km->...ijm", vectors, vectors, filtered, precision="highest")


class SPE(GraphEncoding):
    """A network of soft projections onto parts of the spectrum: invariant to bases, and stable.

        W_m = V diag(psi_m(lambda)) V^T         m = 1 ... filters      (`spectral_filters`)
        vector_i = sum_j Phi(W)_ij              over real nodes j

    psi is a network of each eigenvalue: linear, ReLU, ..., linear ("mlp"), or with the sum over all
    eigenvalues added to each layer and a ReLU at the end ("deepsets"). Phi is a graph isomorphism
    network (GIN) over i, with edges of the graph, for each j alike: layers of
    X_i <- mlp((1 + epsilon) X_i + sum_l A_il X_l), mlp = linear, ReLU, linear. Equal eigenvalues
    get equal psi, so the basis the solver chose does not matter, and a small change of the graph
    changes vectors little, even where eigenvalues nearly meet.

    The authors' code has a network for every m, here one network has M outputs; its GIN may
    normalise layers, here none does (that would undo stability), and epsilon starts normal there
    and at 0 here. All eigenvectors are used unless `eigenvectors` is given; a limit can fall
    between equal eigenvalues, and then their basis matters. Memory is O(n^2 (filters + hidden)).
    Tested against loops in float64. No gradient flows to the adjacency matrix through eigenvectors.
    Parameters, float32: psi_0, psi_0_sum, ..., phi_0_in, phi_0_out, epsilon_0, ...

    Args:
        filters: M, at least 1.
        psi: kind of psi.
        psi_layers: at least 1.
        psi_hidden: hidden size of psi, at least 1.
        phi_layers: at least 1.
        phi_hidden: hidden size of Phi, at least 1.
        eigenvectors: how many, from the smallest eigenvalue on; None for all.

    References:
        Huang, Lu, Robinson, Yang, Zhang, Jegelka, Li, On the Stability of Expressive Positional
        Encodings for Graphs, arXiv:2310.02579, section 3.

    >>> import jax
    >>> edges = jnp.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    >>> vectors, _ = SPE(width=4).init_with_output(jax.random.key(0), edges)
    >>> vectors.shape
    (3, 4)
    """

    filters: int = 16
    psi: Literal["mlp", "deepsets"] = "mlp"
    psi_layers: int = 3
    psi_hidden: int = 16
    phi_layers: int = 2
    phi_hidden: int = 32
    eigenvectors: int | None = None

    def __post_init__(self):
        names = ("filters", "psi_layers", "psi_hidden", "phi_layers", "phi_hidden", "eigenvectors")
        checks.fields(self, **dict.fromkeys(names, checks.at_least(1)))
        super().__post_init__()

    @nn.compact
    def __call__(self, adjacency, mask=None, *, deterministic=True):
        """Vectors in float32."""
        checks.flag("deterministic", deterministic)
        weights, real = prepare(adjacency, mask)
        values, vectors, known = laplacian_eigenvectors(weights, self.eigenvectors, real)
        w = spectral_filters(vectors, self._filtered(values, known))
        both = real[..., :, None] & real[..., None, :]
        return jnp.sum(jnp.where(both[..., None], self._phi(w, weights), 0), axis=-2)

    def _filtered(self, values: Array, known: Bool[Array, "*B k"]) -> Float[Array, "*B k M"]:
        """The functions psi at all eigenvalues."""
        x, pooled = values[..., None], self.psi == "deepsets"
        sizes = [self.psi_hidden] * (self.psi_layers - 1) + [self.filters]
        for index, size in enumerate(sizes):
            y = nn.Dense(size, name=f"psi_{index}")(x)
            if pooled:
                total = jnp.sum(jnp.where(known[..., None], x, 0), axis=-2, keepdims=True)
                y = y + nn.Dense(size, use_bias=False, name=f"psi_{index}_sum")(total)
            last = index == len(sizes) - 1
            x = y if last and not pooled else nn.relu(y)
        return x

    def _phi(self, x: Array, weights: Array) -> Float[Array, "*B n n D"]:
        """The network over i, for each j alike."""
        for index in range(self.phi_layers):
            size = self.width if index == self.phi_layers - 1 else self.phi_hidden
            epsilon = self.param(f"epsilon_{index}", nn.initializers.zeros, (), jnp.float32)
            around = jnp.einsum("...il,...ljm->...ijm", weights, x, precision="highest")
            x = nn.Dense(self.phi_hidden, name=f"phi_{index}_in")((1 + epsilon) * x + around)
            x = nn.Dense(size, name=f"phi_{index}_out")(nn.relu(x))
        return x
