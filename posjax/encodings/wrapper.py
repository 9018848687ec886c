"""A base for encodings that change what another encoding sees."""

from posjax.encodings.base import PositionEncoding

__all__ = ["Wrapper"]


class Wrapper(PositionEncoding):
    """Hands everything on to `encoding`; subclasses override what they change.

    Args:
        encoding: the encoding inside.
    """

    encoding: PositionEncoding

    @property
    def is_causal_only(self) -> bool:
        """As the encoding inside."""
        return self.encoding.is_causal_only

    @property
    def reads_ahead(self) -> bool:
        """As the encoding inside."""
        return self.encoding.reads_ahead

    @property
    def beyond(self) -> str:
        """As the encoding inside."""
        return self.encoding.beyond

    @property
    def decodes(self) -> bool:
        """As the encoding inside."""
        return self.encoding.decodes

    def clone(self, **settings):
        """A copy around an unbound copy of the encoding, which makes its own parameters."""
        inner = settings.pop("encoding", self.encoding)
        return super().clone(encoding=inner.clone(parent=None, name=None), **settings)

    def layer(self, index, layers):
        """The same around the encoding's own form for the layer."""
        inner = self.encoding.layer(index, layers)
        return self if inner is self.encoding else self.clone(parent=None, encoding=inner)

    def positions(self, tokens, positions, carry=None, **settings):
        """Those of the encoding inside."""
        return self.encoding.positions(tokens, positions, carry, **settings)

    def embed(self, embeddings, indices):
        """As the encoding inside."""
        return self.encoding.embed(embeddings, indices)

    def shared(self, sizes):
        """As the encoding inside."""
        return self.encoding.shared(sizes)

    def begin(self, indices, sizes):
        """As the encoding inside."""
        return self.encoding.begin(indices, sizes)

    def keep(self, stream):
        """As the encoding inside."""
        return self.encoding.keep(stream)

    def enter(self, stream, kept, indices, rows):
        """As the encoding inside."""
        return self.encoding.enter(stream, kept, indices, rows)

    def remember(self, inputs, sizes, state=None):
        """As the encoding inside."""
        return self.encoding.remember(inputs, sizes, state)

    def rotate(self, query, key, query_indices, key_indices, query_memory=None, key_memory=None):
        """As the encoding inside."""
        return self.encoding.rotate(
            query, key, query_indices, key_indices, query_memory, key_memory
        )

    def bias(self, query, key, value, query_indices, key_indices, memory=None, shared=None):
        """As the encoding inside."""
        return self.encoding.bias(query, key, value, query_indices, key_indices, memory, shared)

    def carried(self, memory):
        """As the encoding inside."""
        return self.encoding.carried(memory)

    def advance(self, state, change, mixed):
        """As the encoding inside."""
        return self.encoding.advance(state, change, mixed)
