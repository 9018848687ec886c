"""Absolute-win: a coarse table stretched over all places, plus a table repeated in every window."""

import math
from typing import ClassVar, Literal, Self

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.encodings.base import PositionEncoding
from posjax.encodings.learned import lookup
from posjax.positions import LengthError
from posjax.types import Array, Float

__all__ = ["AbsoluteWindow", "resize_weights", "window_table"]

_CUBIC = -0.75  # the free coefficient of cubic convolution; PyTorch's, jax.image has -0.5


@checks.arguments(old=checks.size(), new=checks.size())
def resize_weights(
    old: int, new: int, method: Literal["linear", "cubic"] = "cubic"
) -> Float[np.ndarray, "new old"]:
    """How much each of `old` samples counts for each of `new` ones, along one axis.

        x = (i + 1/2) * old / new - 1/2                   the place of new sample i among the old
        linear: weights 1 - f and f at floor(x) and floor(x) + 1                   f = x - floor(x)
        cubic:  weights k(f + 1), k(f), k(1 - f), k(2 - f) at floor(x) - 1 ... floor(x) + 2
                k(t) = (a + 2) t^3 - (a + 3) t^2 + 1                         0 <= t <= 1
                       a t^3 - 5 a t^2 + 8 a t - 4 a          a = -0.75      1 <= t <= 2

    Samples outside are those of the border. This is PyTorch's F.interpolate (align_corners=False);
    `jax.image.resize` has another cubic (a = -0.5) and leaves out what is outside.

    >>> resize_weights(2, 4, "linear").tolist()
    [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    place = (np.arange(new) + 0.5) * old / new - 0.5
    below = np.floor(place).astype(int)
    fraction = place - below
    taps = {"linear": (0, 1), "cubic": (-1, 0, 1, 2)}[method]
    weights = np.zeros((new, old))
    for tap in taps:
        distance = np.abs(fraction - tap)
        weight = 1 - distance if method == "linear" else _cubic(distance)
        np.add.at(weights, (np.arange(new), np.clip(below + tap, 0, old - 1)), weight)
    return weights


@checks.arguments(shape=checks.size())
def window_table(
    coarse: Float[Array, "*coarse D"], window: Float[Array, "*window D"], shape: tuple[int, ...]
) -> Float[Array, "places D"]:
    """The vectors of all places, row by row: resize(coarse)[x] + window[x mod size of window].

    One axis is resized linearly, two are by bicubic interpolation (`resize_weights`).

    >>> window_table(jnp.zeros((1, 1)), jnp.array([[1.0], [2.0]]), (3,)).tolist()
    [[1.0], [2.0], [1.0]]
    """
    method = "linear" if len(shape) == 1 else "cubic"
    total = coarse
    for axis, size in enumerate(shape):
        weights = jnp.asarray(resize_weights(coarse.shape[axis], size, method), jnp.float32)
        total = jnp.moveaxis(jnp.tensordot(weights, total, (1, axis), precision="highest"), 0, axis)
    for axis, size in enumerate(shape):
        window = jnp.take(window, np.arange(size) % window.shape[axis], axis=axis)
    return (total + window).reshape(math.prod(shape), -1)


class AbsoluteWindow(PositionEncoding):
    """Adds a coarse table stretched over all places and a table repeated in every window.

        embedding_p + resize(coarse, shape)[x] + window[x mod window size]      x = place p in shape

    If attention works in windows, a learned table repeats itself in each of them, and stretching
    it to a larger input breaks that. Here the repeating part has its own table, so only the
    coarse part is stretched: set `shape` to the larger input and keep the parameters. On a grid
    (two axes, read row by row) the coarse table is resized as in SAM 2's code (bicubic, as PyTorch
    does it) and tested against PyTorch; there the grid must consist of whole windows, here it need
    not. The form with one axis, for text, is ours and linear.

    There are prod(shape) places; beyond them `posjax.positions.LengthError` is raised when the
    program is traced, and a position beyond is NaN in a compiled program, which cannot raise.
    Fractional positions are interpolated between places. Parameters, float32: coarse_table
    [*coarse, D], window_table [*window, D]. Both start normal: Hiera's trunc_normal_ cuts at 2, a
    hundred deviations; SAM 2's start at 0.

    Args:
        shape: places along each axis, (length,) or (height, width).
        coarse: rows of the stretched table along each axis.
        window: rows of the repeated table along each axis.
        initial_deviation: standard deviation of both tables at the start.

    Raises:
        ValueError: not one or two axes, unequal numbers of axes, or sizes below 1.

    References:
        Bolya, Ryali, Hoffman, Feichtenhofer, Window Attention is Bugged: How not to Interpolate
        Position Embeddings, arXiv:2311.05613, section 3.
        Ravi et al., SAM 2: Segment Anything in Images and Videos, arXiv:2408.00714 (code).

    >>> import jax
    >>> x, p = jnp.zeros((1, 3, 8)), jnp.array([[0, 1, 2]])
    >>> params = AbsoluteWindow().init(jax.random.key(0), x, p, method="embed")["params"]
    >>> {name: table.shape for name, table in params.items()}
    {'coarse_table': (64, 8), 'window_table': (16, 8)}
    """

    shape: tuple[int, ...] = (1024,)
    coarse: tuple[int, ...] = (64,)
    window: tuple[int, ...] = (16,)
    initial_deviation: float = 0.02
    beyond: ClassVar = "raises"

    def __post_init__(self):
        one = checks.at_least(1)
        zero = checks.at_least(0)
        checks.fields(self, shape=one, coarse=one, window=one, initial_deviation=zero)
        axes = len(self.shape)
        checks.require("AbsoluteWindow shape", self.shape, axes <= 2, "one or two sizes")
        for name in ("coarse", "window"):
            sizes = getattr(self, name)
            wanted = f"as many sizes as shape has, {axes}"
            checks.require(f"AbsoluteWindow {name}", sizes, len(sizes) == axes, wanted)
        super().__post_init__()

    @classmethod
    def grid(cls) -> Self:
        """Hiera's grid for images of 224 x 224: 56 x 56 places, windows of 8 x 8."""
        return cls(shape=(56, 56), coarse=(14, 14), window=(8, 8))

    @nn.compact
    def embed(self, embeddings, indices):
        """The embeddings plus the vectors of their places, summed in float32."""
        _, length, width = embeddings.shape
        if jnp.issubdtype(indices.dtype, jnp.integer):
            self._check_length(length)
        start = nn.initializers.normal(self.initial_deviation)
        coarse = self.param("coarse_table", start, (*self.coarse, width), jnp.float32)
        window = self.param("window_table", start, (*self.window, width), jnp.float32)
        rows = lookup(window_table(coarse, window, self.shape), indices)
        return (embeddings.astype(jnp.float32) + rows).astype(embeddings.dtype)

    def _check_length(self, length: int) -> None:
        if length > math.prod(self.shape):
            raise LengthError(
                f"AbsoluteWindow has shape={self.shape}, but the sequence has {length} tokens; "
                f"build it with a shape of at least {length} places."
            )


def _cubic(t: np.ndarray) -> np.ndarray:
    near = (_CUBIC + 2) * t**3 - (_CUBIC + 3) * t**2 + 1
    far = _CUBIC * (t**3 - 5 * t**2 + 8 * t - 4)
    return np.where(t <= 1, near, far)
