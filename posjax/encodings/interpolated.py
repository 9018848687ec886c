"""Position interpolation: positions of long sequences are squeezed into the trained range."""

import jax

from posjax import checks
from posjax.encodings.base import PositionEncoding
from posjax.encodings.rope import RoPE
from posjax.encodings.wrapper import Wrapper
from posjax.positions import interpolated_positions

__all__ = ["Interpolated"]


class Interpolated(Wrapper):
    """Squeezes positions by trained_length / target_length, for any encoding that takes fractions.

        the encoding inside sees p * trained_length / target_length, in float32

    With RoPE this is `RoPE(scaling=Linear(target_length / trained_length))`; it also serves ALiBi,
    sinusoids, trained tables (which interpolate), T5's buckets (which round) and all others that
    are functions of the position. It is meant for a trained model, fine-tuned a little at the new
    length (the paper: 1000 steps); without, nearby tokens are closer than any seen before.

    Positions up to target_length are within the trained range; beyond, it is what the encoding
    inside is at trained_length. Indices are float32, in the cache too. Tested against RoPE's
    published form with scaled frequencies.

    Args:
        encoding: the encoding inside.
        trained_length: L, at least 1.
        target_length: L', at least trained_length.

    Raises:
        ValueError: the encoding inside makes its own indices (Abacus, BiPE, PoSE in training).

    References:
        Chen, Wong, Chen, Tian, Extending Context Window of Large Language Models via Positional
        Interpolation, arXiv:2306.15595, section 2.

    >>> import jax.numpy as jnp
    >>> tokens, p = jnp.zeros((1, 3), jnp.int32), jnp.arange(3)[None]
    >>> Interpolated().apply({}, tokens, p, method="positions")[0].tolist()
    [[0.0, 0.25, 0.5]]
    """

    encoding: PositionEncoding = RoPE()
    trained_length: int = 2048
    target_length: int = 8192

    def __post_init__(self):
        checks.fields(self, trained_length=checks.at_least(1))
        target, trained = self.target_length, self.trained_length
        wanted = f"at least trained_length = {trained}"
        checks.require("Interpolated target_length", target, target >= trained, wanted)
        super().__post_init__()

    def positions(self, tokens, positions, carry=None, **settings):
        """The squeezed positions, as the encoding inside passes them on."""
        squeezed = interpolated_positions(positions, self.trained_length, self.target_length)
        name, inside = type(self.encoding).__name__, "put Interpolated inside it"
        try:
            indices, carry = self.encoding.positions(tokens, squeezed, carry, **settings)
        except (TypeError, ValueError) as error:  # this hook refuses nothing else
            raise ValueError(f"{name} takes no fractions of positions; {inside}.") from error
        if any(leaf is not squeezed for leaf in jax.tree.leaves(indices)):
            raise ValueError(f"{name} makes its own indices; {inside}.")
        return indices, carry
