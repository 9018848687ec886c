import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posjax.encodings import T5
from posjax.encodings.base import Side, Sizes
from posjax.encodings.distance import OfDistance
from posjax.encodings.t5 import BucketTable, t5_buckets

PLACES = jnp.array([[0, 1, 5, 30, 200]])


def bias_of(encoding, variables, heads, query_positions, key_positions):
    query = Side(jnp.zeros((1, query_positions.shape[1], heads, 4)), query_positions)
    key = Side(jnp.zeros((1, key_positions.shape[1], 1, 4)), key_positions)
    shared = encoding.apply(variables, Sizes(heads, 1, 4), method="shared")
    bias = encoding.apply(variables, query, key, shared, method="bias")
    settings = {"query_positions": None, "key_positions": None}
    return bias.dense(query.x, key.x, scale=1.0, allowed=None, **settings)


@pytest.mark.parametrize(
    ("distances", "bucket"),
    [
        *(([a], a) for a in (0, 1, 14, 15)),
        ([16, 17, 18], 16),
        ([19, 20], 17),
        ([21], 18),
        ([24], 19),
        ([32], 21),
        ([64], 26),
        ([112], 30),
        ([113, 128, 129, 10_000], 31),
        ([-1, -500], 0),
    ],
)
def test_causal_buckets_by_hand(distances, bucket):
    assert set(t5_buckets(-jnp.array(distances)).tolist()) == {bucket}


@pytest.mark.parametrize(
    ("distance", "bucket"),
    [(0, 0), (7, 7), (8, 8), (16, 10), (32, 12), (64, 14), (90, 14), (91, 15), (500, 15)],
)
def test_bidirectional_buckets_by_hand(distance, bucket):
    buckets = t5_buckets(jnp.array([-distance, distance]), bidirectional=True)
    assert buckets.tolist() == [bucket, bucket + 16 if distance else 0]


@given(
    num_buckets=st.integers(2, 40).map(lambda n: 2 * n),
    extra=st.integers(1, 300),
    bidirectional=st.booleans(),
)
def test_buckets_grow_with_the_distance_up_to_the_last(num_buckets, extra, bidirectional):
    side = num_buckets // 2 if bidirectional else num_buckets
    max_distance = side // 2 + extra
    settings = {"num_buckets": num_buckets, "bidirectional": bidirectional}
    distances = jnp.arange(400)
    buckets = np.asarray(t5_buckets(-distances, max_distance=max_distance, **settings))
    assert (np.diff(buckets) >= 0).all()
    assert (buckets[: side // 2] == distances[: side // 2]).all()
    assert (buckets[max_distance:] == side - 1).all()


def test_fractions_are_rounded():
    """Positions that a wrapper divided by 4, say."""
    relative = jnp.array([-200.3, -8.6, -8.4, -0.4, 0.2, 1e9])
    assert t5_buckets(relative, bidirectional=True).tolist() == [15, 8, 8, 0, 0, 31]
    table = jnp.arange(64.0).reshape(32, 2)
    quarter = PLACES / 4
    bias = OfDistance(BucketTable())(table, quarter, quarter)
    distance = np.round(np.asarray(quarter)[0, -1] - np.asarray(quarter)[0])
    want = table[t5_buckets(-jnp.asarray(distance, jnp.int32))]
    np.testing.assert_array_equal(bias[0, :, -1], want.T)


def test_variants():
    assert T5.per_layer() == T5(share_layers=False)
    assert T5.encoder() == T5(bidirectional=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (8, 20), (16, 64), (64, 1000), (128, 512)]
)
def test_buckets_equal_hugging_face(num_buckets, max_distance, bidirectional):
    """At every distance, those on the edges of buckets included."""
    reason = "compares with Hugging Face's code"
    torch = pytest.importorskip("torch", reason=reason)
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason=reason)
    settings = {
        "num_buckets": num_buckets,
        "max_distance": max_distance,
        "bidirectional": bidirectional,
    }
    relative = np.arange(-2 * max_distance, 2 * max_distance + 1)
    want = t5.T5Attention._relative_position_bucket(torch.tensor(relative), **settings)
    np.testing.assert_array_equal(t5_buckets(jnp.asarray(relative), **settings), want.numpy())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_bias_is_the_table_at_the_buckets(bidirectional):
    encoding = T5(bidirectional=bidirectional)
    table = jax.random.normal(jax.random.key(0), (32, 3))
    bias = bias_of(encoding, {"params": {"table": table}}, 3, PLACES, PLACES[:, ::-1])
    relative = PLACES[:, ::-1][:, None, :] - PLACES[:, :, None]
    buckets = t5_buckets(relative, bidirectional=bidirectional)
    np.testing.assert_array_equal(bias, jnp.moveaxis(table[buckets], -1, 1))
    assert bias.shape == (1, 3, 5, 5)


@given(shift=st.integers(-(2**20), 2**20))
def test_depends_on_the_distance_only(shift):
    function = OfDistance(BucketTable())
    table = jax.random.normal(jax.random.key(0), (32, 2))
    here = function(table, PLACES, PLACES)
    np.testing.assert_array_equal(here, function(table, PLACES + shift, PLACES + shift))


def test_gradients_count_the_pairs_of_each_bucket():
    distance = jnp.arange(4)[:, None] - jnp.arange(4)[None, :]
    total = lambda table: jnp.sum(BucketTable()(table, distance[None, None]))  # noqa: E731
    grads = jax.grad(total)(jnp.ones((32, 2)))
    assert grads[:4].tolist() == [[10, 10], [3, 3], [2, 2], [1, 1]]  # 4 equal and 6 ahead
    assert not grads[4:].any()


def test_one_table_for_all_layers_or_one_in_each():
    side = Side(jnp.ones((1, 3, 2, 4)), jnp.arange(3)[None])
    sizes = Sizes(2, 2, 4)
    shared = T5().init(jax.random.key(0), sizes, method="shared")
    assert jax.tree.map(jnp.shape, shared) == {"params": {"table": (32, 2)}}
    own = T5(share_layers=False, num_buckets=500, initial_deviation=0.3, max_distance=300)
    assert own.init(jax.random.key(0), sizes, method="shared") == {}
    variables = own.init(jax.random.key(0), side, side, method="bias")
    assert jax.tree.map(jnp.shape, variables) == {"params": {"table": (500, 2)}}
    np.testing.assert_allclose(jnp.std(variables["params"]["table"]), 0.3, rtol=0.1)
