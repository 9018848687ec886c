"""Arrays as kernels want them: whole blocks, and one number of heads for all that has keys."""

import jax.numpy as jnp

from posjax.masks import Mask, Tokens
from posjax.types import Array

__all__ = ["padded", "same_heads"]

# Positions and segments of padding: no query stands so far, and no real token has these ids.
_FAR = 2**30
_NO_QUERY, _NO_KEY = -(2**31), -(2**31) + 1


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
        side(mask.query, queries, None, _NO_QUERY),
        side(mask.key, keys, _FAR if mask.is_causal else None, _NO_KEY),
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
