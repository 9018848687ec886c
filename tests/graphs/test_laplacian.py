import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.graphs import LapPE
from posjax.graphs.laplacian import (
    laplacian_eigenvectors,
    normalized_adjacency,
    normalized_laplacian,
)

RANDOM = np.random.default_rng(0)


def cycle(n):
    ring = np.roll(np.eye(n), 1, axis=0)
    return jnp.asarray(ring + ring.T)


def path(n):
    return jnp.asarray(np.eye(n, k=1) + np.eye(n, k=-1))


def complete(n):
    return jnp.ones((n, n)) - jnp.eye(n)


def random_weights(n):
    weights = np.triu(RANDOM.uniform(0.2, 2.0, (n, n)), 1)
    return jnp.asarray(weights + weights.T, jnp.float32)


@pytest.mark.parametrize(
    ("graph", "want"),
    [
        (cycle(7), 1 - np.cos(2 * np.pi * np.arange(7) / 7)),
        (path(6), 1 - np.cos(np.pi * np.arange(6) / 5)),
        (complete(5), np.array([0, 1.25, 1.25, 1.25, 1.25])),
        (jnp.zeros((3, 3)), np.ones(3)),
        (jnp.zeros((4, 4)).at[:2, :2].set(complete(2)), np.array([0, 1, 1, 2])),
    ],
    ids=["cycle", "path", "complete", "no edges", "an edge and two single nodes"],
)
def test_known_spectra(graph, want):
    values, vectors, known = laplacian_eigenvectors(graph)
    np.testing.assert_allclose(values, np.sort(want), atol=1e-5)
    assert known.all() and (values >= 0).all()
    laplacian = normalized_laplacian(graph)
    np.testing.assert_allclose(laplacian @ vectors, vectors * values[None], atol=1e-5)
    np.testing.assert_allclose(vectors.T @ vectors, jnp.eye(len(values)), atol=1e-5)


def test_the_laplacian_by_loops():
    """Loops do not count and a node without edges has 1, as in PyTorch Geometric."""
    weights = np.asarray(random_weights(5)).copy()
    weights[3] = weights[:, 3] = 0
    want = np.eye(5)
    for i, j in np.ndindex(5, 5):
        if weights[i, j]:
            want[i, j] -= weights[i, j] / np.sqrt(weights[i].sum() * weights[j].sum())
    loops = jnp.asarray(weights) + jnp.diag(jnp.arange(5.0))
    np.testing.assert_allclose(normalized_laplacian(loops), want, atol=1e-6)
    np.testing.assert_allclose(normalized_adjacency(loops), np.eye(5) - want, atol=1e-6)


def test_equals_networkx():
    networkx = pytest.importorskip("networkx", reason="compares with networkx")
    graph = networkx.erdos_renyi_graph(9, 0.5, seed=3)
    assert networkx.is_connected(graph)
    want = networkx.normalized_laplacian_spectrum(graph)
    adjacency = jnp.asarray(networkx.to_numpy_array(graph), jnp.float32)
    np.testing.assert_allclose(laplacian_eigenvectors(adjacency)[0], np.sort(want), atol=1e-5)


@pytest.mark.parametrize("count", [2, 4, 6, 9])
def test_padding_stands_behind_and_is_zero(count):
    """A path of 4 nodes has the eigenvalue 2, the largest there can be."""
    adjacency = jnp.zeros((6, 6)).at[:4, :4].set(path(4))
    mask = jnp.arange(6) < 4
    values, vectors, known = laplacian_eigenvectors(adjacency, count, mask)
    alone, of_alone, _ = laplacian_eigenvectors(path(4), count)
    assert (values.shape, vectors.shape) == ((count,), (6, count))
    assert known.tolist() == [m < 4 for m in range(count)]
    np.testing.assert_allclose(values, alone, atol=1e-5)
    np.testing.assert_allclose(jnp.abs(vectors[:4]), jnp.abs(of_alone), atol=1e-5)
    assert not vectors[4:].any() and not vectors[:, 4:].any()


def test_an_eigenvector_of_a_path_is_a_cosine():
    vectors = laplacian_eigenvectors(path(6))[1]
    wave = np.cos(np.pi * np.arange(6) / 5)  # of D^-1 A; times the roots of the degrees it is ours
    wave = wave * np.sqrt(np.array([1, 2, 2, 2, 2, 1]))
    np.testing.assert_allclose(
        jnp.abs(vectors[:, 1]), np.abs(wave / np.linalg.norm(wave)), atol=1e-5
    )


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_network_equals_torch(layers):
    """GraphGPS's DeepSet: linear and ReLU on pairs, absent pairs left out, a sum."""
    torch = pytest.importorskip("torch", reason="compares with PyTorch's layers")
    encoding = LapPE(width=4, eigenvectors=6, layers=layers)
    graph = random_weights(5)  # 5 of the 6
    variables = encoding.init(jax.random.key(0), graph)
    values, vectors, _ = laplacian_eigenvectors(graph)
    pairs = np.stack(np.broadcast_arrays(vectors, values[None]), axis=-1)
    network = []
    for index in range(layers):
        layer = variables["params"][f"layer_{index}"]
        linear = torch.nn.Linear(*layer["kernel"].shape)
        bias = RANDOM.normal(size=layer["bias"].shape).astype(np.float32)
        layer["bias"] = jnp.asarray(bias)
        linear.weight.data[:] = torch.tensor(np.asarray(layer["kernel"])).T
        linear.bias.data[:] = torch.tensor(bias)
        network += [linear, torch.nn.ReLU()]
    want = torch.nn.Sequential(*network)(torch.tensor(pairs)).sum(1).detach().numpy()
    np.testing.assert_allclose(encoding.apply(variables, graph), want, atol=1e-5)
    sizes = [8] * (layers - 1) + [4]
    assert [variables["params"][f"layer_{i}"]["bias"].shape[0] for i in range(layers)] == sizes


def test_signs_are_random_in_training_only():
    """With weights (1, 0) and no bias the network is relu(+-v): both signs must be seen."""
    encoding = LapPE(width=1, eigenvectors=1, layers=1)
    kernel = jnp.array([[1.0], [0.0]])
    variables = {"params": {"layer_0": {"kernel": kernel, "bias": jnp.zeros(1)}}}
    graphs = jnp.stack([path(2)] * 200)

    @functools.partial(jax.jit, static_argnums=0)
    def run(deterministic, key):
        settings = {"deterministic": deterministic, "rngs": {"encoding": key}}
        return encoding.apply(variables, graphs, **settings)[:, :, 0]

    signed = run(False, jax.random.key(0))
    assert 0.35 < float(jnp.mean(signed[:, 0] > 0)) < 0.65  # for each graph its own sign
    np.testing.assert_allclose(signed[:, 0], signed[:, 1], atol=1e-6)  # one for all its nodes
    still = run(True, jax.random.key(0))
    np.testing.assert_array_equal(still, run(True, jax.random.key(1)))
    assert len(set(still[:, 0].tolist())) == 1
