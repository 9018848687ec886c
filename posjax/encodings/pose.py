"""Positional Skip-wise training (PoSE): short sequences, trained at the distances of long ones."""

from typing import Self

from posjax.encodings.base import PositionEncoding
from posjax.encodings.rope import RoPE
from posjax.encodings.wrapper import Wrapper
from posjax.frequencies import Linear, YaRN
from posjax.positions import LengthError, skip_positions

__all__ = ["PoSE"]


class PoSE(Wrapper):
    """Cuts training sequences in two at a random place and moves the second part far away.

        v ~ U{1 ... floor((n + 1) / 2)},  u ~ U{0 ... target_length - n}
        the encoding inside sees p for the first v of n tokens, p + u for the others

    So n tokens train distances of up to target_length. Outside training positions are as they are.
    Each row, and each packed segment, has its own draws (`posjax.positions.skip_positions`). An
    older form of the authors' code moves the first part too; the later one does not, so that far
    distances come up more evenly (`shift_first` does). The code moreover takes
    the content of the second part from further on in the document, which is a matter of the data.
    Use it to fine-tune a trained RoPE model with frequencies scaled to the new length.

    Beyond the target length it does what the encoding inside does. Tested against a transcription
    of the official code's arithmetic in numpy.

    Args:
        encoding: the encoding inside.
        target_length: L', all positions are below it; at least as long as the sequences.
        shift_first: whether the first part moves too, by at most u.

    Raises:
        posjax.positions.LengthError: in training, a sequence longer than target_length.

    References:
        Zhu, Yang, Wang, Song, Wu, Wei, Li, PoSE: Efficient Context Window Extension of LLMs via
        Positional Skip-wise Training, arXiv:2309.10400, section 3.

    >>> import jax, jax.numpy as jnp
    >>> tokens, p = jnp.zeros((1, 5), jnp.int32), jnp.arange(5)[None]
    >>> train = {"deterministic": False, "rngs": {"encoding": jax.random.key(3)}}
    >>> indices, _ = PoSE(target_length=50).apply({}, tokens, p, method="positions", **train)
    >>> indices.tolist()
    [[0, 27, 28, 29, 30]]
    """

    encoding: PositionEncoding = RoPE()
    target_length: int = 16_384
    shift_first: bool = False

    def __post_init__(self):
        if self.target_length < 1:
            length = self.target_length
            raise ValueError(f"PoSE target_length is {length}; it must be at least 1.")
        super().__post_init__()

    @classmethod
    def linear(cls) -> Self:
        """From 2048 to 16,384 tokens with Position Interpolation."""
        return cls(encoding=RoPE(scaling=Linear(factor=8.0)))

    @classmethod
    def yarn(cls) -> Self:
        """From 2048 to 16,384 tokens with YaRN."""
        return cls(encoding=RoPE(scaling=YaRN(factor=8.0, original_length=2048)))

    def positions(self, tokens, positions, carry=None, *, segment_ids=None, deterministic=True):
        """The inner indices, with a gap in training."""
        if not deterministic:
            length = positions.shape[1]
            if segment_ids is None and length > self.target_length:
                too_long = f"the sequence has {length} tokens"
                raise LengthError(f"PoSE target_length is {self.target_length}; {too_long}.")
            positions = skip_positions(
                self.make_rng("encoding"),
                positions,
                self.target_length,
                shift_first=self.shift_first,
            )
        settings = {"segment_ids": segment_ids, "deterministic": deterministic}
        return self.encoding.positions(tokens, positions, carry, **settings)
