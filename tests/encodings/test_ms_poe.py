import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import MsPoE, RoPE
from posjax.encodings.base import Side
from posjax.encodings.ms_poe import ms_poe_ratios, position_awareness
from posjax.encodings.rope import rotate

X = jax.random.normal(jax.random.key(0), (2, 5, 4, 8))
PLACES = jnp.array([[0, 1, 2, 3, 4], [7, 100, 3, 3, 2000]])


def turned(encoding, query=X, key=X):
    return encoding.apply({}, Side(query, PLACES), Side(key, PLACES), method="rotate")


def official(x, places, head_order, low, high, base=10_000.0):
    """Heads first; tables of cosines and sines for ranks, which the order then picks."""
    heads, size = x.shape[2], x.shape[3]
    ratio = low + (high - low) * (np.arange(heads) / heads)
    steps = np.arange(places.max() + 1)[None, :] / ratio[:, None]
    angles = steps[:, :, None] * (1.0 / base ** (np.arange(0, size, 2) / size))[None, None, :]
    angles = np.concatenate((angles, angles), axis=-1)[np.asarray(head_order)]
    angles = np.moveaxis(angles[:, places], 0, 2)
    half = np.concatenate((-x[..., size // 2 :], x[..., : size // 2]), axis=-1)
    return x * np.cos(angles) + half * np.sin(angles)


@pytest.mark.parametrize("order", [None, (2, 0, 3, 1)])
def test_equals_a_transcription_of_the_official_code(order):
    head_order = 4 - np.arange(4) - 1 if order is None else order
    want = official(np.asarray(X), np.asarray(PLACES), head_order, 1.3, 2.2)
    for found in turned(MsPoE(1.3, 2.2, order=order)):
        np.testing.assert_allclose(found, want, atol=2e-3)
        np.testing.assert_allclose(found[0], want[0], atol=1e-5)


def test_each_head_is_rope_at_its_own_ratio():
    query, _ = turned(MsPoE(order=(1, 3, 0, 2)))
    for head, ratio in enumerate((1.35, 1.65, 1.2, 1.5)):
        want = rotate(X[:, :, head : head + 1], PLACES.astype(jnp.float32) / ratio)
        np.testing.assert_allclose(query[:, :, head : head + 1], want, atol=2e-3)


def test_ratios_never_reach_the_greatest():
    np.testing.assert_allclose(ms_poe_ratios((3, 2, 1, 0)), [1.65, 1.5, 1.35, 1.2])


def test_ratios_of_one_are_rope():
    for ours, rope in zip(turned(MsPoE(1.0, 1.0)), turned(RoPE()), strict=True):
        np.testing.assert_array_equal(ours, rope)


def test_a_group_shares_the_ratio_of_its_first_head():
    """So that the scores of grouped heads depend on the distance only, too."""
    encoding = MsPoE(order=(1, 3, 0, 2))
    query, key = turned(encoding, X, X[:, :, ::2])
    alone, _ = turned(MsPoE(order=(1, 3, 0, 2)), X[:, :, ::2].repeat(2, axis=2), X)
    np.testing.assert_array_equal(key, alone[:, :, ::2])
    both, _ = turned(encoding, X[:, :, :1].repeat(4, axis=2), X[:, :, ::2])
    np.testing.assert_array_equal(both[:, :, ::2], both[:, :, 1::2])
    assert not np.allclose(both[:, :, 0], both[:, :, 2])
    assert query.shape == X.shape


def test_first_layers_are_plain_rope():
    encoding = MsPoE.paper()
    assert encoding.skip_layers == 2
    for index in range(4):
        own = encoding.layer(index, 4)
        assert (own == encoding) == (index >= 2)
        wanted = encoding if index >= 2 else RoPE()
        for ours, theirs in zip(turned(own), turned(wanted), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert MsPoE().layer(0, 2) == MsPoE()


def test_position_awareness_counts_outliers_of_the_last_query():
    """Shares of keys above 3 times the mean: 1/8, 0, 2/8, 1/8."""
    level = np.full(8, 1 / 8)
    one, two = np.full(8, 0.02), np.full(8, 0.01)
    one[3], two[[1, 5]] = 0.86, 0.47
    last = np.stack((one, level, two, one[::-1]))
    weights = jnp.asarray(np.stack((last[::-1], last), axis=1), jnp.float32)
    ranks = position_awareness(weights)
    assert ranks.tolist() == [1, 3, 0, 2]
    # The official code takes this list for the ranks: heads, sorted.
    outliers = -(last > 3 * last.mean(-1, keepdims=True)).mean(-1)
    np.testing.assert_array_equal(jnp.argsort(ranks), np.argsort(outliers, kind="stable"))
    assert position_awareness(weights, threshold=4.0).tolist() == [0, 2, 3, 1]
    assert MsPoE(order=tuple(ranks.tolist())).order == (1, 3, 0, 2)


def test_what_does_not_fit_the_heads():
    with pytest.raises(ValueError, match="MsPoE order is for 2 heads, but query has 4"):
        turned(MsPoE(order=(0, 1)))
    with pytest.raises(ValueError, match="head size of MsPoE is 7; it must be even"):
        turned(MsPoE(), X[..., :7], X[..., :7])
