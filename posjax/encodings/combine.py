"""Several position encodings at once."""

from posjax import checks
from posjax.biases.sum import BiasSum
from posjax.encodings.base import PositionEncoding, Side
from posjax.encodings.stream import StreamEncoding, stream_of

__all__ = ["Combine"]


class Combine(StreamEncoding):
    """Several encodings in one model; each has its own indices, carry, memory and parameters.

        embed, rotate: one after another, in the order of `encodings`
        bias:          the sum of their biases

    Defined wherever all of its parts are, and limited to causal attention if one of them is.

    Args:
        encodings: the parts; at least one.

    References:
        McLeish et al., Transformers Can Do Arithmetic with the Right Embeddings, arXiv:2405.17399
        (Abacus with FIRE and with RoPE).

    >>> from posjax.encodings import RoPE, Sinusoidal
    >>> len(Combine((Sinusoidal(), RoPE())).encodings)
    2
    """

    encodings: tuple[PositionEncoding, ...]

    def __post_init__(self):
        some = isinstance(self.encodings, tuple | list) and len(self.encodings) > 0
        checks.require(
            "Combine encodings", self.encodings, some, "a tuple of one or more encodings"
        )
        for index, part in enumerate(self.encodings):
            checks.instance(f"Combine encodings[{index}]", part, PositionEncoding)
        super().__post_init__()

    @property
    def is_causal_only(self) -> bool:
        """Whether a part is for causal attention only."""
        return any(part.is_causal_only for part in self.encodings)

    @property
    def reads_ahead(self) -> bool:
        """Whether a part reads tokens that follow."""
        return any(part.reads_ahead for part in self.encodings)

    @property
    def beyond(self) -> str:
        """As the strictest part; one part that extrapolates makes far positions differ."""
        of_parts = {part.beyond for part in self.encodings}
        return next(word for word in ("raises", "extrapolates", "clips") if word in of_parts)

    @property
    def decodes(self) -> bool:
        """Whether all parts do."""
        return all(part.decodes for part in self.encodings)

    def layer(self, index, layers):
        """The parts' own forms for the layer."""
        parts = tuple(part.layer(index, layers) for part in self.encodings)
        return self.clone(parent=None, encodings=parts)

    def positions(self, tokens, positions, carry=None, **settings):
        """The indices of each part, and the carry of each part."""
        shares = self._shares(carry)
        results = [part.positions(tokens, positions, own, **settings) for part, own in shares]
        return tuple(indices for indices, _ in results), tuple(after for _, after in results)

    def embed(self, embeddings, indices):
        """The sums of the parts, one after another."""
        for part, own in self._shares(indices):
            embeddings = part.embed(embeddings, own)
        return embeddings

    def shared(self, sizes):
        """The shared parameters of each part."""
        return tuple(part.shared(sizes) for part in self.encodings)

    def cache(self, inputs, sizes, state=None):
        """The cache of each part."""
        return tuple(part.cache(inputs, sizes, own) for part, own in self._shares(state))

    def rotate(self, query, key):
        """The turns of the parts, one after another."""
        turned = query.x, key.x
        for part, *sides in self._shares(query, key):
            sides = (side._replace(x=x) for side, x in zip(sides, turned, strict=True))
            turned = part.rotate(*sides)
        return turned

    def bias(self, query, key, shared=None):
        """The sum of the parts' biases."""
        made = [part.bias(*own) for part, *own in self._shares(query, key, shared)]
        biases = tuple(bias for bias in made if bias is not None)
        return BiasSum(biases) if len(biases) > 1 else next(iter(biases), None)

    def init_state(self, indices, sizes):
        """The state of each part."""
        return tuple(stream_of(part).init_state(own, sizes) for part, own in self._shares(indices))

    def stream_inputs(self, stream):
        """The inputs of each part."""
        return tuple(stream_of(part).stream_inputs(stream) for part in self.encodings)

    def update_stream(self, stream, inputs, indices, rows):
        """The changes of the parts, one after another; all of them see the same inputs."""
        for part, *own in self._shares(inputs, indices):
            stream = stream_of(part).update_stream(stream, *own, rows)
        return stream

    def extra_values(self, memory):
        """More values of the one part that has them."""
        made = [stream_of(part).extra_values(own) for part, own in self._shares(memory)]
        made = [values for values in made if values is not None]
        if len(made) > 1:
            raise NotImplementedError("Combine takes one part that carries a state through layers.")
        return next(iter(made), None)

    def update_state(self, state, change, mixed):
        """The next state of each part; the averages belong to the one that has a state."""
        return tuple(
            stream_of(part).update_state(own, change, None if own is None else mixed)
            for part, own in self._shares(state)
        )

    def _shares(self, *trees):
        """Each part with its share of each tree: tuples, sides, or None for None everywhere."""
        return zip(self.encodings, *map(self._split, trees), strict=True)

    def _split(self, tree):
        """The share of each part; those of a side have its `x` and `value`."""
        if isinstance(tree, Side):
            own = zip(self._split(tree.indices), self._split(tree.memory), strict=True)
            return tuple(tree._replace(indices=indices, memory=memory) for indices, memory in own)
        return (None,) * len(self.encodings) if tree is None else tree
