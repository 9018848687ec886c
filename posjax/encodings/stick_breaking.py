"""Stick-breaking attention: keys near the query take their share first."""

from typing import ClassVar

from posjax.biases.running import StickBreakingBias
from posjax.encodings.base import PositionEncoding

__all__ = ["StickBreaking"]


class StickBreaking(PositionEncoding):
    """Replaces softmax by shares of a stick, given out from the query leftwards.

        beta_ij   = sigmoid(H^-0.5 q_i . k_j)
        weight_ij = beta_ij * product of (1 - beta_ik) over the keys k in j + 1 ... i - 1

    It makes attention prefer near keys without any position encoding. The pure form is
    `posjax.StickBreakingBias`; there are no parameters. The weights of a row sum to at most 1; the
    first token, which sees no key, gives 0, unless `attend_current`. Some of the authors' models
    add the query's own value, weighted by the remainder of the stick: that is not here. Other
    biases cannot be added; encodings of places 1 to 3 can be combined with it. Tested against a
    transcription of the formula.

    Any length is defined. Attention must be causal. The walk over the keys ends once nothing of the
    stick is left in float32.

    Args:
        attend_current: whether the query's own token takes the first share.

    References:
        Tan, Yang, Courville, Panda, Shen, Scaling Stick-Breaking Attention: An Efficient
        Implementation and In-depth Study, arXiv:2410.17980, section 2.

    >>> import jax.numpy as jnp
    >>> from posjax.encodings.base import Side
    >>> side = Side(jnp.ones((1, 2, 1, 4)), jnp.arange(2)[None])
    >>> StickBreaking().apply({}, side, side, method="bias").uses_softmax
    False
    """

    attend_current: bool = False
    is_causal_only: ClassVar[bool] = True

    def bias(self, query, key, shared=None):
        """The description, which reads query and key inside the attention call."""
        return StickBreakingBias(self.attend_current)
