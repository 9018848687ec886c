import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.graphs import RWSE
from posjax.graphs.random_walk import random_walk_returns

RANDOM = np.random.default_rng(0)


def random_graphs(batch, n):
    weights = np.triu(RANDOM.uniform(0.2, 2.0, (batch, n, n)), 1)
    return jnp.asarray(weights + weights.swapaxes(1, 2), jnp.float32)


def test_equals_powers_of_the_transition_matrix():
    """Loops count; from a node without edges the walk is nowhere."""
    weights = np.asarray(random_graphs(1, 5)[0], np.float64).copy()
    weights[2] = weights[:, 2] = 0
    weights[1, 1] = 0.7
    degree = weights.sum(1)
    step = np.array([row / d if d else 0 * row for row, d in zip(weights, degree, strict=True)])
    want = [np.diag(np.linalg.matrix_power(step, t)) for t in range(1, 8)]
    out = random_walk_returns(jnp.asarray(weights), 7)
    np.testing.assert_allclose(out, np.stack(want, axis=1), atol=1e-6)
    assert not out[2].any()


def test_known_walks():
    ring = np.roll(np.eye(6), 1, axis=0)
    out = random_walk_returns(jnp.asarray(ring + ring.T), 4)
    np.testing.assert_allclose(out, np.tile([0, 2 / 4, 0, 6 / 16], (6, 1)), atol=1e-6)
    out = random_walk_returns(jnp.ones((5, 5)) - jnp.eye(5), 3)
    np.testing.assert_allclose(out, np.tile([0, 1 / 4, 3 / 16], (5, 1)), atol=1e-6)


def test_is_what_a_walker_finds():
    graph = np.asarray(random_graphs(1, 4)[0])
    walkers, steps = 20_000, 3
    place, home = np.zeros(walkers, int), []
    cumulative = np.cumsum(graph / graph.sum(1, keepdims=True), axis=1)
    for _ in range(steps):
        draws = RANDOM.random(walkers)
        place = np.minimum((draws[:, None] > cumulative[place]).sum(1), 3)
        home.append(np.mean(place == 0))
    np.testing.assert_allclose(random_walk_returns(jnp.asarray(graph), steps)[0], home, atol=0.02)


def test_the_network_equals_torch_in_training_and_afterwards():
    torch = pytest.importorskip("torch", reason="compares with PyTorch's layers")
    encoding, graphs = RWSE(width=3, steps=4), random_graphs(2, 5)
    variables = encoding.init(jax.random.key(0), graphs)
    norm, linear = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight[:] = torch.tensor(np.asarray(variables["params"]["linear"]["kernel"])).T
        linear.bias[:] = torch.tensor(np.asarray(variables["params"]["linear"]["bias"]))
    returns = torch.tensor(np.asarray(random_walk_returns(graphs, 4))).reshape(-1, 4)
    # Returns after one step are 0 everywhere, and so are their variance and what comes of them.
    want = linear(norm(returns)).detach().numpy()
    out, state = encoding.apply(variables, graphs, deterministic=False, mutable="batch_stats")
    np.testing.assert_allclose(out.reshape(-1, 3), want, atol=2e-4)
    want = norm.running_mean.numpy()
    np.testing.assert_allclose(state["batch_stats"]["norm"]["mean"], want, atol=1e-6)
    unbiased = (norm.running_var.numpy() - 0.9) / 0.1
    ours = (np.asarray(state["batch_stats"]["norm"]["var"]) - 0.9) / 0.1
    np.testing.assert_allclose(ours, unbiased * 9 / 10, atol=1e-5)
    norm.running_var[:] = torch.tensor(np.asarray(state["batch_stats"]["norm"]["var"]))
    want = linear(norm.eval()(returns)).detach().numpy()
    out = encoding.apply({**variables, **state}, graphs)
    np.testing.assert_allclose(out.reshape(-1, 3), want, atol=1e-5)


def test_statistics_are_those_of_real_nodes():
    encoding, graphs = RWSE(width=3, steps=4), random_graphs(2, 4)
    padded = jnp.full((2, 7, 7), 5.0).at[:, :4, :4].set(graphs)
    mask = jnp.broadcast_to(jnp.arange(7) < 4, (2, 7))
    variables = encoding.init(jax.random.key(0), graphs)
    train = {"deterministic": False, "mutable": "batch_stats"}
    want, state = encoding.apply(variables, graphs, **train)
    out, same = encoding.apply(variables, padded, mask, **train)
    np.testing.assert_allclose(out[:, :4], want, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, same)


def test_gradients_reach_the_weights_of_edges():
    graph = random_graphs(1, 4)[0]
    loss = lambda a: jnp.sum(random_walk_returns(a, 3) ** 2)  # noqa: E731
    direction = RANDOM.normal(size=(4, 4)).astype(np.float32)
    slope = jnp.sum(jax.grad(loss)(graph) * direction)
    step = 1e-2
    want = (loss(graph + step * direction) - loss(graph - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, want, rtol=1e-2)
