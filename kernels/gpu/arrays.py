"""Arrays that the kernels read and write; in a kernel, references to them in global memory.

Those that a call does not need are None.
"""

from typing import NamedTuple

from posjax.types import Array, Float, Int, Num

__all__ = ["Inputs", "KeyGradients", "Outputs", "QueryGradients", "Residuals"]


class Inputs(NamedTuple):
    """Inputs of all kernels; T and S are whole blocks, and H is 64 or 128.

    `ranges` are described in `posjax.masks`, `tables` in `tables`, `distance_bias` in `relative`.
    Products of gates with `lower_triangle` are sums from each key to the right.
    """

    query: Num[Array, "B T N H"]
    key: Num[Array, "B S K H"]
    value: Num[Array, "B S K H"]
    ranges: Int[Array, "numbers"]
    gate_key: Num[Array, "B S K H"] | None = None
    gate_bias: Float[Array, "N"] | None = None
    tables: Float[Array, "B N T words"] | None = None
    lower_triangle: Float[Array, "n n"] | None = None
    distance_bias: Float[Array, "#B #N T+S"] | None = None
    query_positions: Int[Array, "#B T"] | None = None
    query_segments: Int[Array, "#B T"] | None = None
    key_positions: Int[Array, "#B S"] | None = None
    key_segments: Int[Array, "#B S"] | None = None


class Outputs(NamedTuple):
    """Outputs of the forward kernel.

    `output + output_residual` has twice the digits of `output`; `lse` is the log-sum-exp in units
    of ln 2. With a contextual bias `carries` are the places on the right of every 32 keys that were
    counted (others are not written), and `last_plain` is the last block of keys that was plain
    attention, one number for 64 queries.
    """

    output: Num[Array, "B T N H"]
    output_residual: Num[Array, "B T N H"]
    lse: Float[Array, "B N T"]
    carries: Float[Array, "B N S/32 T"] | None = None
    last_plain: Int[Array, "B N T"] | None = None


class Residuals(NamedTuple):
    """Further inputs of the backward kernels.

    `delta` is the product of cotangent and output. Products with `upper_triangle` are sums over the
    keys up to each one. Slots begin as `empty_slots`, NaN. Only the kernels of keys have
    `prefixes`, an output of the kernel of queries, and `key_ranges`, the blocks of queries that see
    every 64 keys.
    """

    cotangent: Num[Array, "B T N H"]
    lse: Float[Array, "B N T"]
    delta: Float[Array, "B N T"]
    carries: Float[Array, "B N S/32 T"] | None
    last_plain: Int[Array, "B N T"] | None
    upper_triangle: Float[Array, "32 32"] | None = None
    empty_slots: Float[Array, "64 words"] | None = None
    prefixes: Float[Array, "B N S/64 T"] | None = None
    key_ranges: Int[Array, "numbers"] | None = None


class QueryGradients(NamedTuple):
    """Outputs of the backward kernel of queries.

    With a contextual bias `prefixes` are sums of dplace on the left of every 64 keys that count;
    `slots` are running sums of dlogits at keys whose next place is in a lower bin, and `total` and
    `moment` those at the end, see `tables.table_gradients`; `gate_bias` are sums over keys.
    `distance_bias` are sums along diagonals, see `relative`.
    """

    query: Num[Array, "B T N H"]
    prefixes: Float[Array, "B N S/64 T"] | None = None
    slots: Float[Array, "B N T words"] | None = None
    total: Float[Array, "B N T"] | None = None
    moment: Float[Array, "B N T"] | None = None
    gate_bias: Float[Array, "B N T"] | None = None
    distance_bias: Float[Array, "B N T/64 S+64"] | None = None


class KeyGradients(NamedTuple):
    """Outputs of a backward kernel of keys: of keys and values, or of gate keys."""

    key: Num[Array, "B S K H"] | None = None
    value: Num[Array, "B S K H"] | None = None
    gate_key: Num[Array, "B S K H"] | None = None
