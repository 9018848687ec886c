"""The description of Contextual Position Encoding (CoPE, arXiv:2405.18719)."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.biases.base import Bias
from posjax.precision import wide
from posjax.types import Array, Bool, Float, Num

__all__ = ["ContextualBias"]

_EXACT = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContextualBias(Bias):
    """Contextual Position Encoding (CoPE): gates of query and key count positions.

        g_ij  = sigmoid(gate_scale * q_i . k'_j + gate_bias)        0 where i may not attend to j
        p_ij  = min(sum of g_ik over keys k from j to i, P - 1)
        bias  = bias_scale * interp(q_i . table, p_ij)              linear between rows of the table

    Departures: the derivative by p is the slope to the right at whole numbers, where the paper's
    ceil/floor code has slope 0, and it is 0 from p = P - 1 on. "From j to i" follows the order of
    the keys in memory.

    Args:
        table: float [P, H], shared by the heads, or [N, P, H].
        gate_key: replaces the key in the gates, [B, S, M, H] where M divides N; None: the key.
        gate_bias: scalar or [N]; None: 0. `inf` forces every gate to 1, which gives a relative
            table clipped at P - 1.
        gate_scale: None means the attention's own scale (the paper's Appendix B).
        bias_scale: 1 is the paper's Appendix B; the official repository's default is the
            attention's scale.
        direction: None demands causal attention. "backward" counts, for any mask, from the last key
            that the query may see down to j; "forward" from the first one up to j.

    References:
        Golovneva, Wang, Weston, Sukhbaatar, Contextual Position Encoding: Learning to Count What's
        Important, arXiv:2405.18719, equations 3 to 6 and Appendix B.
    """

    table: Float[Array, "*N P H"]
    gate_key: Num[Array, "B S M H"] | None = None
    gate_bias: Float[Array, "*N"] | None = None
    gate_scale: float | None = dataclasses.field(default=None, metadata={"static": True})
    bias_scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    direction: Literal["backward", "forward"] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    has_state: ClassVar = True

    @property
    def only_dense(self) -> str | None:
        """Blocks are walked from the query leftwards."""
        return 'direction="forward" has no blockwise form' if self.direction == "forward" else None

    @property
    def num_positions(self) -> int:
        """P, the number of rows of the table."""
        return self.table.shape[-2]

    def dense(self, query, key, *, scale, allowed, query_positions, key_positions):
        """The formula, literally: gates, their sum up to the query, interpolation in q . table."""
        count = self.counts(query, key, scale=scale, allowed=allowed)
        query = wide(jnp.swapaxes(query, 1, 2))
        return _interpolate(self._project(query, self.table), count)

    def counts(
        self,
        query: Num[Array, "B T N H"],
        key: Num[Array, "B S K H"],
        *,
        scale: float,
        allowed: Bool[Array, "#B #N T S"],
    ) -> Float[Array, "B N T S"]:
        """The sums of gates from the query down to every key, before they are cut at P - 1."""
        query = wide(jnp.swapaxes(query, 1, 2))
        gate_key = jnp.swapaxes(key if self.gate_key is None else self.gate_key, 1, 2)
        gate_key = wide(gate_key)
        gate_key = jnp.repeat(gate_key, query.shape[1] // gate_key.shape[1], axis=1)
        dots = jnp.einsum("bnth,bnsh->bnts", query, gate_key, precision=_EXACT)
        gates = jnp.where(allowed, jax.nn.sigmoid(self._gate_logits(dots, scale)), 0.0)
        return jax.lax.cumsum(gates, axis=3, reverse=self.direction != "forward")

    def rows(self, query):
        """z'_i = q_i . (table - last row).

        So the bias is exactly 0 from P - 1 on; softmax does not notice the shift of a row.
        """
        return self._project(wide(query), self.table - self.table[..., -1:, :])

    def start(self, shape, valid):
        """A count of 0 for every query."""
        count = jnp.zeros(shape, jnp.float32)
        return count if valid is None else jnp.where(valid[:, None, :], count, jnp.inf)

    def tile(self, rows, tile, carry):
        """The block's bias; the count grows leftwards, and once finished the bias is 0."""
        if carry is None:
            return jnp.zeros((1, 1, 1, 1), jnp.float32), None
        dots = tile.dots if self.gate_key is None else self._gate_dots(tile.query)
        gates = jnp.where(tile.allowed, jax.nn.sigmoid(self._gate_logits(dots, tile.scale)), 0.0)
        count = jax.lax.cumsum(gates, axis=3, reverse=True) + carry[..., None]
        return _interpolate_falling(rows, count), count[..., 0]

    def finished(self, carry):
        """Every row has counted to P - 1."""
        return jnp.min(carry) >= self.num_positions - 1

    def check(self, query, key, is_causal):
        """Shapes of table and gates; a direction must be named where attention is not causal."""
        _, _, heads, size = query.shape
        checks.shape("table", self.table, ("P", size), (heads, "P", size))
        if self.num_positions < 2:
            raise ValueError(f"table has {self.num_positions} positions; P must be at least 2.")
        if self.gate_key is not None:
            divisors = tuple(m for m in range(1, heads + 1) if heads % m == 0)
            checks.shape("gate_key", self.gate_key, (*key.shape[:2], divisors, size))
        if self.gate_bias is not None:
            checks.shape("gate_bias", jnp.asarray(self.gate_bias), (), (heads,))
        checks.choice("direction", self.direction, ("backward", "forward"), optional=True)
        if not is_causal and self.direction is None:
            raise ValueError(
                "a contextual bias counts keys between key and query, which needs "
                'is_causal=True; for other masks say which way to count: direction="backward" '
                '(from the last key seen) or "forward".'
            )

    def _gate_logits(self, dots: Array, scale: float) -> Array:
        logits = dots * (scale if self.gate_scale is None else self.gate_scale)
        if self.gate_bias is None:
            return logits
        bias = wide(self.gate_bias)
        return logits + jnp.broadcast_to(bias, (dots.shape[1],))[None, :, None, None]

    def _gate_dots(self, query: Array) -> Array:
        """Products of query and gate key of the block."""
        batch, heads, length, size = query.shape
        gate_key = wide(jnp.swapaxes(self.gate_key, 1, 2))
        many = gate_key.shape[1]
        grouped = wide(query).reshape(batch, many, heads // many, length, size)
        dots = jnp.einsum("bmgth,bmsh->bmgts", grouped, gate_key, precision=_EXACT)
        return dots.reshape(batch, heads, length, -1)

    def _project(self, query: Array, table: Array) -> Float[Array, "B N t P"]:
        """bias_scale * query . table in float32."""
        letters = "bnth,ph->bntp" if table.ndim == 2 else "bnth,nph->bntp"
        z = jnp.einsum(letters, query, wide(table), precision=_EXACT)
        return z * self.bias_scale


def _interpolate(
    z: Float[Array, "B N t P"], count: Float[Array, "B N t s"]
) -> Float[Array, "B N t s"]:
    """Linear interpolation of z at the positions min(count, P - 1)."""
    return _interpolation_parts(z, count)[0]


def _interpolation_parts(z: Array, count: Array) -> tuple[Array, Array, Array, Array]:
    """The value, its slope, and the lower neighbour and the fraction it was found with."""
    last = z.shape[-1] - 1
    position = jnp.where(count >= last, float(last), count)  # NaN stays
    lower = jnp.clip(jnp.floor(jax.lax.stop_gradient(position)).astype(jnp.int32), 0, last - 1)
    fraction = position - wide(lower)
    at_lower = jnp.take_along_axis(z, lower, axis=-1, mode="promise_in_bounds")
    slope = jnp.take_along_axis(z, lower + 1, axis=-1, mode="promise_in_bounds") - at_lower
    return at_lower + fraction * slope, slope, lower, fraction


@jax.custom_vjp
def _interpolate_falling(
    z: Float[Array, "B N t P"], count: Float[Array, "B N t s"]
) -> Float[Array, "B N t s"]:
    """`_interpolate` for counts that never rise rightwards; its gradient needs no scatter."""
    return _interpolate(z, count)


def _interpolate_falling_fwd(z, count):
    value, slope, lower, fraction = _interpolation_parts(z, count)
    return value, (jnp.where(count < z.shape[-1] - 1, slope, 0.0), lower, fraction, z)


def _interpolate_falling_bwd(residuals, cotangent):
    """Differences of prefix sums, because keys with the same lower neighbour stand together."""
    slope, lower, fraction, z = residuals
    batch, heads, rows, last = *z.shape[:3], z.shape[3] - 1
    # edges[b]: how many keys, all on the left, have a lower neighbour of b or more.
    row = jnp.arange(batch * heads * rows, dtype=jnp.int32)[:, None]
    flat = (row * (last + 1) + lower.reshape(row.shape[0], -1)).reshape(-1)
    counted = jnp.zeros(row.shape[0] * (last + 1), jnp.int32)
    counted = (
        counted.at[flat].add(1, mode="promise_in_bounds").reshape(batch, heads, rows, last + 1)
    )
    edges = jax.lax.cumsum(counted, axis=3, reverse=True)

    def sums(x: Array) -> Array:
        prefix, before = jax.lax.cumsum(x, axis=3), jnp.maximum(edges - 1, 0)
        found = jnp.take_along_axis(prefix, before, axis=3, mode="promise_in_bounds")
        at_edges = jnp.where(edges > 0, found, 0.0)
        return at_edges[..., :-1] - at_edges[..., 1:]

    cotangent = jax.lax.optimization_barrier(cotangent)  # or every use computes it again
    to_upper = sums(cotangent * fraction)
    to_lower = sums(cotangent) - to_upper
    none = jnp.zeros_like(to_upper[..., :1])
    dz = jnp.concatenate([to_lower, none], axis=3) + jnp.concatenate([none, to_upper], axis=3)
    return dz, cotangent * slope


_interpolate_falling.defvjp(_interpolate_falling_fwd, _interpolate_falling_bwd)
