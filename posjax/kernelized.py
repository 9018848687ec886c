"""Attention in O(T log T): random features of query and key, and relative positions by FFT."""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from posjax import checks
from posjax.types import Array, Float, Num

__all__ = ["KernelizedAttention", "kernelized_attention", "positive_features", "random_projection"]

_HIGHEST = jax.lax.Precision.HIGHEST


@checks.arguments(features=checks.size(), size=checks.size())
def random_projection(
    key: Array, features: int, size: int, *, orthogonal: bool = True
) -> Float[Array, "M H"]:
    """Random directions for `positive_features`: M of them, each N(0, 1) in H dimensions.

    Args:
        orthogonal: make directions orthogonal in blocks of H (their lengths stay those of normal
            vectors), which lowers the error of the features.

    Raises:
        ValueError: features or size below 1.

    >>> random_projection(jax.random.key(0), 5, 4).shape
    (5, 4)
    """
    directions, lengths = jax.random.split(key)
    normal = jax.random.normal(directions, (-(-features // size), size, size))
    if not orthogonal:
        return normal.reshape(-1, size)[:features]
    basis, upper = jnp.linalg.qr(normal)
    # Without these signs the directions are not uniform, and the features are biased.
    signs = jnp.sign(jnp.diagonal(upper, axis1=1, axis2=2))
    rows = (basis * signs[:, None, :]).reshape(-1, size)[:features]
    length = jnp.linalg.norm(jax.random.normal(lengths, (features, size)), axis=-1, keepdims=True)
    return rows * length


@checks.arguments()
def positive_features(
    x: Float[Array, "*shape H"], projection: Float[Array, "M H"]
) -> Float[Array, "*shape M"]:
    """Random features whose products are, on average, exponentials of products.

        phi(x) = M^-0.5 exp(projection x - |x|^2 / 2)        E[phi(x) . phi(y)] = exp(x . y)

    References:
        Choromanski et al., Rethinking Attention with Performers, arXiv:2009.14794, lemma 1.

    >>> positive_features(jnp.zeros((1, 2)), jnp.ones((4, 2))).tolist()
    [[0.5, 0.5, 0.5, 0.5]]
    """
    dots = jnp.einsum("...h,mh->...m", x, projection, precision=_HIGHEST)
    half = 0.5 * jnp.sum(x**2, axis=-1, keepdims=True)
    return jnp.exp(dots - half) * projection.shape[0] ** -0.5


def kernelized_attention(
    query: Num[Array, "B T N H"],
    key: Num[Array, "B T K H"],
    value: Num[Array, "B T K E"],
    relative: Float[Array, "N offsets"],
    projection: Float[Array, "M H"],
    *,
    scale: float = 1.0,
    is_causal: bool = False,
    implementation: Literal["fft", "reference"] = "fft",
) -> Num[Array, "B T N E"]:
    """Attention with a relative bias whose exponential of products is replaced by random features.

        output_i = sum_j c_{j-i} (phi(q_i) . phi(k_j)) v_j / sum_j c_{j-i} (phi(q_i) . phi(k_j))
        c_d = exp(relative[n, R - 1 + d])                    d = -(R - 1) ... R - 1, offsets 2R - 1
        q, k: query and key divided by their lengths, times scale^0.5;  phi: `positive_features`

    On average over projections phi(q_i) . phi(k_j) is exp(scale * cos(q_i, k_j)), so with many
    features this is softmax attention with a relative bias. Lengths of query and key do not count:
    that is what keeps the error of the features bounded (NPRF in the paper). Offsets beyond R - 1
    are treated as R - 1. c_{j-i} is a Toeplitz matrix, so each of the M features needs a
    convolution: O(M E T log T) time, O((M + E) T) memory for each head, in both directions
    (features are taken one after another, and recomputed for the gradient).

    All is float32 inside. The error of a Fourier transform is a part of its largest output (about
    1e-7 of it), not of each one. Where a query sees little compared with others, because its keys
    have small c or, in causal attention, because it is one of the first, its own output is less
    right. Measured for values of order 1: 2e-6 in both directions with biases within 20 of each
    other; causal 1e-6 where c falls with distance (ALiBi), 1e-4 with equal biases, 1e-3 with biases
    of deviation 1 at T = 2048, and useless from deviation 3 on. The denominator is kept above that
    error, so outputs are finite. The paper's authors published no code; tested against the dense
    formula ("reference", O(T^2), exact) and that against loops in float64.

    Args:
        relative: b, one number for each head and offset; an odd number of offsets.
        projection: from `random_projection`, no parameter.
        scale: above 0; 1 in the paper.
        is_causal: keys after the query are not seen.

    Returns:
        In query's dtype.

    Raises:
        ValueError: arguments that do not fit together, named with their values.

    References:
        Luo, Li, Cai, He, Peng, Zheng, Ke, Wang, Liu, Stable, Fast and Accurate: Kernelized
        Attention with Relative Positional Encoding, arXiv:2106.12566, sections 3.2 and 3.3.

    >>> q = k = v = jnp.ones((1, 4, 2, 8))
    >>> projection = random_projection(jax.random.key(0), 16, 8)
    >>> kernelized_attention(q, k, v, jnp.zeros((2, 7)), projection).shape
    (1, 4, 2, 8)
    """
    checks.number("scale", scale, above=0)
    checks.flag("is_causal", is_causal)
    checks.choice("implementation", implementation, ("fft", "reference"))
    _check_arrays(query, key, value, relative, projection)
    groups, length = query.shape[2] // key.shape[2], query.shape[1]
    repeat = lambda x: jnp.repeat(x.astype(jnp.float32), groups, axis=2)  # noqa: E731
    unit = lambda x: _unit(x.astype(jnp.float32)) * math.sqrt(scale)  # noqa: E731
    phi_query = positive_features(unit(query), projection)
    phi_key = repeat(positive_features(unit(key), projection))
    weights = _offset_weights(relative.astype(jnp.float32), length, is_causal)
    # A column of ones: its weighted sum is the denominator.
    values = repeat(
        jnp.pad(value.astype(jnp.float32), ((0, 0),) * 3 + ((0, 1),), constant_values=1)
    )
    if implementation == "reference":
        total = _dense(phi_query, phi_key, values, weights)
        return (total[..., :-1] / total[..., -1:]).astype(query.dtype)
    total = _by_fft(phi_query, phi_key, values, weights)
    bound = jnp.einsum("btnm,bnm->btn", phi_query, jnp.sum(phi_key, axis=1), precision=_HIGHEST)
    floor = jnp.finfo(jnp.float32).eps * bound[..., None]
    return (total[..., :-1] / jnp.maximum(total[..., -1:], floor)).astype(query.dtype)


class KernelizedAttention(nn.Module):
    """`kernelized_attention` with a trained bias and random directions drawn from a seed.

    Parameter: relative [N, 2 max_distance + 1], float32, which starts at 0.

    Args:
        max_distance: offsets farther than this are treated as this one; at least 1.
        features: M, at least 1.
        seed: of the directions, the same at every call; give each layer its own.
        scale: above 0.

    References:
        Luo et al., Stable, Fast and Accurate: Kernelized Attention with Relative Positional
        Encoding, arXiv:2106.12566.

    >>> x = jnp.ones((1, 4, 2, 8))
    >>> variables = KernelizedAttention(max_distance=3).init(jax.random.key(0), x, x, x)
    >>> variables["params"]["relative"].shape
    (2, 7)
    """

    max_distance: int = 512
    features: int = 64
    seed: int = 0
    scale: float = 1.0

    def __post_init__(self):
        one = checks.at_least(1)
        checks.fields(self, max_distance=one, features=one, scale=checks.above(0))
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        query: Num[Array, "B T N H"],
        key: Num[Array, "B T K H"],
        value: Num[Array, "B T K E"],
        *,
        is_causal: bool = False,
    ) -> Num[Array, "B T N E"]:
        """The mixed values, in query's dtype."""
        checks.shape("query", query, ("batch", "length", "heads", "head size"), empty=False)
        shape = (query.shape[2], 2 * self.max_distance + 1)
        relative = self.param("relative", nn.initializers.zeros, shape, jnp.float32)
        directions = random_projection(jax.random.key(self.seed), self.features, query.shape[3])
        settings = {"scale": self.scale, "is_causal": is_causal}
        return kernelized_attention(query, key, value, relative, directions, **settings)


def _unit(x: Array) -> Array:
    """Vectors of length 1; a zero vector stays one."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))


def _offset_weights(relative: Array, length: int, is_causal: bool) -> Float[Array, "N offsets"]:
    """The c of the offsets -(T - 1) ... T - 1, at most 1: a common factor cancels."""
    reach = relative.shape[1] // 2
    offsets = jnp.arange(1 - length, length)
    logs = relative[:, jnp.clip(offsets, -reach, reach) + reach]
    if is_causal:
        logs = jnp.where((offsets > 0)[None, :], -jnp.inf, logs)
    return jnp.exp(logs - jax.lax.stop_gradient(jnp.max(logs, axis=1, keepdims=True)))


def _by_fft(phi_query: Array, phi_key: Array, values: Array, weights: Array) -> Array:
    """sum_j c_{j-i} (phi_query_i . phi_key_j) values_j as one circular convolution a feature."""
    length = values.shape[1]
    # Circular, of length 2T: y_i = sum_j circle[i - j] x_j, so offset d stands at place -d.
    circle = jnp.pad(weights[:, ::-1], ((0, 0), (1, 0)))
    spectrum = jnp.fft.rfft(jnp.roll(circle, -length, axis=1), axis=1).T[None, :, :, None]

    @jax.checkpoint
    def feature(of_query: Array, of_key: Array) -> Array:
        waves = jnp.fft.rfft(of_key[..., None] * values, n=2 * length, axis=1) * spectrum
        return of_query[..., None] * jnp.fft.irfft(waves, n=2 * length, axis=1)[:, :length]

    def add(total: Array, feature_of_both: tuple[Array, Array]) -> tuple[Array, None]:
        return total + feature(*feature_of_both), None

    features_first = tuple(jnp.moveaxis(x, -1, 0) for x in (phi_query, phi_key))
    start = jnp.zeros((*phi_query.shape[:3], values.shape[-1]), jnp.float32)
    return jax.lax.scan(add, start, features_first)[0]


def _dense(phi_query: Array, phi_key: Array, values: Array, weights: Array) -> Array:
    """The same, by the [B, N, T, T] array of all pairs."""
    length = values.shape[1]
    place = jnp.arange(length)
    pairs = weights[:, place[None, :] - place[:, None] + length - 1][None]
    pairs = pairs * jnp.einsum("btnm,bsnm->bnts", phi_query, phi_key, precision=_HIGHEST)
    return jnp.einsum("bnts,bsne->btne", pairs, values, precision=_HIGHEST)


def _check_arrays(query, key, value, relative, projection) -> None:
    checks.shape("query", query, ("batch", "length", "heads", "head size"), empty=False)
    checks.dtype("query", query, jnp.floating)
    batch, length, heads, size = query.shape
    checks.shape("key", key, (batch, length, "heads", size), empty=False)
    checks.shape("value", value, (batch, length, key.shape[2], "head size"), empty=False)
    for name, x in (("key", key), ("value", value)):
        checks.dtype(name, x, (query.dtype,))
    kv_heads = key.shape[2]
    wanted = f"a divisor of query's heads, {heads}"
    checks.require("number of key's heads", kv_heads, heads % kv_heads == 0, wanted)
    checks.shape("relative", relative, (heads, "offsets"))
    checks.dtype("relative", relative, jnp.floating)
    checks.dtype("projection", projection, jnp.floating)
    offsets = relative.shape[1]
    checks.require("number of offsets in relative", offsets, offsets % 2 == 1, "odd")
    checks.shape("projection", projection, ("features", size))
