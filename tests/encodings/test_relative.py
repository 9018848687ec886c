"""Learned relative positions against a transcription of CoPE's official code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import posjax
from posjax.encodings import CoPE, Relative, create
from posjax.encodings.base import Side, Sizes
from posjax.models import Transformer, TransformerConfig
from posjax.positions import LengthError

HEADS, SIZE = 2, 4
RANDOM = np.random.default_rng(0)


def official(query, table, keys):
    """Logits of positions [.., T, keys] for rows [H, P], the own token last, unscaled.

    Rows beyond the table are its first one, as with --rel-pos-extend.
    """
    length, rows = query.shape[-2], table.shape[1]
    logits = query @ table
    if rows < keys:
        logits = np.concatenate([logits[..., :1]] * (keys - rows) + [logits], axis=-1)
    found = np.zeros((*query.shape[:-1], keys))
    for i in range(length):
        own = keys - length + i  # place of the query among the keys
        row = logits[..., i, :][..., ::-1][..., : own + 1]  # by distance
        found[..., i, : own + 1] = row[..., ::-1]
    return found


def attended(encoding, x, table, positions=None):
    query, key, value = x
    length = query.shape[1]
    places = jnp.arange(length)[None] if positions is None else positions
    bias = encoding.apply(
        {}, Side(query, places), Side(key, places), jnp.asarray(table), method="bias"
    )
    return posjax.dot_product_attention(query, key, value, bias, is_causal=True)


def inputs(length=6):
    return [RANDOM.normal(size=(1, length, HEADS, SIZE)).astype(np.float32) for _ in range(3)]


@pytest.mark.parametrize("rows", [6, 9, 3])
def test_logits_are_the_official_ones(rows):
    x, table = inputs(), RANDOM.normal(size=(rows, SIZE)).astype(np.float32)
    got = attended(Relative(rows, strict=rows >= 6), x, table)
    query, key, value = (a[0].swapaxes(0, 1) for a in x)
    logits = query @ key.swapaxes(1, 2) + official(query, table[::-1].T, 6)
    logits = np.where(np.tri(6, dtype=bool), logits, -np.inf) / np.sqrt(SIZE)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    want = weights / weights.sum(-1, keepdims=True) @ value
    np.testing.assert_allclose(got[0], want.swapaxes(0, 1), atol=1e-5)


def test_one_table_serves_all_layers_and_starts_as_the_official_one():
    model = Transformer(TransformerConfig(layers=3, width=64, heads=4), 5, Relative(4096))
    params = model.init(jax.random.key(0), jnp.ones((1, 3), jnp.int32))["params"]
    found = [k for k, _ in jax.tree.flatten_with_path(params)[0] if "table" in str(k)]
    assert len(found) == 1
    table = params["encoding"]["table"]
    assert table.shape == (4096, 16)
    assert float(table.std()) == pytest.approx(16**-0.5, rel=0.02)


def test_a_longer_sequence_is_refused_and_a_greater_distance_is_nan():
    x, table = inputs(), np.ones((4, SIZE), np.float32)
    with pytest.raises(LengthError, match="Relative has max_length=4, but the sequence has 6"):
        attended(Relative(4), x, table)
    x, far = inputs(3), jnp.array([[0, 1, 9]])
    out = jax.jit(lambda p: attended(Relative(4), x, table, p))(far)
    assert bool(jnp.isnan(out[0, 2]).all()) and not bool(jnp.isnan(out[0, :2]).any())
    assert not bool(jnp.isnan(attended(Relative(4, strict=False), x, table, far)).any())


def test_cope_beside_it():
    encoding = create("cope+relative")
    assert [type(part) for part in encoding.encodings] == [CoPE, Relative]
    shared = encoding.init(jax.random.key(0), Sizes(HEADS, HEADS, SIZE), method="shared")
    assert jax.tree.map(jnp.shape, jax.tree.leaves(shared)) == [(1024, SIZE)]
    assert create("relative.capped").beyond == "clips"
    assert create("relative").beyond == "raises"
