"""What every encoding of graphs promises. A new file in posjax/graphs joins by itself."""

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax import graphs
from posjax.graphs import GraphEncoding
from posjax.graphs.base import prepare
from posjax.graphs.laplacian import laplacian_eigenvectors

NODES = 6
RANDOM = np.random.default_rng(0)
every = pytest.mark.parametrize("name", graphs.classes())
# A random encoding draws vectors for the nodes of the call; its pure function is tested by itself.
fixed = pytest.mark.parametrize(
    "name", [name for name, cls in graphs.classes().items() if not cls.is_random]
)
KEYS = {"params": jax.random.key(0), "encoding": jax.random.key(1)}


def random_graph(nodes=NODES):
    """Weighted and connected, so that eigenvalues differ."""
    weights = np.triu(
        RANDOM.uniform(0.5, 2.0, (nodes, nodes)) * (RANDOM.random((nodes, nodes)) < 0.6)
    )
    path = np.eye(nodes, k=1)
    weights = np.triu(weights, 2) + path
    return jnp.asarray(weights + weights.T, jnp.float32)


ADJACENCY = jnp.stack([random_graph(), random_graph()])
MASK = jnp.array([[True] * NODES, [True] * 4 + [False] * 2])


def create(name):
    return graphs.classes()[name](width=5)


@functools.cache
def variables_of(name):
    """Random values, because those that start at 0 would hide mistakes."""
    shapes = jax.eval_shape(lambda: create(name).init(KEYS, ADJACENCY, MASK))
    random = np.random.default_rng(1)
    # Positive, because there are variances among them.
    draw = lambda x: jnp.asarray(random.uniform(0.1, 1.0, x.shape), x.dtype)  # noqa: E731
    return jax.tree.map(draw, shapes)


@functools.partial(jax.jit, static_argnums=0)
def run(name, variables, adjacency, mask=None):
    return create(name).apply(variables, adjacency, mask, rngs={"encoding": jax.random.key(7)})


def assert_close(a, b, tolerance=2e-4):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


@every
def test_is_a_configuration_with_defaults_and_its_paper(name):
    cls = graphs.classes()[name]
    assert getattr(graphs, name) is cls and name in vars(graphs)
    assert cls() == cls() and hash(cls()) == hash(cls())
    own = [f for f in dataclasses.fields(cls) if f.init and f.name not in ("parent", "name")]
    assert all(f.default is not dataclasses.MISSING for f in own)
    assert re.search(r"arXiv:\d{4}\.\d{5}", inspect.getdoc(cls))
    with pytest.raises(ValueError, match=f"{name} width is 0; it must be at least 1"):
        cls(width=0)


@every
def test_gives_float32_vectors_of_its_width_and_zeros_for_padding(name):
    for adjacency in (ADJACENCY, ADJACENCY > 0):
        out = run(name, variables_of(name), adjacency, MASK)
        assert (out.shape, out.dtype) == ((2, NODES, 5), jnp.float32)
        assert np.isfinite(out).all()
        assert not out[1, 4:].any() and out[1, :4].any()


@every
def test_padding_changes_nothing(name):
    """Values at padding are no edges. A random encoding draws for other nodes, so one graph is
    padded with other values only."""
    garbage = ADJACENCY.at[1, 4:].set(9.0).at[1, :, 4:].set(9.0)
    padded = run(name, variables_of(name), ADJACENCY, MASK)
    np.testing.assert_array_equal(padded, run(name, variables_of(name), garbage, MASK))
    if not create(name).is_random and create(name).is_sign_invariant:
        alone = run(name, variables_of(name), ADJACENCY[1:, :4, :4])
        assert_close(padded[1, :4], alone[0])


@fixed
def test_renumbering_nodes_renumbers_vectors(name):
    order = jnp.array([3, 0, 5, 1, 4, 2])
    out = run(name, variables_of(name), ADJACENCY)[:, order]
    renumbered = run(name, variables_of(name), ADJACENCY[:, order][:, :, order])
    if create(name).is_sign_invariant:
        assert_close(out, renumbered)
    else:  # up to the signs of the eigenvectors
        vectors = laplacian_eigenvectors(ADJACENCY)[1][:, order]
        again = laplacian_eigenvectors(ADJACENCY[:, order][:, :, order])[1]
        np.testing.assert_allclose(jnp.abs(vectors), jnp.abs(again), atol=1e-4)


@every
def test_bases_of_equal_eigenvalues_do_not_matter_where_promised(name):
    """A complete graph has one eigenvalue 5 times: all nodes are alike, whatever the basis."""
    complete = jnp.ones((NODES, NODES)) - jnp.eye(NODES)
    out = run(name, variables_of(name), complete)
    alike = np.allclose(out, jnp.broadcast_to(out[:1], out.shape), atol=1e-3)
    assert alike == (create(name).is_basis_invariant and not create(name).is_random)


@fixed
def test_vmap_and_single_graphs(name):
    together = run(name, variables_of(name), ADJACENCY, MASK)
    mapped = jax.vmap(lambda a, m: create(name).apply(variables_of(name), a, m))(ADJACENCY, MASK)
    assert_close(together, mapped)
    assert run(name, variables_of(name), ADJACENCY[0]).shape == (NODES, 5)


@every
def test_training_gradients_are_finite_even_for_equal_eigenvalues(name):
    complete = (jnp.ones((NODES, NODES)) - jnp.eye(NODES))[None]
    encoding, variables = create(name), variables_of(name)

    @jax.jit
    def grad(params, adjacency):
        def loss(params, adjacency):
            state = {**variables, "params": params}
            out, _ = encoding.apply(
                state,
                adjacency,
                deterministic=False,
                rngs={"encoding": jax.random.key(2)},
                mutable="batch_stats",
            )
            return jnp.sum(out**2)

        return jax.grad(loss, argnums=(0, 1))(params, adjacency)

    for graph in (complete, ADJACENCY):
        for leaf in jax.tree.leaves(grad(variables["params"], graph)):
            assert np.isfinite(leaf).all()
    assert all(np.any(x) for x in jax.tree.leaves(grad(variables["params"], ADJACENCY)[0]))


@every
def test_says_what_a_paper_table_needs(name):
    cls = graphs.classes()[name]
    assert issubclass(cls, GraphEncoding)
    assert {type(getattr(cls, flag)) for flag in ("is_sign_invariant", "is_basis_invariant")} == {
        bool
    }


@pytest.mark.parametrize(
    ("adjacency", "mask", "words"),
    [
        (jnp.ones((2, 3)), None, r"adjacency has shape \(2, 3\); it must be \[..., n, n\]"),
        (jnp.ones(4), None, "adjacency has shape"),
        (jnp.ones((0, 0)), None, "no axis 0"),
        (jnp.ones((3, 3)), jnp.ones(2, bool), r"mask has shape \(2,\).*it must be \[3\]"),
        (jnp.ones((3, 3)), jnp.ones(3), "mask has dtype float32; it must be bool"),
    ],
)
def test_bad_arguments(adjacency, mask, words):
    with pytest.raises(ValueError, match=words):
        prepare(adjacency, mask)
    with pytest.raises(ValueError, match=words):
        graphs.RWSE().init(jax.random.key(0), adjacency, mask)


def test_the_base_class_is_no_encoding():
    with pytest.raises(NotImplementedError):
        GraphEncoding().init(jax.random.key(0), ADJACENCY)
