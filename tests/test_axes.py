"""Axis letters as data: every map over a description follows from its annotations."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax import (
    ArrayBias,
    BiasSum,
    ClippedTableBias,
    ContextualBias,
    ForgettingBias,
    MultiplierBias,
    ProductBias,
    RelativeBias,
    ScaledBias,
    SinusoidBias,
)
from tests.cases import linear

B, T, S, N, K, H, P = 2, 4, 6, 4, 2, 3, 5


def draw(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


CONTEXTUAL = ContextualBias(draw(N, P, H), draw(B, S, K, H), draw(N))
# Description -> letters of its arrays, in the order of the fields.
DESCRIPTIONS = {
    "array": (ArrayBias(draw(1, N, T, S)), ["1NTS"]),
    "contextual": (CONTEXTUAL, ["NPH", "BSMH", "N"]),
    "shared table": (ContextualBias(draw(P, H), None, jnp.float32(1)), ["PH", ""]),
    "forgetting": (ForgettingBias(draw(B, S, N)), ["BSN"]),
    "relative": (
        RelativeBias(linear, draw(N), jnp.arange(T)[None], jnp.arange(S)[None]),
        ["", "1T", "1S"],
    ),
    "clipped": (ClippedTableBias(draw(5, H), draw(N, 5, H), clip=(2, 2)), ["PH", "NPH"]),
    "multiplier": (MultiplierBias(draw(N, 5), clip=(2, 2)), ["NP"]),
    "by channel": (MultiplierBias(draw(5, H), draw(B, S, K, H), by_channel=True), ["PH", "BSKH"]),
    "product": (ProductBias(draw(B, T, N, H), draw(B, S, 1, H), draw(N)), ["BTFE", "BSME", "N"]),
    "sinusoid": (SinusoidBias(draw(6, N, H), draw(N, H), draw(B, S, N)), ["DNH", "NH", "BSN"]),
    "sum": (BiasSum((CONTEXTUAL, ForgettingBias(draw(B, S, N)))), ["NPH", "BSMH", "N", "BSN"]),
    "scaled": (ScaledBias(ArrayBias(draw(1, 1, T, S)), 2.0), ["11TS"]),
}
every = pytest.mark.parametrize("name", DESCRIPTIONS)


@every
def test_letters_are_those_of_the_annotations(name):
    bias, want = DESCRIPTIONS[name]
    found = []
    same = bias.map_arrays(lambda letters, x: found.append(letters) or x)
    assert found == want
    assert jax.tree.structure(same) == jax.tree.structure(bias)


@every
def test_blocks_of_a_padded_description_add_up_to_it(name):
    """Padding, cutting into blocks and adding the blocks to zeros gives the padded description."""
    bias, _ = DESCRIPTIONS[name]
    floating = jax.tree.map(lambda x: x.astype(jnp.float32), bias)
    padded = floating.pad(2, 2)
    total = jax.tree.map(jnp.zeros_like, padded)
    blocks = [(t, s) for t in (0, 3) for s in (0, 4)]
    for t, s in blocks:
        total = total.add_block(padded.block(t, 3, s, 4), t, s)

    def times(letters, x):
        """An array without one of the axes is in as many blocks as the axis has."""
        return x * (1 if "T" in letters else 2) * (1 if "S" in letters else 2)

    chex.assert_trees_all_close(total, padded.map_arrays(times), rtol=1e-6)
    for old, new, want in zip(
        jax.tree.leaves(floating), jax.tree.leaves(padded), DESCRIPTIONS[name][1], strict=True
    ):
        longer = [
            size + 2 * (letter in "TS") for letter, size in zip(want, old.shape, strict=False)
        ]
        assert new.shape == tuple(longer) or not want
        np.testing.assert_array_equal(new[tuple(map(slice, old.shape))], old)


def test_heads_can_be_split_where_all_axes_of_heads_can():
    assert ForgettingBias(draw(B, S, N)).can_split_heads(2)
    assert CONTEXTUAL.can_split_heads(2)
    assert not CONTEXTUAL.can_split_heads(4)  # two gate keys
    one = dataclasses.replace(CONTEXTUAL, gate_key=draw(B, S, 1, H))
    assert one.can_split_heads(4)  # one gate key goes to all devices
    assert not BiasSum((one, CONTEXTUAL)).can_split_heads(4)


def test_own_heads_reach_the_parts_of_a_description():
    """The function of a relative bias gives all heads, of which a device takes its own."""
    relative = RelativeBias(linear, draw(N))
    for bias in (relative, BiasSum((relative, CONTEXTUAL)), ScaledBias(relative, 2.0)):
        own = bias.own_heads(jnp.int32(1), 2)
        part = own if bias is relative else own.bias if hasattr(own, "bias") else own.parts[0]
        i, j = jnp.array([[3]]), jnp.array([[1]])
        found = part.function(part.params, i, j)
        np.testing.assert_array_equal(found, linear(relative.params, i, j)[:, 2:])
