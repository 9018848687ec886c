"""Padding to whole blocks, for kernels that tell it by positions and segments alone."""

import jax.numpy as jnp

from posjax.masks import Mask, Side

__all__ = ["padded"]

# Positions and segments of padding: no query stands so far, and no real token has these ids.
_FAR = 2**30
_NO_QUERY, _NO_KEY = -(2**31), -(2**31) + 1


def padded(mask: Mask, queries: int, keys: int) -> Mask:
    """The mask with padding that nothing sees: by its position or by its segment.

    Queries of padding may see real keys; what comes of them is cut off.
    """

    def side(real: Side, amount: int, position: int | None, segment: int) -> Side:
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
        return Side(positions, ids)

    return Mask(
        side(mask.query, queries, None, _NO_QUERY),
        side(mask.key, keys, _FAR if mask.is_causal else None, _NO_KEY),
        is_causal=mask.is_causal,
        window=mask.window,
    )
