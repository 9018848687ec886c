"""How RoPE's frequencies are changed for contexts longer than the trained one.

Each scaling is a small frozen dataclass: settings, and a call that gives the frequencies.

    frequency_m = base^(-2m / R)         RoPE's own; m = 0 ... R / 2 - 1, R = the turned channels
    frequencies, factor = scaling(R, base, length)

`factor` multiplies the turned query and the turned key, so logits grow by its square. `length` [B]
is how many positions each row has now (the greatest index of its keys, plus 1). Only `DynamicNTK`
and `LongRoPE` read it: with these, a token that takes the length beyond `original_length` turns all
tokens before it anew, and what was computed from them (values of deeper layers) stays as it was.
Feeding tokens one by one then differs from feeding them at once, here as in all published code.
"""

import abc
import dataclasses
import math
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.types import Array, Num

__all__ = [
    "DynamicNTK",
    "Linear",
    "Llama3",
    "LongRoPE",
    "NTKAware",
    "Scaling",
    "YaRN",
    "rope_frequencies",
]

# [R / 2], or [B, R / 2] where they depend on each row's length.
Frequencies = np.ndarray | Array


@checks.arguments(channels=checks.size(0), base=checks.above(0))
def rope_frequencies(channels: int, base: float) -> np.ndarray:
    """RoPE's frequencies base^(-2m / channels), [channels / 2], in float64.

    >>> rope_frequencies(4, 10_000.0).tolist()
    [1.0, 0.01]
    """
    return base ** (-np.arange(0, channels, 2) / channels)


class Scaling(abc.ABC):
    """A change of RoPE's frequencies."""

    reads_length: ClassVar[bool] = False

    def __init_subclass__(cls, **settings):
        super().__init_subclass__(**settings)
        if "__call__" in vars(cls):
            limits = {"channels": checks.size(0), "base": checks.above(0)}
            cls.__call__ = checks.arguments(Scaling.__call__, **limits)(cls.__call__)

    @abc.abstractmethod
    def __call__(
        self, channels: int, base: float, length: Num[Array, "B"]
    ) -> tuple[Frequencies, float]:
        """The frequencies, and the factor for query and key.

        Args:
            channels: R, how many channels are turned.
            base: that of RoPE.
            length: how many positions each row has now.
        """


@dataclasses.dataclass(frozen=True)
class Linear(Scaling):
    """Position Interpolation: frequency_m / factor, as if positions were squeezed.

    Args:
        factor: new length over trained length; at least 1.

    References:
        Chen, Wong, Chen, Tian, Extending Context Window of Large Language Models via Positional
        Interpolation, arXiv:2306.15595, section 2.

    >>> Linear(factor=4.0)(4, 10_000.0, jnp.array([8]))[0].tolist()
    [0.25, 0.0025]
    """

    factor: float = 4.0

    def __post_init__(self):
        checks.fields(self, factor=checks.at_least(1))

    def __call__(self, channels, base, length):
        return rope_frequencies(channels, base) / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class NTKAware(Scaling):
    """A greater base: the slowest pair turns `factor` times slower, the fastest as before.

        base' = base * factor^(R / (R - 2))

    Args:
        factor: at least 1.

    References:
        Described in Peng, Quesnelle, Fan, Shippole, arXiv:2309.00071, section 3.1.

    >>> NTKAware(factor=4.0)(4, 10_000.0, jnp.array([8]))[0].tolist()
    [1.0, 0.0025]
    """

    factor: float = 4.0

    def __post_init__(self):
        checks.fields(self, factor=checks.at_least(1))

    def __call__(self, channels, base, length):
        _require_pairs(self, channels)
        return rope_frequencies(channels, base * self.factor ** (channels / (channels - 2))), 1.0


