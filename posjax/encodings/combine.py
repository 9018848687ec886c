"""Several position encodings at once."""

from posjax import checks
from posjax.biases.total import BiasSum
from posjax.encodings.base import PositionEncoding

__all__ = ["Combine"]


class Combine(PositionEncoding):
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

    def clone(self, **settings):
        """A copy whose parts are unbound copies too, so that it makes its own parameters."""
        parts = settings.pop("encodings", self.encodings)
        unbound = tuple(part.clone(parent=None, name=None) for part in parts)
        return super().clone(encodings=unbound, **settings)

    def layer(self, index, layers):
        """The parts' own forms for the layer."""
        parts = tuple(part.layer(index, layers) for part in self.encodings)
        same = all(new is old for new, old in zip(parts, self.encodings, strict=True))
        return self if same else self.clone(parent=None, encodings=parts)

    def positions(self, tokens, positions, carry=None, **settings):
        """The indices of each part, and the carry of each part."""
        pairs = self._with(carry)
        results = [part.positions(tokens, positions, own, **settings) for part, own in pairs]
        return tuple(indices for indices, _ in results), tuple(after for _, after in results)

    def embed(self, embeddings, indices):
        """What the parts add, one after another."""
        for part, own in self._with(indices):
            embeddings = part.embed(embeddings, own)
        return embeddings

    def shared(self, sizes):
        """The shared parameters of each part."""
        return tuple(part.shared(sizes) for part in self.encodings)

    def begin(self, indices, sizes):
        """The state of each part."""
        return tuple(part.begin(own, sizes) for part, own in self._with(indices))

    def keep(self, stream):
        """What each part wants to see."""
        return tuple(part.keep(stream) for part in self.encodings)

    def enter(self, stream, kept, indices, rows):
        """The changes of the parts, one after another; all of them see the same kept tokens."""
        for part, of_tokens, own in self._with(kept, indices):
            stream = part.enter(stream, of_tokens, own, rows)
        return stream

    def remember(self, inputs, sizes, state=None):
        """What each part keeps of the tokens."""
        return tuple(part.remember(inputs, sizes, own) for part, own in self._with(state))

    def rotate(self, query, key, query_indices, key_indices, query_memory=None, key_memory=None):
        """The turns of the parts, one after another."""
        for part, *own in self._with(query_indices, key_indices, query_memory, key_memory):
            query, key = part.rotate(query, key, *own)
        return query, key

    def bias(self, query, key, value, query_indices, key_indices, memory=None, shared=None):
        """The sum of the parts' biases."""
        own = self._with(query_indices, key_indices, memory, shared)
        made = [part.bias(query, key, value, *of_part) for part, *of_part in own]
        biases = tuple(bias for bias in made if bias is not None)
        return BiasSum(biases) if len(biases) > 1 else next(iter(biases), None)

    def carried(self, memory):
        """More values of the one part that has them."""
        made = [part.carried(own) for part, own in self._with(memory)]
        made = [values for values in made if values is not None]
        if len(made) > 1:
            raise NotImplementedError("Combine takes one part that carries a state through layers.")
        return next(iter(made), None)

    def advance(self, state, change, mixed):
        """The next state of each part; the averages belong to the one that has a state."""
        pairs = self._with(state)
        return tuple(
            part.advance(own, change, None if own is None else mixed) for part, own in pairs
        )

    def _with(self, *trees):
        """Each part with its share of each tree; None stands for None everywhere."""
        none = (None,) * len(self.encodings)
        return zip(self.encodings, *(none if t is None else t for t in trees), strict=True)
