"""The four places where a position encoding acts, with neutral defaults.

An encoding is a Flax Linen module over pure functions. A Linen module is a frozen dataclass, so the
unbound module *is* the configuration: `CoPE(num_positions=64)` in a config file is an encoding.
Adding an encoding adds one file to this folder, which `posjax.encodings.registry` finds by itself,
and one line to its `__init__`. Most encodings belong to a family and say one thing:

| family                                   | a subclass says                                   |
|------------------------------------------|---------------------------------------------------|
| `posjax.encodings.rotary.Rotary`         | its angles                                        |
| `posjax.encodings.distance.DistanceBias` | its trained arrays and its function of distance   |
| `posjax.encodings.stream.StreamEncoding` | what flows through the layers beside the tokens   |
| `posjax.encodings.wrapper.Wrapper`       | what it changes around another encoding           |

A model has the encoding once for itself (places 1 and 2, `shared`, `init_state`) and once for each
layer (the rest). `encoding.layer(index, layers)` makes the one of a layer: an unbound copy, which
makes its own parameters where it is attached, as a field of the layer or in its `setup`.

    for index in range(layers):
        x = Layer(self.encoding.layer(index, layers))(x, shared)

A layer that gets `self.encoding` itself instead shares its parameters with all others, as with
every Linen module. Arrays that a paper shares between layers are made by `shared`, once per model.
Parameters exist only if a method that makes them is called. Data passes in this order, with
`stream = stream_of(encoding)`:

| place | once per model                                                                  |
|-------|---------------------------------------------------------------------------------|
| 1     | indices, carry = encoding.positions(tokens, positions, carry)                   |
| 2     | x = encoding.embed(embeddings, indices)                                         |
|       | shared = encoding.shared(sizes)                                                 |
|       | state = stream.init_state(indices, sizes)                                       |
|       | **in every layer**                                                              |
|       | x = stream.update_stream(x, stream.stream_inputs(x), indices, rows)             |
|       | memory = encoding.cache(inputs, sizes, state)                                   |
|       | query = Side(queries of inputs, indices, memory)                                |
|       | key = Side(keys of inputs, indices, memory, values of inputs)                   |
| 3     | query.x, key.x = encoding.rotate(query, key)                                    |
| 4     | bias = encoding.bias(query, key, shared)                                        |
|       | averages, mixed = attention(query.x, key.x,                                     |
|       |                             [key.value, stream.extra_values(key.memory)], bias) |
|       | state = stream.update_state(state, change, mixed)                               |

Most encodings override one or two of these. The results of `stream_inputs` and `cache` are kept
beside key and value when decoding. Keys are cached as they come from their projection, and `rotate`
sees all of them at every step; so an encoding may turn them by anything, the current length
included.
"""

import dataclasses
import functools
from typing import ClassVar, Literal, Self

import flax.linen as nn

from posjax import checks
from posjax.biases.base import Bias
from posjax.encodings.hooks import Side, Sizes, guard_base, guard_overrides
from posjax.types import Array, Float, Int, Num, PyTree

__all__ = ["PositionEncoding", "Side", "Sizes"]


def _unbound(layer):
    """The method `layer`, with an unbound copy of its result, down to the encodings inside."""

    # Linen marks methods that it has wrapped in their __dict__, which must not be copied.
    @functools.wraps(layer, updated=())
    def call(self, index, layers):
        checks.integer("layers", layers, low=1)
        checks.integer("index", index, low=0, below=layers)
        own = layer(self, index, layers)
        checks.instance(f"layer of {type(self).__name__}", own, PositionEncoding)
        return own.clone(parent=None, name=None, _deep_clone=True, _reset_names=True)

    return call


