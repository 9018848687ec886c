"""Several position encodings at once."""

from posjax.bias import BiasSum
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
        if not self.encodings:
            raise ValueError(f"Combine encodings is {self.encodings!r}; it must hold at least one.")
        for index, part in enumerate(self.encodings):
            if not isinstance(part, PositionEncoding):
                got = f"Combine encodings[{index}] is {part!r}"
                raise ValueError(f"{got}; it must be a PositionEncoding (leave None out).")
        super().__post_init__()

    @property
    def is_causal_only(self) -> bool:
        """Whether a part is for causal attention only."""
        return any(part.is_causal_only for part in self.encodings)

    def clone(self, **settings):
        """A copy whose parts are unbound copies too, so that it makes its own parameters."""
        parts = settings.pop("encodings", self.encodings)
        unbound = tuple(part.clone(parent=None, name=None) for part in parts)
        return super().clone(encodings=unbound, **settings)

    def positions(self, tokens, positions, carry=None, **settings):
        """The indices of each part, and the carry of each part."""
        carries = self._spread(carry)
        pairs = zip(self.encodings, carries, strict=True)
        results = [part.positions(tokens, positions, own, **settings) for part, own in pairs]
        return tuple(indices for indices, _ in results), tuple(after for _, after in results)

    def embed(self, embeddings, indices):
        """What the parts add, one after another."""
        for part, own in zip(self.encodings, indices, strict=True):
            embeddings = part.embed(embeddings, own)
        return embeddings

    def shared(self, heads):
        """The shared parameters of each part."""
        return tuple(part.shared(heads) for part in self.encodings)

    def remember(self, inputs, kv_heads, head_size):
        """What each part keeps of the tokens."""
        return tuple(part.remember(inputs, kv_heads, head_size) for part in self.encodings)

    def rotate(self, query, key, query_indices, key_indices):
        """The turns of the parts, one after another."""
        for part, *own in zip(self.encodings, query_indices, key_indices, strict=True):
            query, key = part.rotate(query, key, *own)
        return query, key

    def bias(self, query, key, value, query_indices, key_indices, memory=None, shared=None):
        """The sum of the parts' biases."""
        own = zip(
            query_indices, key_indices, self._spread(memory), self._spread(shared), strict=True
        )
        made = [
            p.bias(query, key, value, *of_p) for p, of_p in zip(self.encodings, own, strict=True)
        ]
        biases = tuple(bias for bias in made if bias is not None)
        return BiasSum(biases) if len(biases) > 1 else next(iter(biases), None)

    def _spread(self, parts):
        """One entry for each part; None stands for None everywhere."""
        return (None,) * len(self.encodings) if parts is None else parts
