"""The Forgetting Transformer's gates: every token fades the keys before it."""

import math
from typing import ClassVar, Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from posjax import checks
from posjax.biases.running import ForgettingBias
from posjax.encodings.base import PositionEncoding, Sizes
from posjax.types import Array, Float

__all__ = ["Forgetting", "bias_for_decay_times"]


@checks.arguments(heads=checks.size(), shortest=checks.above(0), longest=checks.above(0))
def bias_for_decay_times(heads: int, shortest: float, longest: float) -> Float[Array, "N"]:
    """Gate biases b with which a key fades to 1 / e after `shortest` ... `longest` tokens.

        sigmoid(b_n) = exp(-1 / t_n),       t_1 ... t_N evenly spaced in the logarithm

    >>> [round(x, 4) for x in jax.nn.sigmoid(bias_for_decay_times(2, 1.0, 10.0)).tolist()]
    [0.3679, 0.9048]
    """
    times = jnp.exp(jnp.linspace(math.log(shortest), math.log(longest), heads, dtype=jnp.float32))
    return -jnp.log(jnp.expm1(1.0 / times))


class Forgetting(PositionEncoding):
    """Adds the logs of the forget gates between query and key to the logits.

        f_l   = sigmoid(w_n . x_l + b_n)                     x: the layer's input; for every head n
        logit = H^-0.5 q_i . k_j + sum of log f_l over l in j + 1 ... i

    The pure form is `posjax.ForgettingBias`. The gates replace other position encodings (the
    paper's models have none), but may be combined with them. Parameters of each layer: kernel
    [D, N] and bias [N], float32. The official code starts kernels normal with deviation 0.02 and
    biases at 0, so every gate starts near 1/2. The paper's other changes to the block (output
    gates, norms of query and key, shifts of key and value) are not position encodings and not here.
    Tested against a transcription of the official code's plain form (its decoding path).

    Any length is defined; far keys fade. Attention must be causal.

    Args:
        gate: "full" is the formula; "bias_only" has no kernel (gates do not look at tokens),
            "fixed" does not train its bias either: ALiBi with other slopes.
        decay_times: for "bias_only" and "fixed", the number of tokens after which a key has faded
            to 1 / e, for the first and the last head, evenly spaced in the logarithm between them.
        initial_deviation: standard deviation of the kernel at the start.

    References:
        Lin, Nikishin, He, Courville, Forgetting Transformer: Softmax Attention with a Forget Gate,
        arXiv:2503.02130, section 3.

    >>> x = jnp.ones((1, 3, 8))
    >>> Forgetting.fixed().init(jax.random.key(0), x, Sizes(2, 2, 4), method="cache")
    {}
    """

    gate: Literal["full", "bias_only", "fixed"] = "full"
    decay_times: tuple[float, float] = (1.0, 1000.0)
    initial_deviation: float = 0.02
    is_causal_only: ClassVar[bool] = True

    def __post_init__(self):
        checks.fields(self, decay_times=checks.above(0), initial_deviation=checks.at_least(0))
        shortest, longest = self.decay_times
        wanted = "(shortest, longest), not falling"
        checks.require("Forgetting decay_times", self.decay_times, shortest <= longest, wanted)
        super().__post_init__()

    @classmethod
    def fixed(cls) -> Self:
        """Gates that neither look at tokens nor train: each head fades at its own speed."""
        return cls(gate="fixed")

    @nn.compact
    def cache(self, inputs, sizes: Sizes, state=None):
        """The log of each token's gate for every query head, [B, T, N]."""
        batch, length, width = inputs.shape
        logits = jnp.zeros((batch, length, sizes.heads), jnp.float32)
        if self.gate == "full":
            start = nn.initializers.normal(self.initial_deviation)
            kernel = self.param("kernel", start, (width, sizes.heads), jnp.float32)
            exact = jax.lax.Precision.HIGHEST
            logits = jnp.dot(inputs.astype(jnp.float32), kernel, precision=exact)
        logits += self._bias(sizes.heads)[None, None, :]
        return jax.nn.log_sigmoid(logits)

    def bias(self, query, key, shared=None):
        """The gates of the keys as a bias."""
        return ForgettingBias(key.memory)

    def _bias(self, heads: int) -> Float[Array, "N"]:
        if self.gate == "full":
            return self.param("bias", nn.initializers.zeros, (heads,), jnp.float32)
        by_time = bias_for_decay_times(heads, *self.decay_times)
        if self.gate == "fixed":
            return by_time
        return self.param("bias", lambda _: by_time)
