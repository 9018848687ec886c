"""ComRoPE: trainable rotations of blocks of channels, whose angle matrices commute."""

from typing import Literal, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from posjax import checks
from posjax.encodings.base import PositionEncoding
from posjax.encodings.rotary import turn
from posjax.frequencies import rope_frequencies
from posjax.grids import grid_positions
from posjax.types import Array, Float, Num

__all__ = ["ComRoPE", "rotate_blocks"]


@checks.arguments()
def rotate_blocks(
    x: Num[Array, "B T N H"], amounts: Float[Array, "#B T m"], angles: Float[Array, "K m b b"]
) -> Num[Array, "B T N H"]:
    """Multiplies each block of b neighbouring channels by exp(amount (P - P^T)).

    For b = 2 this is a turn by amount (P_10 - P_01). Larger blocks are turned in the basis of their
    eigenvectors, which is found once for all tokens; `jax.scipy.linalg.expm` for each token would
    be slower, and in float32 far from exact if the amounts are large.

    Args:
        amounts: how far each of the M = H / b blocks is turned.
        angles: P of each block; with K < N heads, each serves N / K heads in a row.

    Returns:
        An array like x, in x's dtype; computed in float32.

    >>> x, quarter = jnp.array([[[[1.0, 0.0]]]]), jnp.array([[[[0.0, 0.0], [jnp.pi / 2, 0.0]]]])
    >>> rotate_blocks(x, jnp.ones((1, 1, 1)), quarter).round(3).tolist()
    [[[[-0.0, 1.0]]]]
    """
    kv_heads, blocks, block, _ = angles.shape
    skew = angles - jnp.swapaxes(angles, -1, -2)
    if block == 2:
        speeds = jnp.repeat(skew[:, :, 1, 0], x.shape[2] // kv_heads, axis=0)
        return turn(x, amounts[:, :, None, :] * speeds[None, None], layout="interleaved")
    grouped = x.astype(jnp.float32).reshape(*x.shape[:2], kv_heads, -1, blocks, block)
    return _exponential(skew, amounts, grouped).reshape(x.shape).astype(x.dtype)


@jax.custom_jvp
def _exponential(
    skew: Float[Array, "K m b b"], amounts: Float[Array, "#B T m"], x: Float[Array, "B T K G m b"]
) -> Float[Array, "B T K G m b"]:
    """exp(amount skew) x = U exp(-i amount l) U^H x, with i skew = U diag(l) U^H."""
    values, vectors = _eigen(skew)
    inside = _change_basis(jnp.swapaxes(vectors, -1, -2).conj(), x)
    phase = amounts[:, :, None, :, None] * values[None, None]
    return _change_basis(vectors, inside * _unit(-phase)[:, :, :, None]).real


@_exponential.defjvp
def _exponential_jvp(primals, tangents):
    """The derivative along `skew` also holds if eigenvalues are equal, unlike that of `eigh`.

    In the basis U it is multiplied, element by element, by the divided differences of e^(-i a l),
    which are a e^(-i a (l_k + l_n) / 2) sin(z) / z with z = a (l_k - l_n) / 2.
    """
    (skew, amounts, x), (skew_dot, amounts_dot, x_dot) = primals, tangents
    values, vectors = _eigen(skew)
    back = jnp.swapaxes(vectors, -1, -2).conj()
    a = amounts[:, :, None, :, None, None]
    sums = a * (values[..., :, None] + values[..., None, :])[None, None] / 2
    differences = a * (values[..., :, None] - values[..., None, :])[None, None] / 2
    divided = _unit(-sums) * _complex(a * jnp.sinc(differences / jnp.pi))
    middle = jnp.matmul(jnp.matmul(back, _complex(skew_dot), precision="highest"), vectors)
    changed = jnp.einsum(
        "btkmij,btkgmj->btkgmi", divided * middle[None, None], _change_basis(back, x)
    )
    y = _exponential(skew, amounts, x)
    turning = jnp.einsum("kmij,btkgmj->btkgmi", skew, y, precision="highest")
    y_dot = _exponential(skew, amounts, x_dot) + _change_basis(vectors, changed).real
    return y, y_dot + amounts_dot[:, :, None, None, :, None] * turning


def _eigen(skew: Array) -> tuple[Array, Array]:
    """Real l [..., b] and U [..., b, b] with i skew = U diag(l) U^H."""
    return jnp.linalg.eigh(jax.lax.complex(jnp.zeros_like(skew), skew))


def _change_basis(matrices: Array, x: Array) -> Array:
    return jnp.einsum("kmij,btkgmj->btkgmi", matrices, _complex(x), precision="highest")


def _complex(x: Array) -> Array:
    return x if jnp.iscomplexobj(x) else jax.lax.complex(x, jnp.zeros_like(x))


def _unit(angle: Array) -> Array:
    return jax.lax.complex(jnp.cos(angle), jnp.sin(angle))


class ComRoPE(PositionEncoding):
    """Turns blocks of channels by trained angle matrices that commute, so that scores are relative.

        logit_ij = H^-0.5 (R(x_i) q_i) . (R(x_j) k_j),     R(x_i)^T R(x_j) = R(x_j - x_i)
        R(x) = exp(sum over axes a of x_a A_a),            A_a block-diagonal, blocks b x b
        "axial":    block m of A_a is P_m - P_m^T if m = a modulo the number of axes, else 0
        "linear":   block m of A_a is multiplier_am (P_m - P_m^T)

    The paper's AP and LD. With `grid` positions are rows and columns (or more axes) of it, scaled
    to (x + 0.5) / size as in the official code, whose random shifts of positions in training and
    extra place for a class token are not here. Without, positions are 0, 1, 2, ... as they are, and
    both kinds can turn the same: RoPE with trained frequencies. `start="normal"` is the paper's;
    frequencies of deviation 1.4 are far above RoPE's slow ones, so start text with "spectrum"
    (`text()`), which is RoPE in the interleaved layout before the first step.

    Each layer has its own parameters. The official code gives each head its own; with grouped heads
    a query must turn like its key, so here those of a key/value head serve its group (the same for
    K = N). Its dense H x H rotations of each token are not built.

    Parameters, float32: angles [K, H / b, b, b]; "linear": multiplier [axes, H / b] too.

    Every position is defined. Beyond the trained ones angles go on; on a grid, `grid` is the
    trained size, and rows beyond it are above 1.

    Tested against a transcription of the official code, with dense matrix exponentials.

    Args:
        kind: how the axes share the blocks.
        block_size: b, at least 2; it divides H ("axial": H / axes).
        grid: sizes of the axes, the last one fastest; None for text. The first has no end.
        start: angles N(0, initial_deviation^2) and multipliers N(0, 1); or RoPE's spectrum, for
            text and even blocks.
        initial_deviation: 0 or more.
        base: of the spectrum; above 1.

    References:
        Yu et al., ComRoPE: Scalable and Robust Rotary Position Embedding Parameterized by Trainable
        Commuting Angle Matrices, arXiv:2506.03737, section 4.

    >>> from posjax.encodings.base import Side
    >>> side = Side(jnp.ones((1, 1, 1, 8)), jnp.array([[3]]))
    >>> (query, _), variables = ComRoPE.text().init_with_output(
    ...     jax.random.key(0), side, side, method="rotate"
    ... )
    >>> variables["params"]["angles"].shape
    (1, 4, 2, 2)
    """

    kind: Literal["axial", "linear"] = "axial"
    block_size: int = 2
    grid: tuple[int, ...] | None = None
    start: Literal["normal", "spectrum"] = "normal"
    initial_deviation: float = 1.0
    base: float = 10_000.0

    def __post_init__(self):
        checks.fields(
            self,
            block_size=checks.at_least(2),
            grid=checks.at_least(1),
            initial_deviation=checks.at_least(0),
            base=checks.above(1),
        )
        if self.start == "spectrum":
            with_it, is_even = 'with start="spectrum"', self.block_size % 2 == 0
            checks.require("ComRoPE grid", self.grid, self.grid is None, f"None {with_it}")
            checks.require("ComRoPE block_size", self.block_size, is_even, f"even {with_it}")
        super().__post_init__()

    @classmethod
    def text(cls) -> Self:
        """For text: starts as RoPE, in the interleaved layout."""
        return cls(start="spectrum")

    @classmethod
    def linear(cls) -> Self:
        """The paper's LD: all axes turn all blocks."""
        return cls(kind="linear")

    def positions(self, tokens, positions, carry=None, *, segment_ids=None, deterministic=True):
        """Coordinates of each token, [B, T, axes], or its position, [B, T]."""
        return positions if self.grid is None else grid_positions(positions, self.grid), carry

    @nn.compact
    def rotate(self, query, key):
        """Query and key, turned by their own positions with this layer's angles."""
        axes, size = len(self.grid or (1,)), query.x.shape[-1]
        blocks = size // self.block_size
        if size % self.block_size or (self.kind == "axial" and blocks % axes):
            whole = f"{axes} x " if self.kind == "axial" and axes > 1 else ""
            wanted = f"a multiple of {whole}block_size={self.block_size}"
            raise ValueError(f"ComRoPE needs {wanted}, but the head size is {size}.")
        shape = (key.x.shape[2], blocks, self.block_size, self.block_size)
        angles = self.param("angles", self._start(), shape, jnp.float32)
        multiplier = jnp.asarray(np.arange(axes)[:, None] == np.arange(blocks) % axes, jnp.float32)
        if self.kind == "linear":
            is_normal = self.start == "normal"
            start = nn.initializers.normal(1.0) if is_normal else nn.initializers.ones
            multiplier = self.param("multiplier", start, (axes, blocks), jnp.float32)
        query_amounts, key_amounts = (
            jnp.einsum("bta,am->btm", self._scaled(side.indices), multiplier, precision="highest")
            for side in (query, key)
        )
        turned = rotate_blocks(query.x, query_amounts, angles)
        return turned, rotate_blocks(key.x, key_amounts, angles)

    def _start(self) -> nn.initializers.Initializer:
        if self.start == "normal":
            return nn.initializers.normal(self.initial_deviation)

        def spectrum(key, shape, dtype):
            pairs = shape[-1] // 2
            frequencies = rope_frequencies(shape[1] * shape[2], self.base).reshape(-1, pairs)
            blocks = np.zeros(shape[1:])
            for pair in range(pairs):
                blocks[:, 2 * pair + 1, 2 * pair] = frequencies[:, pair]
            return jnp.broadcast_to(jnp.asarray(blocks, dtype), shape)

        return spectrum

    def _scaled(self, indices: Num[Array, "B T *M"]) -> Float[Array, "B T M"]:
        if self.grid is None:
            return indices.astype(jnp.float32)[:, :, None]
        sizes = jnp.asarray(self.grid, jnp.float32)
        return (indices.astype(jnp.float32) + 0.5) / sizes[None, None, :]
