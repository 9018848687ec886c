import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import Learned
from posjax.encodings.learned import lookup, shrink
from posjax.positions import LengthError

TABLE = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
VARIABLES = {"params": {"table": TABLE}}


def embed(positions, dtype=jnp.float32):
    x = jnp.full((*positions.shape, 2), 10.0, dtype)
    return Learned(max_length=3).apply(VARIABLES, x, positions, method="embed")


def test_adds_the_rows_of_the_positions():
    out = embed(jnp.array([[0, 2], [1, 1]]))
    assert out.tolist() == [[[11, 12], [15, 16]], [[13, 14], [13, 14]]]
    assert embed(jnp.array([[2]]), dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_starts_with_the_deviation_asked_for():
    encoding = Learned(max_length=500, initial_deviation=0.1)
    x, positions = jnp.zeros((1, 1, 64)), jnp.zeros((1, 1), jnp.int32)
    params = encoding.init(jax.random.key(0), x, positions, method="embed")["params"]
    assert {name: (x.shape, x.dtype) for name, x in params.items()} == {
        "table": ((500, 64), jnp.float32)
    }
    np.testing.assert_allclose(jnp.std(params["table"]), 0.1, rtol=0.05)


def test_only_used_rows_get_gradients():
    def loss(table):
        return jnp.sum(lookup(table, jnp.array([[0, 2, 2]])))

    assert jax.grad(loss)(TABLE).tolist() == [[1, 1], [0, 0], [2, 2]]


def test_a_longer_sequence_is_refused_when_traced():
    with pytest.raises(LengthError, match=r"Learned has max_length=3.* has 4 tokens"):
        jax.jit(embed)(jnp.zeros((1, 4), jnp.int32))
    assert issubclass(LengthError, ValueError)


@pytest.mark.parametrize("position", [3, 1000, -1])
def test_a_position_outside_the_table_is_refused_where_it_is_known(position):
    with pytest.raises(LengthError, match=f"position {position} is not in a table of 3 rows"):
        embed(jnp.array([[0, position]]))


@pytest.mark.parametrize("position", [3, 1000, -1, -3])
def test_a_position_outside_the_table_is_nan_where_it_is_not_known(position):
    out = jax.jit(embed)(jnp.array([[2, position]]))
    assert np.isnan(out[0, 1]).all()
    assert np.isfinite(out[0, 0]).all()


@pytest.mark.parametrize(("rows", "length"), [(3, 7), (5, 6), (1, 4), (16, 61), (9, 17)])
def test_a_stretched_table_equals_torch(rows, length):
    torch = pytest.importorskip("torch", reason="compares with PyTorch's F.interpolate")
    table = jax.random.normal(jax.random.key(0), (rows, 4))
    encoding = Learned(max_length=rows, interpolate_to=length)
    x, places = jnp.zeros((1, length, 4)), jnp.arange(length)[None]
    out = encoding.apply({"params": {"table": table}}, x, places, method="embed")
    channels = torch.tensor(np.asarray(table)).T[None]
    resize = torch.nn.functional.interpolate
    want = resize(channels, size=length, mode="linear", align_corners=True)
    np.testing.assert_allclose(out[0], want[0].T.numpy(), atol=2e-6)


def test_fractions_of_a_row_are_interpolated():
    places = jnp.array([[0.0, 0.5, 1.75, 2.0, 2.9]])
    want = [[1, 2], [2, 3], [4.5, 5.5], [5, 6], [5, 6]]
    np.testing.assert_allclose(lookup(TABLE, places)[0], want, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lookup)(TABLE, places)[0], want, rtol=1e-6)
    whole = jnp.array([[2, 0, 1]])
    np.testing.assert_array_equal(lookup(TABLE, whole), lookup(TABLE, whole.astype(jnp.float32)))


def test_more_tokens_than_rows_are_fine_where_positions_are_fractions():
    """What interpolating positions gives: 6 tokens at every half row."""
    out = embed(jnp.arange(6)[None] / 2)
    np.testing.assert_allclose(out[0, :, 0], [11, 12, 13, 14, 15, 15], rtol=1e-6)


def test_gradients_of_a_fraction_go_to_both_rows():
    grads = jax.grad(lambda table: jnp.sum(lookup(table, jnp.array([[0.25]]))))(TABLE)
    assert grads.tolist() == [[0.75, 0.75], [0.25, 0.25], [0, 0]]


def test_stretching_ends_at_its_length():
    assert Learned.interpolated() == Learned(max_length=1024, interpolate_to=4096)
    ends = shrink(jnp.array([[0, 4095]]), 4096, 1024)
    assert ends.tolist() == [[0, 1023]]
    outside = jax.jit(shrink, static_argnums=(1, 2))(jnp.array([[-1, 4096]]), 4096, 1024)
    assert np.isnan(outside).all()
    stretched = Learned(max_length=3, interpolate_to=5)

    def embed(places):
        x = jnp.zeros((*places.shape, 2))
        return stretched.apply(VARIABLES, x, places, method="embed")

    np.testing.assert_allclose(embed(jnp.array([[3, 4]]))[0, :, 0], [4, 5])
    with pytest.raises(LengthError, match="position 5 is not in a table of 5 rows"):
        embed(jnp.array([[5]]))
    with pytest.raises(LengthError, match=r"interpolate_to=5, but the sequence has 6 tokens"):
        jax.jit(embed)(jnp.zeros((1, 6), jnp.int32))
    out = jax.jit(embed)(jnp.array([[4, 5, -1]]))
    assert np.isnan(out[0, 1:]).all() and np.isfinite(out[0, 0]).all()


@pytest.mark.parametrize("position", [3.0, -0.1, np.nan])
def test_a_fraction_outside_is_refused_or_nan(position):
    places = jnp.array([[1.0, position]])
    with pytest.raises(LengthError, match="is not in a table of 3 rows"):
        lookup(TABLE, places)
    out = jax.jit(lookup)(TABLE, places)
    assert np.isnan(out[0, 1]).all() and np.isfinite(out[0, 0]).all()
