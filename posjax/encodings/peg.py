"""PEG, the position encoding generator of conditional position encodings: a short convolution."""

from typing import Self

import flax.linen as nn
import jax.numpy as jnp

from posjax import checks
from posjax.encodings.stream import StreamEncoding
from posjax.types import Array, Float, Int, Num

__all__ = ["PEG", "causal_convolution", "grid_convolution"]


@checks.arguments()
def causal_convolution(
    kept: Float[Array, "B S D"],
    kernel: Float[Array, "taps D"],
    positions: Num[Array, "B T"],
    rows: Int[Array, "T"],
) -> Float[Array, "B T D"]:
    """Each channel's weighted sum of a token and the ones before it in its sequence.

        y_t = sum of kernel[taps - 1 - d] * kept[rows_t - d] over d < taps with d <= positions_t

    The last tap is for the token itself, as in PyTorch's Conv1d with padding on the left. A
    sequence starts at position 0, so nothing comes from the packed segment before.

    Args:
        kept: the tokens known so far; token t is at `rows[t]`.

    Returns:
        float32.

    >>> x = jnp.array([[[1.0], [2.0], [3.0]]])
    >>> causal_convolution(x, jnp.ones((2, 1)), jnp.array([[0, 1, 0]]), jnp.arange(3)).tolist()
    [[[1.0], [3.0], [3.0]]]
    """
    taps, total = kernel.shape[0], 0.0
    for back in range(taps):
        source = jnp.take(kept, jnp.maximum(rows - back, 0), axis=1).astype(jnp.float32)
        inside = (positions >= back)[:, :, None]
        total += jnp.where(inside, source, 0) * kernel[taps - 1 - back][None, None, :]
    return total


@checks.arguments(width=checks.at_least(1))
def grid_convolution(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "taps taps D"],
    positions: Int[Array, "B T"],
    width: int,
) -> Float[Array, "B T D"]:
    """Each channel's weighted sum of a place on a grid and the places around it.

        y[r, c] = sum of kernel[m + a, m + b] * x[r + a, c + b] over -m <= a, b <= m = taps // 2

    Places outside the grid count as 0: PyTorch's Conv2d with padding m. The grid is read row by row
    and starts at position 0 (again in every packed segment); it ends where the tokens end.

    Args:
        width: places in a row.

    Returns:
        float32.

    >>> x = jnp.array([[[1.0], [2.0], [3.0], [4.0]]])
    >>> grid_convolution(x, jnp.ones((3, 3, 1)), jnp.arange(4)[None], 2)[0, :, 0].tolist()
    [10.0, 10.0, 10.0, 10.0]
    """
    length, middle, total = x.shape[1], kernel.shape[0] // 2, 0.0
    for down in range(-middle, middle + 1):
        for right in range(-middle, middle + 1):
            step = down * width + right
            rows = jnp.clip(jnp.arange(length) + step, 0, length - 1)
            column = positions % width + right
            inside = (column >= 0) & (column < width)
            # The same sequence, and a place that there is.
            inside &= jnp.take(positions, rows, axis=1) == positions + step
            source = jnp.where(inside[:, :, None], jnp.take(x, rows, axis=1), 0)
            total += source.astype(jnp.float32) * kernel[middle + down, middle + right][None, None]
    return total


class PEG(StreamEncoding):
    """Adds a convolution of the residual stream to it, before one block of the model.

        stream_t += offset + sum of kernel[kernel_size - 1 - d] * stream_{t-d}      d < kernel_size
        stream[r, c] += offset + sum of kernel[a, b] * stream around [r, c]         with `grid`

    Each channel has its own kernel (depthwise). The paper's form is the second, 3 x 3 on an image,
    before the second block (`block=1`); the zeros outside the image tell a place where it
    is. Its class token is left out of the convolution; there is none here. The first form is the
    causal one, for text; it tells neighbours apart, and only the first kernel_size - 1 tokens where
    they are.

    The form on a grid sees tokens that follow, so it is for attention in both directions: it cannot
    decode, and `posjax.models.Transformer`, which is causal, refuses it. Every position is defined
    and beyond the trained length nothing changes. Positions must go up by 1 from 0 in each
    sequence. Tested against PyTorch's Conv1d and Conv2d. Parameters, float32: kernel [kernel_size,
    D] or [kernel_size, kernel_size, D], which starts uniform within +-taps^-0.5 as PyTorch's, and
    offset [D], which starts at 0. They exist in one layer only.

    Args:
        kernel_size: taps along each axis; on a grid odd.
        block: the block that the convolution precedes, 0 is the first; None, which `layer` gives to
            the others, is none.
        grid: (height, width) of a grid that positions number row by row; None for a sequence.

    Raises:
        ValueError: settings outside these ranges; a model without that block.

    References:
        Chu et al., Conditional Positional Encodings for Vision Transformers, arXiv:2102.10882,
        section 3.

    >>> import jax
    >>> x, places = jnp.ones((1, 4, 2)), jnp.arange(4)
    >>> params = {"kernel": jnp.ones((3, 2)), "offset": jnp.zeros(2)}
    >>> y = PEG().apply({"params": params}, x, x, places[None], places, method="update_stream")
    >>> y[0, :, 0].tolist()
    [2.0, 3.0, 4.0, 4.0]
    """

    kernel_size: int = 3
    block: int | None = 1
    grid: tuple[int, int] | None = None

    def __post_init__(self):
        checks.fields(
            self, kernel_size=checks.at_least(1), block=checks.at_least(0), grid=checks.at_least(1)
        )
        fits = self.grid is None or self.kernel_size % 2 == 1
        checks.require("PEG kernel_size", self.kernel_size, fits, "odd on a grid")
        super().__post_init__()

    @property
    def reads_ahead(self) -> bool:
        """On a grid a place sees the ones below it."""
        return self.grid is not None

    @property
    def decodes(self) -> bool:
        """Only on a sequence."""
        return self.grid is None

    def layer(self, index: int, layers: int) -> Self:
        """This before its block, an encoding without effect before the others."""
        if self.block is not None and self.block >= layers:
            wanted = f"below {layers}, the number of layers"
            raise ValueError(f"PEG block is {self.block}; it must be {wanted}.")
        if index == self.block:
            return super().layer(index, layers)
        return self.clone(parent=None, name=None, block=None)

    def stream_inputs(self, stream):
        """The stream, before this encoding's block."""
        return None if self.block is None else stream

    @nn.compact
    def update_stream(self, stream, inputs, indices, rows):
        """The stream plus its convolution, summed in float32."""
        if self.block is None:
            return stream
        width = stream.shape[-1]
        taps = (self.kernel_size,) * (1 if self.grid is None else 2)
        kernel = self.param("kernel", _uniform, (*taps, width), jnp.float32)
        offset = self.param("offset", nn.initializers.zeros, (width,), jnp.float32)
        if self.grid is None:
            out = causal_convolution(inputs, kernel, indices, rows)
        else:
            out = grid_convolution(stream, kernel, indices, self.grid[1])
        total = stream.astype(jnp.float32) + out + offset[None, None, :]
        return total.astype(stream.dtype)


def _uniform(key, shape, dtype):
    """PyTorch's start of a depthwise convolution: within +- (number of taps)^-0.5."""
    taps = 1
    for size in shape[:-1]:
        taps *= size
    return (2 * nn.initializers.uniform(1.0)(key, shape, dtype) - 1) * taps**-0.5
