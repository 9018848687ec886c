"""The host's side of the Pallas kernels: the steps that every chip takes before and after them."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax.biases.base import Bias
from posjax.biases.contextual import ContextualBias
from posjax.biases.relative import RelativeBias
from posjax.biases.sum import addends
from posjax.forms import NO_KEY, NO_QUERY
from posjax.kernels.common import LOG2E, MASKED, Attended
from posjax.masks import Mask, Tokens
from posjax.problem import Problem
from posjax.types import Array, Float, Int, Num

__all__ = [
    "CopeSettings",
    "Prepared",
    "Settings",
    "attended",
    "contextual",
    "gate_bias_of_heads",
    "padded",
    "relatives",
    "same_heads",
    "sides",
    "table_of_differences",
    "unsupported_by",
]

_EXACT = jax.lax.Precision.HIGHEST
# The position of padding: no query is so far.
_FAR = 2**30


@dataclasses.dataclass(frozen=True)
class CopeSettings:
    """The static part of a contextual bias; a chip's own class adds to it.

    Args:
        positions: P.
        gate_scale: factor of the products of query and (gate) key.
        own_gate_key: whether gates have their own keys.
    """

    positions: int
    gate_scale: float
    own_gate_key: bool
    has_gate_bias: bool

    @staticmethod
    def of(bias: ContextualBias, scale: float) -> dict[str, Any]:
        """The settings of a description, by name; `scale` is the attention's."""
        return {
            "positions": bias.num_positions,
            "gate_scale": scale if bias.gate_scale is None else bias.gate_scale,
            "own_gate_key": bias.gate_key is not None,
            "has_gate_bias": bias.gate_bias is not None,
        }


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything static about one call; a chip's own class adds to it.

    Arrays are padded to whole blocks.

    Args:
        blocks: the chip's.
        queries: number of real queries; those behind them are padding.
        cope: of the contextual bias, the chip's; None without one.
        relative: whether there is a bias of the distance.
    """

    scale: float
    blocks: Any
    queries: int
    is_causal: bool
    window: tuple[int, int] | None
    segments: bool
    cope: Any
    relative: bool = False

    @property
    def restricted(self) -> bool:
        """Whether some query may not attend to some key."""
        return self.is_causal or self.window is not None or self.segments


class Prepared(NamedTuple):
    """A problem as kernels take it.

    Args:
        cope: the contextual part of the bias.
        relatives: the parts of the bias that depend on the distance.
        mask: of padded lengths.
        padding: how many queries and keys are appended.
    """

    problem: Problem
    cope: ContextualBias | None
    relatives: list[RelativeBias]
    mask: Mask
    padding: tuple[int, int]

    @classmethod
    def of(cls, problem: Problem, block_q: int, block_k: int) -> "Prepared":
        """The problem, for blocks of so many queries and keys."""
        padding = -problem.query.shape[1] % block_q, -problem.key.shape[1] % block_k
        mask, bias = padded(problem.mask, *padding), problem.bias
        return cls(problem, contextual(bias), relatives(bias), mask, padding)

    def settings(self, blocks: Any, cope: Any) -> dict[str, Any]:
        """Those of `Settings`, by name."""
        return {
            "scale": self.problem.scale,
            "blocks": blocks,
            "queries": self.problem.query.shape[1],
            "is_causal": self.mask.is_causal,
            "window": self.mask.window,
            "segments": self.mask.query.segment_ids is not None,
            "cope": cope,
            "relative": bool(self.relatives),
        }

    @property
    def lengths(self) -> tuple[int, int]:
        """Numbers of queries and keys, with padding."""
        queries, keys = self.padding
        return self.problem.query.shape[1] + queries, self.problem.key.shape[1] + keys


def contextual(bias: Bias | None) -> ContextualBias | None:
    """The part that counts, of at most one."""
    parts = () if bias is None else addends(bias)
    return next((part for part in parts if isinstance(part, ContextualBias)), None)


def relatives(bias: Bias | None) -> list[RelativeBias]:
    """The parts that depend on positions alone."""
    parts = () if bias is None else addends(bias)
    return [part for part in parts if isinstance(part, RelativeBias)]


def attended(
    problem: Problem, output: Num[Array, "B T N E"], lse: Float[Array, "B T N"]
) -> Attended:
    """The result of a kernel whose log-sum-exp lacks what each query adds to all of its logits.

    That is the product with the last row of a contextual bias's table: `table_of_differences`.
    """
    if not problem.needs_log_sum_exp:
        return Attended(output, lse)
    # A row that sees nothing has MASKED, in units of ln 2 and rounded.
    lse = jnp.where(lse < 0.5 * MASKED, -jnp.inf, lse)
    cope = contextual(problem.bias)
    if cope is None:
        return Attended(output, lse)
    last = cope.table[..., -1, :].astype(jnp.float32) * cope.bias_scale
    letters = "btnh,h->btn" if last.ndim == 1 else "btnh,nh->btn"
    query = problem.query.astype(jnp.float32)
    return Attended(output, lse + jnp.einsum(letters, query, last, precision=_EXACT))


def unsupported_by(problem: Problem, chip: str) -> str | None:
    """The reason why the Pallas kernels for this kind of chip cannot solve it; None if they can."""
    sizes = (*problem.query.shape, *problem.key.shape)
    if not all(isinstance(size, int) for size in sizes):
        return f"the {chip} kernels need sizes that are known when they are compiled"
    settings = problem.unsupported_settings(f"the {chip} kernels")
    return settings or _unsupported_bias(problem, chip)


def _unsupported_bias(problem: Problem, chip: str) -> str | None:
    """The reason why the kernels cannot do a part of the bias; None if they can."""
    parts = addends(problem.bias)
    for part in parts:
        if isinstance(part, RelativeBias) and not part.distance_only:
            name = getattr(part.function, "__name__", type(part.function).__name__)
            return (
                f"RelativeBias without distance_only (its function is {name}) has no {chip} kernel"
            )
        if not isinstance(part, ContextualBias | RelativeBias):
            return f"{type(part).__name__} has no {chip} kernel"
        if isinstance(part, ContextualBias) and part.direction == "forward":
            return (
                f'direction="forward" counts from the far end, and the {chip} kernels start at the '
                "query"
            )
    if sum(isinstance(part, ContextualBias) for part in parts) > 1:
        return f"a sum of several ContextualBias has no {chip} kernel"
    return None


def table_of_differences(bias: ContextualBias) -> Float[Array, "#N P H"]:
    """The table less its last row, in units of ln 2."""
    table = bias.table.astype(jnp.float32)
    table = table if table.ndim == 3 else table[None]
    return (table - table[:, -1:]) * (bias.bias_scale * LOG2E)


def gate_bias_of_heads(bias: ContextualBias, heads: int) -> Float[Array, "N"] | None:
    """The bias of the gates, in units of ln 2, one number for each head; None without one."""
    if bias.gate_bias is None:
        return None
    return jnp.broadcast_to(bias.gate_bias.astype(jnp.float32) * LOG2E, (heads,))


def sides(settings: Settings, mask: Mask) -> dict[str, Int[Array, "#B length"]]:
    """Positions and segments of queries and keys, by the names that kernels give them."""
    if not settings.restricted:
        return {}
    tokens = {"query": mask.query, "key": mask.key}
    found = {f"{name}_positions": side.positions for name, side in tokens.items()}
    if settings.segments:
        found |= {f"{name}_segments": side.segment_ids for name, side in tokens.items()}
    return found


def padded(mask: Mask, queries: int, keys: int) -> Mask:
    """The mask with padding that nothing sees: by its position or by its segment.

    Queries of padding may see real keys; what comes of them is cut off.
    """

    def side(real: Tokens, amount: int, position: int | None, segment: int) -> Tokens:
        width = ((0, 0), (0, amount))
        positions = real.positions.astype(jnp.int32)
        if position is None:
            positions = jnp.pad(positions, width, mode="edge")
        else:
            positions = jnp.pad(positions, width, constant_values=position)
        ids = real.segment_ids
        if ids is None and keys and not mask.is_causal:
            ids = jnp.zeros((1, real.length), jnp.int32)
        if ids is not None:
            ids = jnp.pad(ids.astype(jnp.int32), width, constant_values=segment)
        return Tokens(positions, ids)

    return Mask(
        side(mask.query, queries, None, NO_QUERY),
        side(mask.key, keys, _FAR if mask.is_causal else None, NO_KEY),
        is_causal=mask.is_causal,
        window=mask.window,
    )


def same_heads(arrays: dict[str, Array], axis: int) -> dict[str, Array]:
    """Keys, values and gate keys repeated to one number of heads."""
    names = [name for name in ("key", "value", "gate_key") if name in arrays]
    counts = {arrays[name].shape[axis] for name in names}
    many = max(counts)
    if any(many % count for count in counts):
        many = arrays["query"].shape[axis]
    repeated = {n: jnp.repeat(arrays[n], many // arrays[n].shape[axis], axis=axis) for n in names}
    return arrays | repeated
