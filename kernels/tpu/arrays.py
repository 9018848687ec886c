"""Arrays that the kernels read and write.

On the host a field is an array, padded to whole blocks. In a kernel it is a reference to the block
of that array at a place of the grid, without the axes of which a block has one entry; `layout` says
which block. Fields that a call does not need are None.
"""

from typing import NamedTuple

from posjax.types import Array, Float, Int, Num

__all__ = ["Gradients", "Inputs", "Outputs", "Residuals"]


class Inputs(NamedTuple):
    """Arrays that both kernels read. Everything with an axis S is interleaved, see `plan`.

    Args:
        table: less its last row, in units of ln 2.
        gate_bias: in units of ln 2.
        strips: see `relative`.
        lower_triangle: see `counting.triangle`.
    """

    query: Num[Array, "B N T H"]
    key: Num[Array, "B K S H"]
    value: Num[Array, "B K S E"]
    gate_key: Num[Array, "B K S H"] | None = None
    table: Float[Array, "#N width H"] | None = None
    gate_bias: Float[Array, "N 1 128"] | None = None
    strips: Float[Array, "#B #N C x"] | None = None
    query_positions: Int[Array, "#B 1 T"] | None = None
    key_positions: Int[Array, "#B 1 S"] | None = None
    query_segments: Int[Array, "#B 1 T"] | None = None
    key_segments: Int[Array, "#B 1 S"] | None = None
    lower_triangle: Num[Array, "128 128"] | None = None


class Outputs(NamedTuple):
    """Arrays that the forward kernel writes.

    Args:
        lse: log-sum-exp of each query's logits, in units of ln 2.
        output_residual: the part of the output that rounding to bfloat16 took away; without it the
            gradients of a whole row would tilt, which those of the gates add up.
        carries: count - 1/2 on the right of each block of keys; or more than there are positions,
            if the block was plain attention.
    """

    output: Num[Array, "B N T E"]
    lse: Float[Array, "B N 1 T"]
    output_residual: Num[Array, "B N T E"] | None = None
    carries: Float[Array, "B N key_blocks T"] | None = None


class Residuals(NamedTuple):
    """Arrays that only the backward kernel reads.

    Args:
        delta: the product of each output with its cotangent.
        carries: see `Outputs`, as for `lse`.
        upper_triangle: see `counting.triangle`.
    """

    cotangent: Num[Array, "B N T E"]
    lse: Float[Array, "B N 1 T"]
    delta: Float[Array, "B N 1 T"]
    carries: Float[Array, "B N key_blocks T"] | None = None
    upper_triangle: Num[Array, "128 128"] | None = None


class Gradients(NamedTuple):
    """Arrays that the backward kernel writes: the gradients of `Inputs`, in float32.

    Those of keys and values have their lengths last. Those that a batch or heads share are not yet
    added up.
    """

    query: Float[Array, "B N T H"]
    key: Float[Array, "B K H S"]
    value: Float[Array, "B K E S"]
    gate_key: Float[Array, "B K H S"] | None = None
    table: Float[Array, "B N width H"] | None = None
    gate_bias: Float[Array, "B N 1 128"] | None = None
    strips: Float[Array, "B N C x"] | None = None