@dataclasses.dataclass(frozen=True)
class DynamicNTK(Scaling):
    """`NTKAware` by as much as each row's current length n needs; nothing up to the original one.

        base' = base * (factor * max(n / original_length, 1) - (factor - 1))^(R / (R - 2))

    This is Hugging Face's formula, where n is the longest row's; factor = 1 is that of the YaRN
    paper. See the module about decoding.

    Args:
        factor: at least 1; above 1 the base grows faster than the length.
        original_length: trained length; at least 1.

    References:
        Described in Peng, Quesnelle, Fan, Shippole, arXiv:2309.00071, section 3.3.

    >>> DynamicNTK(original_length=2)(4, 10_000.0, jnp.array([2, 8]))[0].shape
    (2, 2)
    """

    factor: float = 1.0
    original_length: int = 2048
    reads_length: ClassVar[bool] = True

    def __post_init__(self):
        checks.fields(self, factor=checks.at_least(1), original_length=checks.at_least(1))

    def __call__(self, channels, base, length):
        _require_pairs(self, channels)
        excess = jnp.maximum(length.astype(jnp.float32) / self.original_length, 1.0)
        slower = self.factor * excess - (self.factor - 1)
        # (base * slower^(R / (R - 2)))^(-2m / R) without the great powers.
        exponents = jnp.asarray(-np.arange(0, channels, 2) / (channels - 2), jnp.float32)
        own = jnp.asarray(rope_frequencies(channels, base), jnp.float32)
        return own[None, :] * slower[:, None] ** exponents[None, :], 1.0


