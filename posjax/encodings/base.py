"""The four places where a position encoding acts, with neutral defaults.

An encoding is a Flax Linen module over pure functions. A Linen module is a frozen dataclass, so the
unbound module *is* the configuration: `CoPE(num_positions=64)` stands in a config file as it is.
Adding an encoding adds one file to this folder: every subclass of `PositionEncoding` defined here
is found by `posjax.encodings.registry`.

A model creates the encoding once for itself (places 1 and 2, `shared`, `begin`) and once in each
layer (the rest, of `encoding.layer(index, layers)`); parameters exist only where a method that
makes them is called. Data passes in this order:

| place | once per model                                                        |
|-------|-----------------------------------------------------------------------|
| 1     | indices, carry = encoding.positions(tokens, positions, carry)         |
| 2     | embeddings = encoding.embed(embeddings, indices)                      |
|       | shared = encoding.shared(sizes)                                       |
|       | state = encoding.begin(indices, sizes)                                |
|       | **in every layer**                                                    |
|       | stream = encoding.enter(stream, encoding.keep(stream), indices, rows) |
|       | memory = encoding.remember(inputs, sizes, state)                      |
| 3     | query, key = encoding.rotate(query, key, query_indices, key_indices,  |
|       |                              query_memory, key_memory)                |
| 4     | bias = encoding.bias(query, key, value, query_indices, key_indices,   |
|       |                      key_memory, shared)                              |
|       | mixed = attention of [value, encoding.carried(key_memory)]            |
|       | state = encoding.advance(state, change, mixed)                        |

Most encodings override one or two of these. What `keep` and `remember` return is cached beside key
and value when decoding. Keys are cached as they come from their projection, and `rotate` sees all
of them at every step; so an encoding may turn them by anything, the current length included.
"""

from typing import ClassVar, Literal, NamedTuple, Self

import flax.linen as nn

from posjax import checks
from posjax.biases.base import Bias
from posjax.types import Array, Float, Int, Num, PyTree

__all__ = ["PositionEncoding", "Sizes"]


class Sizes(NamedTuple):
    """The sizes of an attention layer."""

    heads: int
    kv_heads: int
    head_size: int


class PositionEncoding(nn.Module):
    """A position encoding that does nothing; subclasses override the places where they act.

    What a subclass says about itself, as a class variable or a property:

        is_causal_only: whether it is defined for causal attention only.
        reads_ahead: whether it reads tokens that follow, so that a causal model cannot use it.
        beyond: what happens at positions beyond the trained ones. "extrapolates": every position is
            defined and different; "clips": far positions are treated as one; "raises": a
            `posjax.positions.LengthError` (NaN where a compiled program cannot raise).
        decodes: whether tokens may be fed one by one with a cache. Where not, a carry or a cache
            raises NotImplementedError.
    """

    is_causal_only: ClassVar[bool] = False
    reads_ahead: ClassVar[bool] = False
    beyond: ClassVar[Literal["extrapolates", "clips", "raises"]] = "extrapolates"
    decodes: ClassVar[bool] = True

    def __post_init__(self):
        checks.fields(self)
        super().__post_init__()

    def layer(self, index: int, layers: int) -> Self:
        """The encoding of layer `index` of `layers`, for encodings that differ between layers."""
        return self

    def positions(
        self,
        tokens: Int[Array, "B T"],
        positions: Num[Array, "B T"],
        carry: PyTree = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> tuple[PyTree, PyTree]:
        """Place 1: which indices the later places get.

        Args:
            tokens: token ids, for encodings that read them.
            positions: place of each token in its sequence (or in its packed segment).
            carry: what this method returned for the tokens before these when decoding; None at the
                start.
            segment_ids: segments of packed sequences.
            deterministic: False in training; randomness comes from the rng stream "encoding".

        Returns:
            Indices, a pytree of arrays [B, T, ...] (the model keeps them for the keys of its
            cache), and the carry for the tokens that come next, a pytree of arrays [B, ...].
        """
        return positions, carry

    def embed(self, embeddings: Float[Array, "B T D"], indices: PyTree) -> Float[Array, "B T D"]:
        """Place 2: what is added to the token embeddings, once. Keeps the dtype of `embeddings`."""
        return embeddings

    def shared(self, sizes: Sizes) -> PyTree:
        """Parameters that all layers use; handed to `bias` in every layer."""
        return None

    def begin(self, indices: PyTree, sizes: Sizes) -> PyTree:
        """What flows through the layers beside the residual stream: arrays [B, T, ...] or None."""
        return None

    def keep(self, stream: Float[Array, "B T D"]) -> PyTree:
        """What `enter` wants to see of each token: arrays [B, T, ...] or None."""
        return None

    def enter(
        self,
        stream: Float[Array, "B T D"],
        kept: PyTree,
        indices: PyTree,
        rows: Int[Array, "T"],
    ) -> Float[Array, "B T D"]:
        """The residual stream as it enters a layer.

        Args:
            kept: what `keep` returned, of all tokens known so far, [B, S, ...].
            indices: those of the tokens in `stream`.
            rows: where the tokens in `stream` stand in `kept`.
        """
        return stream

    def remember(self, inputs: Float[Array, "B T D"], sizes: Sizes, state: PyTree = None) -> PyTree:
        """What the layer caches of each token beside key and value: arrays [B, T, ...] or None."""
        return None

    def rotate(
        self,
        query: Num[Array, "B T N H"],
        key: Num[Array, "B S K H"],
        query_indices: PyTree,
        key_indices: PyTree,
        query_memory: PyTree = None,
        key_memory: PyTree = None,
    ) -> tuple[Num[Array, "B T N H"], Num[Array, "B S K H"]]:
        """Place 3: turns query and key. Keeps dtypes."""
        return query, key

    def bias(
        self,
        query: Num[Array, "B T N H"],
        key: Num[Array, "B S K H"],
        value: Num[Array, "B S K H"],
        query_indices: PyTree,
        key_indices: PyTree,
        memory: PyTree = None,
        shared: PyTree = None,
    ) -> Bias | None:
        """Place 4: the description of what is added to the logits (`memory`: that of the keys)."""
        return None

    def carried(self, memory: PyTree) -> Float[Array, "B S K E"] | None:
        """More values, which the same attention weights average; for `advance`."""
        return None

    def advance(
        self, state: PyTree, change: Float[Array, "B T D"], mixed: Float[Array, "B T N E"] | None
    ) -> PyTree:
        """The state for the next layer.

        Args:
            change: what the layer's MLP adds to the residual stream.
            mixed: averages of what `carried` returned, None where it returned None.
        """
        return state
