import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posjax import dot_product_attention
from posjax.encodings import ALiBi
from posjax.encodings.alibi import alibi_slopes
from posjax.encodings.base import Side


def bias_of(heads, query_positions, key_positions, encoding=None):
    query = Side(jnp.zeros((1, query_positions.shape[1], heads, 4)), query_positions)
    key = Side(jnp.zeros((1, key_positions.shape[1], 1, 4)), key_positions)
    bias = (encoding or ALiBi()).apply({}, query, key, method="bias")
    settings = {"query_positions": None, "key_positions": None}
    return bias.dense(query.x, key.x, scale=1.0, allowed=None, **settings)


def test_slopes_by_hand():
    eight = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert list(alibi_slopes(8)) == eight
    assert list(alibi_slopes(1)) == [1 / 256]
    assert list(alibi_slopes(2)) == [1 / 16, 1 / 256]
    np.testing.assert_allclose(alibi_slopes(12), [*eight, *(2.0 ** -np.arange(0.5, 4))])
    np.testing.assert_allclose(alibi_slopes(3), [1 / 16, 1 / 256, 1 / 4])


@given(st.integers(1, 200))
def test_every_head_has_its_own_slope(heads):
    slopes = alibi_slopes(heads)
    assert len(set(slopes)) == heads
    assert all(0 < slope < 1 for slope in slopes)


def test_three_tokens_by_hand():
    places = jnp.array([[0, 1, 2]])
    bias = bias_of(2, places, places)
    distance = np.array([[0, 1, 2], [1, 0, 1], [2, 1, 0]])
    np.testing.assert_array_equal(
        bias, -distance[None, None] * np.array([1 / 16, 1 / 256])[None, :, None, None]
    )


@given(shift=st.integers(-(2**20), 2**20))
def test_depends_on_the_distance_only(shift):
    places = jnp.array([[0, 3, 40, 1000]])
    np.testing.assert_array_equal(
        bias_of(3, places, places), bias_of(3, places + shift, places + shift)
    )


def test_large_distances_are_exact():
    far = jnp.array([[0]]), jnp.array([[2**24 - 1, 2**24 - 2]])
    assert bias_of(1, *far)[0, 0, 0].tolist() == [-(2**24 - 1) / 256, -(2**24 - 2) / 256]


def test_has_no_parameters_and_equal_ones_compile_once():
    side = Side(jnp.ones((1, 3, 2, 4)), jnp.arange(3)[None])
    assert ALiBi().init(jax.random.key(0), side, side, method="bias") == {}
    one, other = (ALiBi().apply({}, side, side, method="bias") for _ in range(2))
    assert one.function == other.function
    assert hash(one.function) == hash(other.function)
    assert not [x for x in jax.tree.leaves(one) if jnp.issubdtype(x.dtype, jnp.floating)]


def test_the_official_form_gives_the_same_attention():
    """slope * j instead of -slope * (i - j) shifts each row, which softmax does not notice."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 4, 8))
    places = jnp.arange(6)[None]
    bias = ALiBi().apply({}, Side(q, places), Side(k, places), method="bias")
    slopes = jnp.array(alibi_slopes(4))[None, :, None, None]
    official = jnp.broadcast_to(slopes * jnp.arange(6.0)[None, None, None, :], (1, 4, 6, 6))
    outputs = [dot_product_attention(q, k, v, b, is_causal=True) for b in (bias, official)]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 20])
def test_equals_hugging_face_bloom(heads):
    reason = "compares with Hugging Face's code"
    torch = pytest.importorskip("torch", reason=reason)
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom", reason=reason)
    length = 7
    want = bloom.build_alibi_tensor(torch.ones(1, length), heads, torch.float32).numpy()
    last = bias_of(heads, jnp.array([[length - 1]]), jnp.arange(length)[None])[0, :, 0]
    np.testing.assert_allclose(last - last[:, :1], want[:, 0], rtol=1e-5, atol=1e-7)


def official_asymmetric(heads, queries, keys):
    """The sums of triangles of randomized_positional_encodings/models/positional_encodings.py."""
    steps = np.zeros((queries, keys))
    for i in range(queries):
        for j in range(keys):
            steps[i, j] -= sum(j <= i - n for n in range(1, queries))
            steps[i, j] -= sum(i <= j - n for n in range(1, keys))
            steps[i, j] += 0.5 * (j <= i - 1)
    return steps * np.array(alibi_slopes(heads))[:, None, None]


@pytest.mark.parametrize("heads", [2, 5])
def test_the_asymmetric_form_is_that_of_ruoss_et_al(heads):
    places = jnp.arange(6)[None]
    bias = bias_of(heads, places, places, ALiBi.asymmetric())
    np.testing.assert_allclose(bias[0], official_asymmetric(heads, 6, 6), rtol=1e-6)
    right = np.triu(bias[0]).astype(np.float32)
    np.testing.assert_array_equal(right, np.triu(bias_of(heads, places, places)[0]))


def test_fractional_positions():
    places = jnp.array([[0.0, 0.25, 2.5]])
    np.testing.assert_allclose(
        bias_of(1, places, places)[0, 0] * -256, [[0, 0.25, 2.5], [0.25, 0, 2.25], [2.5, 2.25, 0]]
    )
