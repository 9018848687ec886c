import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from posjax.encodings import Abacus, BiPE, Combine, RoPE
from posjax.encodings.base import Side
from posjax.encodings.rope import rotate

DATA = np.load(pathlib.Path(__file__).parent.parent / "data" / "bipe.npz")
TOKENS = jnp.asarray(DATA["tokens"], jnp.int32)
PLACES = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
LLAMA = BiPE(separators=(869, 13), num_places=12)
X = jax.random.normal(jax.random.key(0), (*TOKENS.shape, 6, 4))


def indices_of(encoding, tokens=TOKENS, places=PLACES):
    return encoding.apply({}, tokens, places, method="positions")[0]


def test_segments_equal_the_official_code():
    indices = indices_of(LLAMA)
    np.testing.assert_array_equal(jnp.minimum(indices.within, 11), DATA["within"])
    np.testing.assert_array_equal(indices.segment, DATA["segment"])
    assert DATA["segment"].max() > 4
    assert (DATA["within"] == 11).any()


def test_the_table_is_looked_up_by_place_and_the_last_row_serves_all_further_ones():
    table = jax.random.normal(jax.random.key(1), (12, 5))
    x = jnp.ones((*TOKENS.shape, 5))
    embedded = LLAMA.apply({"params": {"table": table}}, x, indices_of(LLAMA), method="embed")
    np.testing.assert_array_equal(embedded, 1 + np.asarray(table)[DATA["within"]])
    narrow = LLAMA.apply(
        {"params": {"table": table}}, x.astype(jnp.bfloat16), indices_of(LLAMA), method="embed"
    )
    np.testing.assert_array_equal(narrow, embedded.astype(jnp.bfloat16))


def test_all_tokens_of_a_segment_are_turned_alike():
    indices = indices_of(LLAMA)
    query, key = LLAMA.apply({}, Side(X, indices), Side(X, indices), method="rotate")
    np.testing.assert_array_equal(query, rotate(X, jnp.asarray(DATA["segment"])))
    np.testing.assert_array_equal(key, query)


def test_alibi_between_segments_equals_the_official_code():
    """Theirs adds slope * segment of the key, which differs by a constant in each row."""
    encoding = BiPE.alibi().clone(separators=(869, 13))
    indices = indices_of(encoding)
    bias = encoding.apply({}, Side(X, indices), Side(X, indices), method="bias")
    got = bias.dense(X, X, scale=1, allowed=None, query_positions=None, key_positions=None)
    slopes = DATA["alibi"][0, :, 0, 1]  # what key segment 1 gets
    segment = DATA["segment"].astype(np.float32)
    want = slopes[None, :, None, None] * segment[:, None, None, :]
    i, j = np.tril_indices(TOKENS.shape[1])
    shifted = want - slopes[None, :, None, None] * segment[:, None, :, None]
    np.testing.assert_allclose(got[:, :, i, j], shifted[:, :, i, j], rtol=1e-5)


def test_default_separators_are_bytes():
    tokens = jnp.array([list(b"a.b\n.c")])
    indices = indices_of(BiPE(), tokens, jnp.arange(6)[None])
    assert indices.segment.tolist() == [[0, 0, 1, 1, 2, 3]]
    assert indices.within.tolist() == [[0, 1, 0, 1, 0, 0]]


def test_the_inner_encoding_keeps_its_places_and_its_carry():
    inner = Combine((Abacus(digits=(5,)), RoPE()))
    encoding = BiPE(inner, separators=(869, 13))
    (_, (digits, segment)), carry = encoding.apply({}, TOKENS, PLACES, method="positions")
    np.testing.assert_array_equal(segment, DATA["segment"])
    parts, before = [], None
    for part in (slice(0, 17), slice(17, 40)):
        indices, before = encoding.apply(
            {}, TOKENS[:, part], PLACES[:, part], before, method="positions"
        )
        parts.append(indices)
    whole = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)
    np.testing.assert_array_equal(whole.segment[0], digits)
    np.testing.assert_array_equal(whole.segment[1], segment)
    jax.tree.map(np.testing.assert_array_equal, before, carry)


def test_the_start():
    x = jnp.zeros((*TOKENS.shape, 300))
    variables = BiPE(initial_deviation=0.3).init(
        jax.random.key(0), x, indices_of(BiPE()), method="embed"
    )
    assert jax.tree.map(jnp.shape, variables) == {"params": {"table": (1024, 300)}}
    np.testing.assert_allclose(jnp.std(variables["params"]["table"]), 0.3, rtol=0.05)
