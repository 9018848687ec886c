"""CONFLATOR: RoPE for mixed languages, whose positions notice switches of the language."""

from typing import Literal, NamedTuple, Self

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.encodings.abacus import is_one_of
from posjax.encodings.rope import rope_turn
from posjax.encodings.rotary import Layout, Rotary
from posjax.types import Array, Bool, Int, Num

__all__ = ["CONFLATOR", "Switches", "languages", "switching_positions"]

_UNKNOWN = -1


class Switches(NamedTuple):
    """The state that tokens leave to those after them."""

    language: Int[Array, "B"]  # of the last token that has one; -1 for none yet
    direction: Int[Array, "B"]  # 1 or -1
    index: Num[Array, "B"]
    position: Num[Array, "B"]


@checks.arguments()
def languages(
    tokens: Int[Array, "B T"], second: tuple[int, ...], neutral: tuple[int, ...]
) -> Int[Array, "B T"]:
    """0 for tokens of the first language, 1 for those in `second`, -1 for those in `neutral`.

    >>> languages(jnp.array([[7, 8, 9]]), second=(8,), neutral=(9,)).tolist()
    [[0, 1, -1]]
    """
    found = is_one_of(tokens, second).astype(jnp.int32) if second else jnp.zeros_like(tokens)
    return jnp.where(is_one_of(tokens, neutral), _UNKNOWN, found) if neutral else found


@checks.arguments()
def switching_positions(
    language: Int[Array, "B T"],
    positions: Num[Array, "B T"],
    carry: Switches | None = None,
    *,
    starts: Bool[Array, "B T"] | None = None,
    rule: Literal["reset", "flip"] = "reset",
) -> tuple[Num[Array, "B T"], Switches]:
    """Positions that restart, or turn round, when the language switches.

        reset: index_t = position_t - position of the latest switching point (0 before the first)
        flip:  index_t = index_{t-1} + d_t (position_t - position_{t-1}),   d changes its sign there

    A switching point is a token of another language than the last token before it that had one.

    Args:
        language: 0, 1, ...; -1 belongs to the language before it.
        carry: what this function returned for the tokens before these.
        starts: first tokens of packed sequences, which know nothing of those before. Tokens at
            position 0 are such, too.

    Returns:
        Indices in the dtype of `positions`, and the carry for the tokens that come next.

    >>> language, positions = jnp.array([[0, 0, 1, 1, 1]]), jnp.arange(5)[None, :]
    >>> switching_positions(language, positions)[0].tolist()
    [[0, 1, 0, 1, 2]]
    >>> switching_positions(language, positions, rule="flip")[0].tolist()
    [[0, 1, 0, -1, -2]]
    """
    start = positions == 0 if starts is None else starts | (positions == 0)
    if carry is None:
        none = jnp.zeros_like(positions, shape=positions.shape[:1])
        forward = jnp.ones(len(positions), jnp.int32)
        carry = Switches(jnp.full(len(positions), _UNKNOWN), forward, none, none)
    if 0 in positions.shape:
        return positions, carry
    # The language of each token; a first token without one has none.
    spoken = _latest(language, (language != _UNKNOWN) | start, carry.language)
    before = jnp.concatenate((carry.language[:, None], spoken[:, :-1]), axis=1)
    switch = (spoken != before) & (before != _UNKNOWN) & ~start
    place = jnp.concatenate((carry.position[:, None], positions[:, :-1]), axis=1)
    if rule == "reset":
        anchor = jnp.where(switch, positions, 0)
        anchor = _latest(anchor, switch | start, carry.position - carry.index)
        index, direction = positions - anchor, jnp.ones_like(spoken)
    else:
        turns = jnp.cumsum(switch, axis=1, dtype=jnp.int32)
        since = turns - _latest(turns, start, jnp.zeros_like(carry.direction))
        first = _latest(jnp.ones_like(spoken), start, carry.direction)
        direction = first * (1 - 2 * (since % 2))
        steps = direction.astype(positions.dtype) * jnp.where(start, 0, positions - place)
        walked = jnp.cumsum(steps, axis=1, dtype=positions.dtype)
        offset = _latest(positions - walked, start, carry.index)
        index = offset + walked
    last = spoken[:, -1], direction[:, -1], index[:, -1], positions[:, -1]
    return index, Switches(*last)


