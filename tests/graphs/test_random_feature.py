import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.graphs import RFP
from posjax.graphs.laplacian import normalized_adjacency, normalized_laplacian
from posjax.graphs.random_feature import orthonormal, propagate

RANDOM = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def symmetric(n):
    x = draw(n, n)
    return (x + x.T) / 2


def gram_schmidt(x):
    """One column after another, in float64."""
    done = []
    for column in np.asarray(x, np.float64).T:
        length = np.linalg.norm(column)
        for q in done:
            column = column - (q @ column) * q
        rest = np.linalg.norm(column)
        done.append(column / rest if rest > 1e-5 * length else 0 * column)
    return np.stack(done, axis=1)


@pytest.mark.parametrize(("rows", "columns"), [(6, 3), (4, 4), (3, 5), (1, 2)])
def test_orthonormal_is_gram_schmidt(rows, columns):
    x = draw(rows, columns)
    np.testing.assert_allclose(orthonormal(x), gram_schmidt(x), atol=1e-5)


def test_dependent_columns_become_zero():
    x = draw(5, 2)
    x = jnp.stack((x[:, 0], 2 * x[:, 0], jnp.zeros(5), x[:, 1]), axis=1)
    out = orthonormal(x)
    assert not out[:, 1:3].any()
    np.testing.assert_allclose(out, gram_schmidt(x), atol=1e-5)


@pytest.mark.parametrize("normalization", ["orthonormal", "length"])
def test_the_trajectory_by_loops(normalization):
    operator, features, steps = symmetric(6), draw(6, 2), 4
    norm = (
        gram_schmidt if normalization == "orthonormal" else lambda x: x / np.linalg.norm(x, axis=0)
    )
    want = [norm(np.asarray(features, np.float64))]
    for _ in range(steps):
        want.append(norm(np.asarray(operator, np.float64) @ want[-1]))
    out = propagate(operator, features, steps, normalization)
    assert out.shape == (6, 10)
    np.testing.assert_allclose(out, np.concatenate(want, axis=1), atol=1e-4)


def test_goes_to_the_dominant_eigenvectors():
    basis = np.linalg.qr(RANDOM.normal(size=(6, 6)))[0]
    values = np.array([-4.0, 2.0, 1.0, 0.5, 0.2, 0.1])
    operator = jnp.asarray(basis * values @ basis.T, jnp.float32)
    last = propagate(operator, draw(6, 3), 40)[:, -3:]
    np.testing.assert_allclose(jnp.abs(last), np.abs(basis[:, :3]), atol=1e-3)
    first = propagate(operator, draw(6, 3), 40, "length")[:, -3:]
    np.testing.assert_allclose(jnp.abs(first), np.abs(basis[:, [0, 0, 0]]), atol=1e-3)


@pytest.mark.parametrize("normalization", ["orthonormal", "length"])
def test_renumbering_nodes_renumbers_the_trajectory(normalization):
    operator, features, order = symmetric(6), draw(6, 3), RANDOM.permutation(6)
    out = propagate(operator, features, 4, normalization)[order]
    same = propagate(operator[order][:, order], features[order], 4, normalization)
    np.testing.assert_allclose(out, same, atol=1e-3)


@pytest.mark.parametrize("operator", ["adjacency", "laplacian"])
def test_the_module_maps_a_new_trajectory_at_every_call(operator):
    encoding = RFP(width=6, features=2, steps=2, operator=operator)
    graph = jnp.abs(symmetric(5)) * (1 - jnp.eye(5))
    variables = {"params": {"linear": {"kernel": jnp.eye(6), "bias": jnp.zeros(6)}}}
    run = lambda seed: encoding.apply(  # noqa: E731
        variables, graph, rngs={"encoding": jax.random.key(seed)}
    )
    out = run(0)
    make = normalized_adjacency if operator == "adjacency" else normalized_laplacian
    want = propagate(make(graph), out[:, :2], 2)
    np.testing.assert_allclose(out, want, atol=1e-4)
    np.testing.assert_array_equal(out, run(0))
    assert not np.allclose(out, run(1), atol=1e-2)


def test_padding_stays_out_of_the_trajectory():
    encoding = RFP(width=4, features=4, steps=1)
    variables = {"params": {"linear": {"kernel": jnp.eye(8)[:, :4], "bias": jnp.ones(4)}}}
    graph, mask = jnp.ones((6, 6)), jnp.arange(6) < 3
    out = encoding.apply(variables, graph, mask, rngs={"encoding": jax.random.key(0)})
    assert not out[3:].any()
    first = out[:3] - 1  # 4 columns on 3 nodes: orthonormal, and one left over
    np.testing.assert_allclose(first.T @ first, jnp.diag(jnp.array([1, 1, 1, 0])), atol=1e-5)
