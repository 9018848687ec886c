"""Masks against literal matrices."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posjax.masks import Mask, Tokens


def mask(queries: int, keys: int, **settings) -> Mask:
    return Mask(Tokens(jnp.arange(queries)[None]), Tokens(jnp.arange(keys)[None]), **settings)


def test_causal():
    assert mask(3, 3, is_causal=True).dense()[0, 0].astype(int).tolist() == [
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
    ]


def test_window():
    got = mask(4, 4, window=(1, 0)).dense()[0, 0].astype(int).tolist()
    assert got == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_segments_and_positions():
    ids = jnp.array([[0, 0, 1]])
    side = Tokens(jnp.arange(3)[None], ids)
    assert Mask(side, side).dense()[0, 0].astype(int).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    late = Mask(Tokens(jnp.array([[1]])), Tokens(jnp.arange(3)[None]), is_causal=True)
    assert late.dense()[0, 0].astype(int).tolist() == [[1, 1, 0]]


def test_padding_is_never_allowed():
    got = mask(2, 2).pad(1, 2).dense()[0, 0].astype(int).tolist()
    assert got == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]


def test_trivial_only_without_restriction():
    assert mask(2, 3).is_trivial
    assert not mask(2, 3, is_causal=True).is_trivial
    assert not mask(2, 3, array=jnp.ones((1, 1, 2, 3), bool)).is_trivial
    assert not mask(2, 3).pad(0, 1).is_trivial


@pytest.mark.parametrize("shape", [(1, 1, 1, 6), (1, 1, 4, 1), (1, 1, 1, 1), (1, 1, 4, 6)])
def test_blocks_of_a_mask_that_broadcasts(shape):
    array = jnp.arange(np.prod(shape)).reshape(shape) % 3 != 1
    whole = mask(4, 6, array=array)
    padded = whole.pad(2, 3)
    np.testing.assert_array_equal(
        padded.dense()[:, :, :4, :6], jnp.broadcast_to(whole.dense(), (1, 1, 4, 6))
    )
    assert not jnp.any(padded.dense()[:, :, 4:]) and not jnp.any(padded.dense()[..., 6:])
    block = padded.block(2, 4, 3, 6).dense()
    np.testing.assert_array_equal(block, padded.dense()[:, :, 2:, 3:])


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.booleans(),
    st.integers(0, 8),
)
def test_a_block_equals_its_part_of_the_dense_mask_and_ranges_leave_nothing_out(
    blocks_q, blocks_k, causal, window, segments, offset
):
    block_q, block_k = 2, 3
    queries, keys = blocks_q * block_q, blocks_k * block_k
    query_ids, key_ids = (jnp.arange(n)[None] // 4 if segments else None for n in (queries, keys))
    query = Tokens(jnp.arange(queries)[None] + offset, query_ids)
    whole = Mask(query, Tokens(jnp.arange(keys)[None], key_ids), is_causal=causal, window=window)
    dense = np.asarray(whole.dense()[0, 0])
    first, last = (np.asarray(x) for x in whole.block_range(block_q, block_k))
    for i in range(blocks_q):
        for j in range(blocks_k):
            part = dense[i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
            got = whole.block(
                jnp.int32(i * block_q), block_q, jnp.int32(j * block_k), block_k
            ).dense()
            np.testing.assert_array_equal(got[0, 0], part)
            assert first[i] <= j <= last[i] or not part.any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (5, 3), (30, 30)])
@pytest.mark.parametrize("packed", [False, True])
def test_full_blocks_are_full_and_seen_blocks_hold_all_that_is_seen(causal, window, packed):
    places, ids = jnp.arange(24)[None], jnp.arange(24)[None] // 12 if packed else None
    mask = Mask(Tokens(places, ids), Tokens(places, ids), is_causal=causal, window=window)
    blocks = np.asarray(mask.dense())[:, 0].reshape(-1, 6, 4, 4, 6).swapaxes(2, 3)
    seen, full = (np.asarray(x) for x in mask.blocks_seen(4, 6))
    np.testing.assert_array_equal(seen, blocks.any(axis=(3, 4)))
    np.testing.assert_array_equal(full, blocks.all(axis=(3, 4)))