def _latest(values: Array, marked: Bool[Array, "B T"], before: Array) -> Array:
    """The value at the latest marked place up to each one; `before` if there is none."""
    index = jnp.broadcast_to(jnp.arange(1, values.shape[1] + 1), values.shape)
    latest = jax.lax.cummax(jnp.where(marked, index, 0), axis=1)
    found = jnp.take_along_axis(values, jnp.maximum(latest - 1, 0), axis=1)
    return jnp.where(latest > 0, found, before[:, None])


class CONFLATOR(Rotary):
    """RoPE by positions that restart, or turn round, at switching points between two languages.

        logit_ij = H^-0.5 rotate(q_i, index_i) . rotate(k_j, index_j)     (`switching_positions`)

    The paper turns query and key as RoPE does and stresses switching points, at which the language
    of neighbouring words differs. **How its angles use them is a guess**: its text and code are not
    available, and both rules here, "reset" and "flip", are readings of that idea. Its second form,
    for pairs of words, is not here. It knows each word's language from labels; here it comes from
    the token ids.

    Tested against a transcription of this rule, one token after another. Without tokens of the
    second language it is RoPE.

    Every position is defined. Under both rules tokens on both sides of a switching point can have
    the same index, so a relative position says less than in RoPE.

    Args:
        second: token ids of the second language; by default bytes from 128 on, which are all
            letters outside ASCII (Hindi in Devanagari).
        neutral: token ids of no language, which never switch; by default all ASCII but letters.
        rule: what happens at a switching point.
        base: of RoPE's frequencies; above 1.
        layout: which channels are a pair, see `posjax.encodings.rotary.turn`.

    References:
        Ali et al., CONFLATOR: Incorporating Switching Point based Rotatory Positional Encodings for
        Code-Mixed Language Modeling, arXiv:2309.05270, abstract.

    >>> tokens = jnp.array([list("go घर".encode())])
    >>> places = jnp.arange(9)[None, :]
    >>> CONFLATOR().apply({}, tokens, places, method="positions")[0].tolist()
    [[0, 1, 2, 0, 1, 2, 3, 4, 5]]
    """

    second: tuple[int, ...] = tuple(range(128, 256))
    neutral: tuple[int, ...] = tuple(i for i in range(128) if not chr(i).isalpha())
    rule: Literal["reset", "flip"] = "reset"
    base: float = 10_000.0
    layout: Layout = "half"

    def __post_init__(self):
        checks.fields(
            self,
            empty=("second", "neutral"),
            second=checks.at_least(0),
            neutral=checks.at_least(0),
            base=checks.above(1),
        )
        both = sorted(set(self.second) & set(self.neutral))
        wanted = f"without {both}, which stand in second"
        checks.require("CONFLATOR neutral", self.neutral, not both, wanted)
        super().__post_init__()

    @classmethod
    def flip(cls) -> Self:
        """Positions turn round at switching points instead of restarting."""
        return cls(rule="flip")

    def positions(self, tokens, positions, carry=None, *, segment_ids=None, deterministic=True):
        """Indices that notice switching points; the carry is the state after the last token."""
        starts = None
        if segment_ids is not None:
            changes = segment_ids[:, 1:] != segment_ids[:, :-1]
            starts = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=False)
        spoken = languages(tokens, self.second, self.neutral)
        return switching_positions(spoken, positions, carry, starts=starts, rule=self.rule)

    def turn_of(self, side):
        """RoPE's angles at the indices."""
        return rope_turn(side.indices, side.x.shape[-1], self.base)