class PositionEncoding(nn.Module):
    """A position encoding that does nothing; subclasses override the places in which they act.

    A subclass says about itself, as a class variable or a property:

        is_causal_only: whether it is defined for causal attention only.
        reads_ahead: whether it reads tokens that follow, so that a causal model cannot use it.
        beyond: what happens at positions beyond the trained ones. "extrapolates": every position is
            defined and different; "clips": all positions beyond a limit are treated alike;
            "raises": a `posjax.positions.LengthError` (NaN in a compiled program, which cannot
            raise).
        decodes: whether tokens may be fed one by one with a cache. If not, a carry or a cache
            raises NotImplementedError.
    """

    is_causal_only: ClassVar[bool] = False
    reads_ahead: ClassVar[bool] = False
    beyond: ClassVar[Literal["extrapolates", "clips", "raises"]] = "extrapolates"
    decodes: ClassVar[bool] = True

    def __init_subclass__(cls, **settings):
        super().__init_subclass__(**settings)
        if "layer" in vars(cls):
            cls.layer = _unbound(cls.layer)
        guard_overrides(cls)

    def __post_init__(self):
        checks.fields(self)
        # Linen gives modules that share a part (the same object, such as a default) its parameters.
        for field in dataclasses.fields(self):
            if field.init and field.name not in ("parent", "name"):
                own = _own_parts(getattr(self, field.name))
                object.__setattr__(self, field.name, own)
        super().__post_init__()

    @_unbound
    def layer(self, index: int, layers: int) -> Self:
        """The encoding of layer `index` of `layers`, with its own parameters.

        Encodings that differ between layers override this. The result is an unbound copy, also if
        an override returns `self`.
        """
        return self

    def positions(
        self,
        tokens: Int[Array, "B T"],
        positions: Num[Array, "#B T"],
        carry: PyTree = None,
        *,
        segment_ids: Int[Array, "#B T"] | None = None,
        deterministic: bool = True,
    ) -> tuple[PyTree, PyTree]:
        """Place 1: the indices that the later places get.

        Args:
            tokens: token ids, for encodings that read them.
            positions: position of each token in its sequence (or in its packed segment).
            carry: the carry that this method returned for the tokens before these when decoding;
                None at the start.
            segment_ids: segments of packed sequences.
            deterministic: False in training; randomness comes from the rng stream "encoding".

        Returns:
            Indices, a pytree of arrays [B, T, ...] (the model keeps them for the keys of its
            cache), and the carry for the tokens that come next, a pytree of arrays [B, ...].
        """
        return positions, carry

    def embed(self, embeddings: Float[Array, "B T D"], indices: PyTree) -> Float[Array, "B T D"]:
        """Place 2: the embeddings plus the encoding's, once. Keeps the dtype of `embeddings`."""
        return embeddings

    def shared(self, sizes: Sizes) -> PyTree:
        """Parameters that all layers use; handed to `bias` in every layer."""
        return None

    def cache(self, inputs: Float[Array, "B T D"], sizes: Sizes, state: PyTree = None) -> PyTree:
        """Arrays [B, T, ...] that the layer caches beside key and value, or None.

        Args:
            inputs: the input of the attention layer.
            state: the state of a `posjax.encodings.stream.StreamEncoding`.
        """
        return None

    def rotate(self, query: Side, key: Side) -> tuple[Num[Array, "B T N H"], Num[Array, "B S K H"]]:
        """Place 3: the arrays `query.x` and `key.x`, turned. Keeps dtypes."""
        return query.x, key.x

    def bias(self, query: Side, key: Side, shared: PyTree = None) -> Bias | None:
        """Place 4: the description of an addend of the logits; `x` of both sides is turned."""
        return None


guard_base(PositionEncoding, ("positions", "embed", "shared", "cache", "rotate", "bias"))


def _own_parts(value):
    """The value of a field with copies of all unbound encodings in it."""
    if isinstance(value, tuple | list) and any(isinstance(x, PositionEncoding) for x in value):
        return tuple(map(_own_parts, value))
    is_unbound = isinstance(value, PositionEncoding) and value.parent is None
    return value.clone(parent=None) if is_unbound else value
