"""The four places where a position encoding acts, with neutral defaults.

An encoding is a Flax Linen module over pure functions. A Linen module is a frozen dataclass, so the
unbound module *is* the configuration: `CoPE(num_positions=64)` stands in a config file as it is.
Adding an encoding adds one file to this folder: every subclass of `PositionEncoding` defined here
is found by `posjax.encodings.registry`.

A model creates the encoding once for itself (places 1 and 2, and `shared`) and once in each
attention layer (places 3 and 4); parameters exist only where a method that makes them is called.
Data passes in this order:

| place | once per model                                                        |
|-------|-----------------------------------------------------------------------|
| 1     | indices, carry = encoding.positions(tokens, positions, carry)         |
| 2     | embeddings = encoding.embed(embeddings, indices)                      |
|       | shared = encoding.shared(heads)                                       |
|       | **in every layer**                                                    |
|       | memory = encoding.remember(inputs, kv_heads, head_size)               |
| 3     | query, key = encoding.rotate(query, key, query_indices, key_indices)  |
| 4     | bias = encoding.bias(query, key, value, query_indices, key_indices, memory, shared) |

Keys are cached as they come from their projection, and `rotate` sees all of them at every step of
decoding; so an encoding may turn them by anything, the current length included.
"""

from typing import ClassVar

import flax.linen as nn

from posjax.bias import Bias
from posjax.types import Array, Float, Int, Num, PyTree

__all__ = ["PositionEncoding"]


class PositionEncoding(nn.Module):
    """A position encoding that does nothing; subclasses override the places where they act."""

    # Whether the encoding is defined for causal attention only.
    is_causal_only: ClassVar[bool] = False

    def positions(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
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

    def shared(self, heads: int) -> PyTree:
        """Parameters that all layers use; handed to `bias` in every layer."""
        return None

    def remember(self, inputs: Float[Array, "B T D"], kv_heads: int, head_size: int) -> PyTree:
        """What the layer caches of each token beside key and value: arrays [B, T, ...] or None."""
        return None

    def rotate(
        self,
        query: Num[Array, "B T N H"],
        key: Num[Array, "B S K H"],
        query_indices: PyTree,
        key_indices: PyTree,
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
        """Place 4: the description of what is added to the logits."""
        return None
