"""Bilevel Positional Encoding (BiPE): a trained place inside each sentence, RoPE between them."""

from typing import Self

import flax.linen as nn
import jax.numpy as jnp

from posjax.biases.scaled import ScaledBias
from posjax.encodings.abacus import is_one_of
from posjax.encodings.alibi import ALiBi
from posjax.encodings.base import PositionEncoding
from posjax.encodings.learned import lookup
from posjax.encodings.rope import RoPE
from posjax.encodings.wrapper import Wrapper
from posjax.positions import TextSegments, text_segments

__all__ = ["BiPE"]


class BiPE(Wrapper):
    """A trained vector for the place inside its segment; the encoding inside sees segment numbers.

        embedding + table[min(place in the segment, num_places - 1)]
        the encoding inside has, as position of a token, the number of its segment: 0, 1, 2, ...

    Segments end with a separator, such as a full stop (`posjax.positions.text_segments`). With RoPE
    inside, all tokens of a segment are turned alike; with ALiBi (`alibi`) slopes are multiplied by
    96. Packed sequences count from 0 again. The official code separates at two ids of Llama's
    tokenizer, 869 "." and 13 (a new line), cannot decode with a cache, and draws the table with
    deviation 0.02. Parameter: table [num_places, D], float32.

    Places from num_places - 1 on share the last row; far segment numbers are up to the encoding
    inside, and long texts of usual sentences have few new ones. Tested against the output of the
    official code.

    Args:
        encoding: the encoding between segments.
        separators: ids of the tokens that end a segment; by default "." and a new line in bytes.
        num_places: rows of the table; at least 1.
        initial_deviation: standard deviation of the table at the start.
        bias_factor: multiplies the inner encoding's bias; above 0.

    References:
        He et al., Two Stones Hit One Bird: Bilevel Positional Encoding for Better Length
        Extrapolation, arXiv:2401.16421, section 3.

    >>> tokens = jnp.array([list(b"Hi. You.")])
    >>> places = jnp.arange(8)[None]
    >>> indices, _ = BiPE().apply({}, tokens, places, method="positions")
    >>> indices[0].tolist(), indices[1].tolist()
    ([[0, 1, 2, 0, 1, 2, 3, 4]], [[0, 0, 0, 1, 1, 1, 1, 1]])
    """

    encoding: PositionEncoding = RoPE()
    separators: tuple[int, ...] = (46, 10)
    num_places: int = 1024
    initial_deviation: float = 0.02
    bias_factor: float = 1.0

    def __post_init__(self):
        if not self.separators or min(self.separators) < 0:
            wanted = "token ids, at least one"
            raise ValueError(f"BiPE separators is {self.separators}; it must be {wanted}.")
        if self.num_places < 1:
            raise ValueError(f"BiPE num_places is {self.num_places}; it must be at least 1.")
        if not self.initial_deviation >= 0:
            deviation = self.initial_deviation
            raise ValueError(f"BiPE initial_deviation is {deviation}; it must be 0 or more.")
        if not self.bias_factor > 0:
            raise ValueError(f"BiPE bias_factor is {self.bias_factor}; it must be above 0.")
        super().__post_init__()

    @classmethod
    def alibi(cls) -> Self:
        """ALiBi between segments, its slopes times 96."""
        return cls(encoding=ALiBi(), bias_factor=96.0)

    def positions(self, tokens, positions, carry=None, **settings):
        """Places in segments and the inner indices; the carry counts both on."""
        before, inner = (None, None) if carry is None else carry
        is_separator = is_one_of(tokens, self.separators)
        segments, after = text_segments(is_separator, positions, before)
        indices, inner = self.encoding.positions(tokens, segments.segment, inner, **settings)
        return TextSegments(segments.within, indices), (after, inner)

    @nn.compact
    def embed(self, embeddings, indices):
        """The embeddings plus their rows, summed in float32; then what the inner encoding adds."""
        start = nn.initializers.normal(self.initial_deviation)
        shape = (self.num_places, embeddings.shape[-1])
        table = self.param("table", start, shape, jnp.float32)
        rows = lookup(table, jnp.minimum(indices.within, self.num_places - 1))
        placed = (embeddings.astype(jnp.float32) + rows).astype(embeddings.dtype)
        return self.encoding.embed(placed, indices.segment)

    def bias(self, query, key, shared=None):
        """As the encoding inside, for segments, times bias_factor."""
        bias = super().bias(query, key, shared)
        return bias if bias is None or self.bias_factor == 1 else ScaledBias(bias, self.bias_factor)

    def inner_indices(self, indices):
        """Numbers of segments."""
        return indices.segment
