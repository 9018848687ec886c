"""The base of encodings of places in a graph: vectors for the nodes, from the adjacency matrix."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from posjax import checks
from posjax.types import Array, Bool, Float, Num

__all__ = ["Adjacency", "GraphEncoding", "prepare"]

Adjacency = Num[Array, "*B n n"] | Bool[Array, "*B n n"]


class GraphEncoding(nn.Module):
    """A module that gives every node of an undirected graph a vector of `width` channels.

    Graphs of different sizes are padded to n nodes; `mask` says which are real. Vectors of padding
    are 0, and nothing depends on how much there is. Renumbering the nodes renumbers the vectors.
    The vectors are added to, or stand beside, the features of the nodes. Each encoding says as
    class variables:

        is_sign_invariant: whether vectors stay when eigenvectors change their signs.
        is_basis_invariant: whether they stay when eigenvectors of one eigenvalue are turned among
            themselves.
        is_random: whether they are drawn anew at every call, from the rng stream "encoding".

    Args:
        width: channels of the vectors; at least 1.
    """

    width: int = 16
    is_sign_invariant: ClassVar[bool] = True
    is_basis_invariant: ClassVar[bool] = True
    is_random: ClassVar[bool] = False

    def __post_init__(self):
        checks.fields(self, width=checks.at_least(1))
        super().__post_init__()

    def __call__(
        self,
        adjacency: Adjacency,
        mask: Bool[Array, "*B n"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "*B n D"]:
        """Vectors in float32.

        Args:
            adjacency: symmetric weights of the edges, 0 or more.
            mask: True for real nodes; all are by default.
            deterministic: False in training.
        """
        raise NotImplementedError


@checks.arguments()
def prepare(
    adjacency: Adjacency, mask: Bool[Array, "*B n"] | None = None
) -> tuple[Float[Array, "*B n n"], Bool[Array, "*B n"]]:
    """The adjacency matrix in float32 without edges of padding, and a mask.

    Raises:
        ValueError: shapes or types that do not fit, named with their values.

    >>> weights, mask = prepare(jnp.ones((2, 2), bool), jnp.array([True, False]))
    >>> weights.tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    checks.shape("adjacency", adjacency, (..., "n", "n"), empty=False)
    shape = adjacency.shape
    if mask is None:
        mask = jnp.ones(shape[:-1], bool)
    both = mask[..., :, None] & mask[..., None, :]
    return jnp.where(both, adjacency.astype(jnp.float32), 0), mask
