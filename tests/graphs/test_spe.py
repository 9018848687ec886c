import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.graphs import SPE, LapPE
from posjax.graphs.laplacian import laplacian_eigenvectors, normalized_laplacian
from posjax.graphs.spe import spectral_filters

RANDOM = np.random.default_rng(0)
SMALL = {"width": 3, "filters": 4, "psi_hidden": 5, "phi_hidden": 6}


def cycle(n):
    ring = np.roll(np.eye(n), 1, axis=0)
    return jnp.asarray(ring + ring.T, jnp.float32)


def weighted(n):
    weights = np.triu(RANDOM.uniform(0.2, 2.0, (n, n)), 1)
    return jnp.asarray(weights + weights.T, jnp.float32)


def random_variables(encoding, graph):
    shapes = jax.eval_shape(lambda: encoding.init(jax.random.key(0), graph))
    return jax.tree.map(lambda x: jnp.asarray(0.5 * RANDOM.normal(size=x.shape), x.dtype), shapes)


def transcription(encoding, variables, graph):
    """Loops over nodes, in float64, with numpy's eigenvectors."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    values, vectors = np.linalg.eigh(np.asarray(normalized_laplacian(graph), np.float64))
    values, vectors = (x[..., : encoding.eigenvectors] for x in (values, vectors))
    x = values[:, None]
    for index in range(encoding.psi_layers):
        layer = p[f"psi_{index}"]
        y = np.stack([row @ layer["kernel"] + layer["bias"] for row in x])
        if encoding.psi == "deepsets":
            y = y + x.sum(0) @ p[f"psi_{index}_sum"]["kernel"]
        last = index == encoding.psi_layers - 1
        x = y if last and encoding.psi == "mlp" else np.maximum(y, 0)
    nodes = len(graph)
    w = np.zeros((nodes, nodes, encoding.filters))
    for m in range(encoding.filters):
        w[:, :, m] = vectors @ np.diag(x[:, m]) @ vectors.T
    for index in range(encoding.phi_layers):
        new = []
        for i in range(nodes):
            total = (1 + p[f"epsilon_{index}"]) * w[i]
            for k in range(nodes):
                total = total + float(graph[i, k]) * w[k]
            inner, outer = p[f"phi_{index}_in"], p[f"phi_{index}_out"]
            hidden = np.maximum(total @ inner["kernel"] + inner["bias"], 0)
            new.append(hidden @ outer["kernel"] + outer["bias"])
        w = np.stack(new)
    return w.sum(axis=1)


@pytest.mark.parametrize("psi", ["mlp", "deepsets"])
@pytest.mark.parametrize("limit", [None, 3])
def test_equals_the_formula(psi, limit):
    encoding, graph = SPE(psi=psi, eigenvectors=limit, **SMALL), weighted(5)
    variables = random_variables(encoding, graph)
    want = transcription(encoding, variables, graph)
    np.testing.assert_allclose(encoding.apply(variables, graph), want, rtol=1e-4, atol=1e-3)


def test_gradients_equal_finite_differences_of_the_formula():
    encoding, graph = SPE(psi="deepsets", **SMALL), weighted(5)
    variables = random_variables(encoding, graph)
    grads = jax.jit(jax.grad(lambda v: jnp.sum(encoding.apply(v, graph))))(variables)
    direction = jax.tree.map(lambda x: RANDOM.normal(size=x.shape), variables)
    move = lambda s: jax.tree.map(  # noqa: E731
        lambda x, d: np.asarray(x, np.float64) + s * d, variables, direction
    )
    ends = [transcription(encoding, move(s), graph).sum() for s in (1e-6, -1e-6)]
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True)
    slope = sum(np.sum(np.asarray(g) * d) for g, d in pairs)
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=2e-3)


def test_filters_of_one_are_the_identity_and_of_values_the_laplacian():
    graph = weighted(6)
    values, vectors, _ = laplacian_eigenvectors(graph)
    w = spectral_filters(vectors, jnp.stack((jnp.ones(6), values), axis=1))
    np.testing.assert_allclose(w[..., 0], jnp.eye(6), atol=1e-5)
    np.testing.assert_allclose(w[..., 1], normalized_laplacian(graph), atol=1e-5)


@pytest.mark.parametrize("psi", ["mlp", "deepsets"])
def test_neither_signs_nor_bases_matter(psi, monkeypatch):
    """The eigenvalues of a cycle come in pairs; each pair's plane is turned by a random angle."""
    encoding, graph = SPE(psi=psi, **SMALL), cycle(7)
    variables = random_variables(encoding, graph)
    values, vectors, known = laplacian_eigenvectors(graph)
    turned = np.array(vectors)
    turned[:, 0] *= -1
    for first in (1, 3, 5):
        angle = RANDOM.uniform(0, 6)
        turn = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
        turned[:, first : first + 2] = turned[:, first : first + 2] @ np.array(turn)
    assert not np.allclose(turned, vectors, atol=0.1)
    here = encoding.apply(variables, graph)
    other = lambda *_: (values, jnp.asarray(turned), known)  # noqa: E731
    monkeypatch.setattr("posjax.graphs.spe.laplacian_eigenvectors", other)
    np.testing.assert_allclose(encoding.apply(variables, graph), here, rtol=1e-4, atol=1e-3)


def test_is_stable_where_single_eigenvectors_are_not():
    """A little noise on the edges of a cycle picks any eigenvectors from the planes."""
    graph = cycle(8)
    noise = [1e-3 * weighted(8) * graph for _ in range(2)]
    moved = []
    for encoding in (SPE(**SMALL), LapPE(width=3, eigenvectors=8)):
        variables = random_variables(encoding, graph)
        run = jax.jit(encoding.apply)
        a, b = (run(variables, graph + change) for change in noise)
        moved.append(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a))))
    assert moved[0] < 0.01 < 0.05 < moved[1]


def test_a_limit_between_equal_eigenvalues_is_not_invariant():
    """As documented: the second and third eigenvalue of a cycle are one."""
    encoding, graph = SPE(eigenvectors=2, **SMALL), cycle(7)
    out = encoding.apply(random_variables(encoding, graph), graph)
    assert not np.allclose(out, out[:1].repeat(7, 0), atol=1e-3)
    whole = SPE(eigenvectors=3, **SMALL)
    out = whole.apply(random_variables(whole, graph), graph)
    np.testing.assert_allclose(out, out[:1].repeat(7, 0), atol=1e-3)


def test_initial_values_and_shapes():
    encoding = SPE(**SMALL, psi="deepsets")
    params = jax.jit(encoding.init)(jax.random.key(0), weighted(4))["params"]
    assert params["psi_0"]["kernel"].shape == params["psi_0_sum"]["kernel"].shape == (1, 5)
    assert params["psi_2"]["kernel"].shape == (5, 4)
    assert params["phi_0_in"]["kernel"].shape == (4, 6)
    assert params["phi_1_out"]["kernel"].shape == (6, 3)
    assert params["epsilon_0"] == params["epsilon_1"] == 0
    assert set(params["psi_0_sum"]) == {"kernel"}
