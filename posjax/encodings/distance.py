"""Biases with trained arrays, for each layer or for all, and biases of the distance."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from posjax import checks
from posjax.biases.relative import RelativeBias
from posjax.encodings.base import PositionEncoding, Side, Sizes
from posjax.types import Array, Float, Num, PyTree

__all__ = ["DistanceBias", "OfDistance", "TrainedBias"]


class TrainedBias(PositionEncoding):
    """A bias with trained arrays, which each layer has for itself or all layers share.

    A subclass says its arrays in `parameters`; with `share_layers`, a class variable or a field,
    they are made once. Its `bias` gets them from `parameters_of_layer`.
    """

    # Without an annotation, which would make it the first field of subclasses that declare it.
    share_layers = False

    def parameters(self, sizes: Sizes) -> PyTree:
        """The trained arrays, as `self.param` makes them; None for none."""
        return None

    def shared(self, sizes):
        """The parameters of all layers; None if each layer has its own."""
        return self.parameters(sizes) if self.share_layers else None

    def parameters_of_layer(self, query: Side, key: Side, shared: PyTree) -> PyTree:
        """The parameters that `bias` uses.

        Raises:
            ValueError: all layers share them, and they were not handed to `bias`.
        """
        if not self.share_layers:
            return self.parameters(Sizes(query.x.shape[2], key.x.shape[2], query.x.shape[3]))
        if shared is None:
            wanted = "hand over what `shared` returned, or set share_layers=False"
            name = type(self).__name__
            raise ValueError(f"{name} has share_layers=True, but shared is None; {wanted}.")
        return shared


class DistanceBias(TrainedBias):
    """A bias that is a function of the positions of query and key for each head.

    A subclass says its function and, if it has trained arrays, its parameters.
    """

    distance_only: ClassVar[bool] = True  # of the difference of the two positions alone

    def function(self, heads: int) -> Callable[..., Array]:
        """The function for `posjax.RelativeBias`, hashable by value (see `OfDistance`)."""
        raise NotImplementedError(f"{type(self).__name__} must define function.")

    def bias(self, query, key, shared=None):
        """The function, the parameters and the indices of query and key."""
        params = self.parameters_of_layer(query, key, shared)
        function = self.function(query.x.shape[2])
        return RelativeBias(
            function, params, query.indices, key.indices, distance_only=self.distance_only
        )


@dataclasses.dataclass(frozen=True)
class OfDistance:
    """A function of (params, distance) as one of (params, query positions, key positions).

    Args:
        function: maps params and the distance i - j of query and key, [#B, 1, T, S], to float32
            [#B, N, T, S]; hashable by value (a module-level function, or a frozen dataclass with
            `__call__`).

    >>> import jax.numpy as jnp
    >>> double = OfDistance(lambda params, distance: params * distance)
    >>> double(2, jnp.array([[5]]), jnp.array([[3]])).tolist()
    [[[[4]]]]
    """

    function: Callable[[PyTree, Array], Array]

    def __post_init__(self):
        checks.require("function", self.function, callable(self.function), "a function")

    def __call__(
        self, params: PyTree, query_positions: Num[Array, "#B T"], key_positions: Num[Array, "#B S"]
    ) -> Float[Array, "#B N T S"]:
        """The function at all distances."""
        distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
        return self.function(params, distance)
