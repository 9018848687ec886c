"""Each query's table in shared memory.

z_b is the product of the query with row b of the table. A place is a count less 1/2; its nearest
whole number b is the row below the count, and the bias a straight line over the bin:

| form   | an entry                           | bias                     | words |
|--------|------------------------------------|--------------------------|-------|
| exact  | offset, slope: float32             | offset + place slope     | 2     |
| packed | middle with slope in its low half  | middle + fraction slope  | 1     |

XLA makes them; the kernels copy those of their queries.
"""

import jax
import jax.numpy as jnp

from posjax.kernels.bits import as_float, packed_words
from posjax.kernels.common import LN2
from posjax.types import Array, Float

__all__ = ["slot_words", "table_gradients", "table_words", "tables"]

# Words between rows beyond whole rounds of the 32 banks: rows in step lie in different banks.
_STAGGER = 4
# The most words of a row in one transfer.
_MOST_WORDS = 256


def table_words(positions: int, packed: bool) -> int:
    """Words of a row."""
    needed = positions * (1 if packed else 2)
    return min(-(-needed // 32) * 32 + _STAGGER, _MOST_WORDS)


def tables(z: Float[Array, "*rows P"], packed: bool) -> Float[Array, "*rows words"]:
    """The table of every query, of z with z_{P-1} = 0."""
    positions = z.shape[-1]
    slope = jnp.diff(z, axis=-1, append=z[..., -1:])
    if packed:
        entries = as_float(packed_words(z + 0.5 * slope, slope))
    else:
        # A place p - 1/2 in bin b: z_b + (p - b) slope.
        bins = jax.lax.broadcasted_iota(z.dtype, z.shape, z.ndim - 1)
        offset = z + (0.5 - bins) * slope
        entries = jnp.stack([offset, slope], axis=-1).reshape(*z.shape[:-1], 2 * positions)
    width = [(0, 0)] * (z.ndim - 1)
    return jnp.pad(entries, (*width, (0, table_words(positions, packed) - entries.shape[-1])))


def slot_words(positions: int) -> int:
    """Words of a query's slots, two for each bin."""
    return table_words(positions, packed=False)


def table_gradients(
    slots: Float[Array, "*rows words"],
    total: Float[Array, "*rows"],
    moment: Float[Array, "*rows"],
    positions: int,
) -> Float[Array, "*rows P"]:
    """The gradient of z, in units of ln 2, from running sums over the keys from left to right.

    A bin's sums are those at its right end less those at the right end of the bin above it. A bin
    without a key has no slot written (NaN), and its right end is that of the bin above. The last
    bin comes first and counts for nothing; the first one ends with the last key. The last row's
    gradient has no effect, because that row is subtracted from all.

    Args:
        slots: for each bin, sums of dlogit and of dlogit f, up to its right end; f is a place less
            that of the middle of its bin, so that z_b weighs 1/2 - f and z_{b+1} 1/2 + f.
        total: the first sum over all keys.
        moment: the second.
    """
    sums = slots[..., : 2 * positions].reshape(*slots.shape[:-1], positions, 2)
    ends = jnp.stack([total, moment], axis=-1)[..., None, :]
    top = sums[..., -1:, :]
    top = jnp.where(jnp.isnan(top), 0.0, top)
    sums = jnp.concatenate([ends, sums[..., 1:-1, :], top], axis=-2) if positions > 1 else top
    later = lambda above, own: jnp.where(jnp.isnan(own), above, own)  # noqa: E731
    sums = jax.lax.associative_scan(later, sums, reverse=True, axis=sums.ndim - 2)
    parts = sums[..., :-1, :] - sums[..., 1:, :]
    below, above = (0.5 * parts[..., 0] + sign * parts[..., 1] for sign in (-1, 1))
    nothing = [(0, 0)] * total.ndim
    return (jnp.pad(below, (*nothing, (0, 1))) + jnp.pad(above, (*nothing, (1, 0)))) * LN2