@dataclasses.dataclass(frozen=True)
class YaRN(Scaling):
    """YaRN: slow pairs as in `Linear`, fast ones unchanged, a ramp between; logits grow a little.

        r_m = original_length * frequency_m / (2 pi)               turns within the trained length
        frequency_m * (g_m + (1 - g_m) / factor),     query and key * (0.1 ln factor + 1)
        ramp="rotations":  g_m = clip((r_m - beta_slow) / (beta_fast - beta_slow), 0, 1)
        ramp="dimension":  g_m = 1 - clip((m - low) / (high - low), 0, 1); low and high are the m
                           where r_m is beta_fast and beta_slow, rounded outwards if `truncate`

    The paper writes the first ramp; its code, and all code after it, has the second. DeepSeek's
    factor for query and key, with mscale = mscale_all_dim, is `attention_factor=1.0`.

    Args:
        factor: new length over trained length; at least 1.
        original_length: trained length; at least 1.
        beta_fast: pairs with this many turns or more stay as they are; at least beta_slow. If they
            are equal, the ramp is a step (Kimi-K2).
        beta_slow: pairs with this many turns or fewer are interpolated; above 0.
        truncate: whether the edges of the second ramp are whole numbers.
        attention_factor: multiplies query and key; above 0. None: 0.1 ln factor + 1.

    References:
        Peng, Quesnelle, Fan, Shippole, YaRN: Efficient Context Window Extension of Large Language
        Models, arXiv:2309.00071, sections 3.2 and 3.4.

    >>> frequencies, factor = YaRN(factor=8.0)(64, 10_000.0, jnp.array([8]))
    >>> round(factor, 3)
    1.208
    """

    factor: float = 16.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    ramp: Literal["dimension", "rotations"] = "dimension"
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self):
        checks.fields(
            self,
            factor=checks.at_least(1),
            original_length=checks.at_least(1),
            beta_slow=checks.above(0),
            attention_factor=checks.above(0),
        )
        wanted = f"at least beta_slow = {self.beta_slow}"
        checks.require("YaRN beta_fast", self.beta_fast, self.beta_fast >= self.beta_slow, wanted)

    def __call__(self, channels, base, length):
        own = rope_frequencies(channels, base)
        kept = self._by_dimension(channels, base) if self.ramp == "dimension" else None
        if kept is None:
            kept = self._by_turns(self.original_length * own / (2 * math.pi))
        factor = self.attention_factor
        factor = 0.1 * math.log(self.factor) + 1 if factor is None else factor
        return own * (kept + (1 - kept) / self.factor), factor

    def _by_turns(self, turns: np.ndarray) -> np.ndarray:
        width = self.beta_fast - self.beta_slow
        if width == 0:
            return np.where(turns >= self.beta_slow, 1.0, 0.0)
        return np.clip((turns - self.beta_slow) / width, 0, 1)

    def _by_dimension(self, channels: int, base: float) -> np.ndarray:
        def place(turns):
            ratio = self.original_length / (2 * math.pi * turns)
            return channels * math.log(ratio) / (2 * math.log(base))

        low, high = place(self.beta_fast), place(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, channels - 1)
        high += 0.001 if low == high else 0
        return 1 - np.clip((np.arange(channels // 2) - low) / (high - low), 0, 1)


@dataclasses.dataclass(frozen=True)
class LongRoPE(Scaling):
    """LongRoPE: every pair is slowed by a factor of its own, found by search, for long rows.

        frequency_m / long_factors_m      rows longer than original_length
        frequency_m / short_factors_m     others
        query and key * sqrt(1 + ln factor / ln original_length)

    As in the released code, which leaves out the paper's unscaled first tokens. Hugging Face picks
    one list for the batch, by its longest row. See the module about decoding.

    Args:
        long_factors: R / 2 numbers above 0, as a model publishes them. None: all are `factor`.
        short_factors: likewise. None: all are 1.
        factor: new length over trained length; at least 1.
        original_length: trained length; at least 2.
        attention_factor: multiplies query and key; above 0. None: the square root.

    References:
        Ding et al., LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens,
        arXiv:2402.13753, section 3.

    >>> LongRoPE(factor=8.0, original_length=8)(4, 10_000.0, jnp.array([8]))[1] == 2**0.5
    True
    """

    long_factors: tuple[float, ...] | None = None
    short_factors: tuple[float, ...] | None = None
    factor: float = 32.0
    original_length: int = 4096
    attention_factor: float | None = None
    reads_length: ClassVar[bool] = True

    def __post_init__(self):
        checks.fields(
            self,
            long_factors=checks.above(0),
            short_factors=checks.above(0),
            factor=checks.at_least(1),
            original_length=checks.at_least(2),
            attention_factor=checks.above(0),
        )

    def __call__(self, channels, base, length):
        own = rope_frequencies(channels, base)
        long, short = (
            jnp.asarray(own / self._factors(field, channels // 2, default), jnp.float32)
            for field, default in (("long_factors", self.factor), ("short_factors", 1.0))
        )
        is_long = length[:, None] > self.original_length
        factor = self.attention_factor
        if factor is None:
            factor = math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))
        frequencies = jnp.where(is_long, long[None, :], short[None, :])
        return jnp.where(jnp.isnan(length)[:, None], jnp.nan, frequencies), factor

    def _factors(self, field: str, pairs: int, default: float) -> np.ndarray:
        factors = getattr(self, field)
        if factors is not None:
            wanted = f"{pairs} numbers, one for each pair"
            checks.require(f"LongRoPE {field}", factors, len(factors) == pairs, wanted)
        return np.full(pairs, default) if factors is None else np.asarray(factors)


@dataclasses.dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1's: slow pairs as in `Linear`, fast ones unchanged, a ramp between.

        r_m = original_length * frequency_m / (2 pi)               turns within the trained length
        frequency_m * (g_m + (1 - g_m) / factor),     g_m = clip((r_m - low) / (high - low), 0, 1)

    The ramp is that of YaRN's paper; there is no factor for query and key.

    Args:
        factor: new length over trained length; at least 1.
        original_length: trained length; at least 1.
        low: pairs with this many turns or fewer are interpolated; above 0.
        high: pairs with this many turns or more stay as they are; at least `low`. If they are
            equal, the ramp is a step (Llama 4 Scout).

    References:
        Meta's code for Llama 3.1; the model is in Grattafiori et al., The Llama 3 Herd of Models,
        arXiv:2407.21783.

    >>> Llama3()(4, 500_000.0, jnp.array([8]))[0].round(4).tolist()
    [1.0, 0.0005]
    """

    factor: float = 8.0
    original_length: int = 8192
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self):
        checks.fields(
            self,
            factor=checks.at_least(1),
            original_length=checks.at_least(1),
            low=checks.above(0),
        )
        wanted = f"at least low = {self.low}"
        checks.require("Llama3 high", self.high, self.high >= self.low, wanted)

    def __call__(self, channels, base, length):
        ramp = YaRN(
            self.factor,
            self.original_length,
            beta_fast=self.high,
            beta_slow=self.low,
            ramp="rotations",
            attention_factor=1.0,
        )
        return ramp(channels, base, length)


def _require_pairs(scaling: Scaling, channels: int) -> None:
    checks.integer(f"number of channels that {type(scaling).__name__} turns", channels, low=4)
