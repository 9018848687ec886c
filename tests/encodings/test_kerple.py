import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import KERPLE
from posjax.encodings.base import Side, Sizes
from posjax.encodings.distance import OfDistance
from posjax.encodings.kerple import KernelDistance, keep_within

PLACES = jnp.array([[0, 1, 5, 30, 200]])
R1, R2 = jnp.array([0.7, 1.9]), jnp.array([0.3, 1.4])


def official(kind, r1, r2, length):
    """The official code, row by row: parameters clipped first, then the kernel of i - j."""
    high = 2.0 if kind == "power" else np.inf
    p = np.clip(np.asarray(r1, np.float64), 0.01, None)
    a = np.clip(np.asarray(r2, np.float64), 0.01, high)
    bias = np.zeros((len(p), length, length))
    for head in range(len(p)):
        for i in range(length):
            for j in range(i + 1):
                d = i - j
                kernel = np.log(1 + a[head] * d) if kind == "log" else float(d) ** a[head]
                bias[head, i, j] = -p[head] * kernel
    return bias


def bias_of(encoding, params, places):
    query, key = (Side(jnp.zeros((1, places.shape[1], heads, 4)), places) for heads in (2, 1))
    variables = {"params": params}
    shared = encoding.apply(variables, Sizes(2, 1, 4), method="shared")
    bias = encoding.apply(variables, query, key, shared, method="bias")
    settings = {"query_positions": None, "key_positions": None}
    return bias.dense(query.x, key.x, scale=1.0, allowed=None, **settings)


def kernel_of(kind, places):
    return OfDistance(KernelDistance(kind))((R1, R2), places, places)


@pytest.mark.parametrize("share_layers", [False, True])
@pytest.mark.parametrize("kind", ["log", "power"])
@pytest.mark.parametrize("r2", [R2, jnp.array([-0.2, 2.7])])
def test_equals_a_transcription_of_the_official_code(kind, share_layers, r2):
    encoding = KERPLE(kind=kind, share_layers=share_layers)
    bias = bias_of(encoding, {"r1": R1, "r2": r2}, jnp.arange(12)[None])
    np.testing.assert_allclose(np.tril(bias[0]), official(kind, R1, r2, 12), rtol=2e-6)
    np.testing.assert_array_equal(bias, jnp.swapaxes(bias, 2, 3))


@pytest.mark.parametrize("kind", ["log", "power"])
def test_gradients_against_finite_differences(kind):
    """At distance 0 too, where the derivative of 0^r must not be 0 * log(0)."""
    function, weights = KernelDistance(kind), jax.random.normal(jax.random.key(0), (1, 2, 5, 5))
    near = jnp.array([0, 1, 3, 4, 9])
    distance = (near[:, None] - near[None, :])[None, None]
    loss = jax.jit(lambda r1, r2: jnp.sum(function((r1, r2), distance) * weights))
    grads = jax.grad(loss, argnums=(0, 1))(R1, R2)
    for index, grad in enumerate(grads):
        for head in range(2):
            step = jnp.zeros(2).at[head].set(1e-2)
            plus, minus = (
                loss(*(r + sign * step if n == index else r for n, r in enumerate((R1, R2))))
                for sign in (1, -1)
            )
            np.testing.assert_allclose(grad[head], (plus - minus) / 2e-2, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["log", "power"])
def test_fractional_positions_get_no_gradient(kind):
    """That of |i - j|^0.3 would be infinite at 0."""
    places = PLACES / 4
    run = jax.jit(lambda places: jnp.sum(kernel_of(kind, places)))
    assert not jax.grad(run)(places).any()
    bias = kernel_of(kind, places)[0, 0, -1]
    distance = np.asarray(200 - PLACES[0]) / 4
    want = np.log(1 + 0.3 * distance) if kind == "log" else distance**0.3
    np.testing.assert_allclose(bias, -0.7 * want, rtol=1e-5)


def test_a_clamped_parameter_comes_back_but_goes_no_further_out():
    x = jnp.array([-1.0, 0.5, 3.0])
    grad = lambda sign: jax.grad(lambda x: jnp.sum(sign * keep_within(x, 0.01, 2.0)))(x).tolist()  # noqa: E731
    assert keep_within(x, 0.01, 2.0).tolist() == pytest.approx([0.01, 0.5, 2.0])
    assert grad(1.0) == [0.0, 1.0, 1.0]  # descent lowers x
    assert grad(-1.0) == [-1.0, -1.0, 0.0]  # descent raises x


@pytest.mark.parametrize("kind", ["log", "power"])
@pytest.mark.parametrize("positivity", ["clamp", "softplus"])
def test_starts_uniform_as_in_the_official_code(kind, positivity):
    encoding, heads = KERPLE(kind=kind, positivity=positivity), 4000
    r1, r2 = encoding.init_with_output(jax.random.key(0), Sizes(heads, heads, 4), method="shared")[
        0
    ]
    for r, width in ((r1, 2.0 if kind == "log" else 1.0), (r2, 1.0 if kind == "log" else 2.0)):
        assert 0.0099 <= float(jnp.min(r)) < 0.05 * width
        assert 0.95 * width < float(jnp.max(r)) <= width
        np.testing.assert_allclose(jnp.mean(r), width / 2, rtol=0.03)
        np.testing.assert_allclose(jnp.std(r), width / 12**0.5, rtol=0.03)


def test_softplus_keeps_any_parameter_in_range():
    far = {"r1": jnp.array([-60.0, 40.0]), "r2": jnp.array([-60.0, 60.0])}
    settings = {"positivity": "softplus"}
    for kind, high in (("log", jnp.inf), ("power", 2.0)):
        encoding = KERPLE(kind=kind, **settings)
        r1, r2 = encoding.apply({"params": far}, Sizes(2, 2, 4), method="shared")
        assert (r1 > 0).all() and (r2 > 0).all() and (r2 <= high).all()


@pytest.mark.parametrize("kind", ["log", "power"])
def test_depends_on_the_distance_only(kind):
    run = jax.jit(lambda places: kernel_of(kind, places))
    for shift in (-(2**20), 1, 2**20):
        np.testing.assert_array_equal(run(PLACES), run(PLACES + shift))


def test_falls_with_every_distance_beyond_the_trained_one():
    for kind in ("log", "power"):
        last = kernel_of(kind, PLACES)[0, :, -1]
        assert (jnp.diff(last) > 0).all()


def test_one_pair_for_all_layers_or_one_in_each():
    side = Side(jnp.ones((1, 3, 2, 4)), jnp.arange(3)[None])
    own = KERPLE(share_layers=False)
    assert own.init(jax.random.key(0), Sizes(2, 2, 4), method="shared") == {}
    variables = own.init(jax.random.key(0), side, side, method="bias")
    assert jax.tree.map(jnp.shape, variables) == {"params": {"r1": (2,), "r2": (2,)}}
    assert KERPLE.power() == KERPLE(kind="power")
