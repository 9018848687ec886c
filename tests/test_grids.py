import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from posjax.grids import grid_positions


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))
def test_counts_through_the_grid_as_numpy_does(shape):
    cells = int(np.prod(shape))
    found = grid_positions(jnp.arange(cells)[None, :], shape)[0]
    np.testing.assert_array_equal(found, np.stack(np.unravel_index(np.arange(cells), shape), -1))


def test_the_first_axis_has_no_end():
    assert grid_positions(jnp.array([[5, 6, 13]]), (2, 3)).tolist() == [[[1, 2], [2, 0], [4, 1]]]
    assert grid_positions(jnp.array([[5, 6]]), (2,)).tolist() == [[[5], [6]]]


def test_fractions_move_the_last_coordinate():
    found = grid_positions(jnp.array([[0.5, 3.25]]), (2, 3))
    assert found.dtype == jnp.float32
    assert found.tolist() == [[[0, 0.5], [1, 0.25]]]
