import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax import dot_product_attention
from posjax.encodings import TransformerXL
from posjax.encodings.base import Side, Sizes

LENGTH, HEADS, SIZE = 7, 2, 4
WIDTH = HEADS * SIZE


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


QUERY, KEY, VALUE = normal(0, 3, 1, LENGTH, HEADS, SIZE)
PARAMS = {
    "kernel": normal(1, WIDTH, HEADS, SIZE),
    "content_bias": normal(2, HEADS, SIZE),
    "position_bias": normal(3, HEADS, SIZE),
}
PLACES = jnp.arange(LENGTH)[None]
SIDES = Side(QUERY, PLACES), Side(KEY, PLACES)


def bias_of(encoding, params, places=PLACES, key=KEY):
    variables = {"params": params}
    shared = encoding.apply(variables, Sizes(HEADS, key.shape[2], SIZE), method="shared")
    sides = Side(QUERY, places), Side(key, places)
    return encoding.apply(variables, *sides, shared, method="bias")


def dense(bias, key=KEY):
    settings = {"scale": SIZE**-0.5, "allowed": None}
    return bias.dense(QUERY, key, **settings, query_positions=None, key_positions=None)


def literal(params, places, base=10_000.0):
    """The four terms of the paper's section 3.3 for each pair, without q . k, in float64."""
    p = {name: np.asarray(x, np.float64) for name, x in params.items()}
    q, k = (np.asarray(x[0], np.float64) for x in (QUERY, KEY))
    bias = np.zeros((HEADS, LENGTH, LENGTH))
    for n, i, j in np.ndindex(bias.shape):
        angles = (places[i] - places[j]) / base ** (np.arange(0, WIDTH, 2) / WIDTH)
        projected = np.concatenate((np.sin(angles), np.cos(angles))) @ p["kernel"][:, n]
        bias[n, i, j] = q[i, n] @ projected
        bias[n, i, j] += p["content_bias"][n] @ k[j, n]
        bias[n, i, j] += p["position_bias"][n] @ projected
    return bias / SIZE**0.5


@pytest.mark.parametrize("share_layers", [False, True])
@pytest.mark.parametrize("places", [range(LENGTH), [0, 1, 5, 6, 30, 31, 999]])
def test_is_the_papers_formula(places, share_layers):
    encoding = TransformerXL(share_layers=share_layers)
    got = dense(bias_of(encoding, PARAMS, jnp.array([list(places)])))[0]
    np.testing.assert_allclose(got, literal(PARAMS, list(places)), rtol=1e-4, atol=5e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_causal", [True, False])
def test_equals_hugging_face_xlnet(is_causal):
    """XLNet's attention core with its relative sinusoids, shifted by reshaping."""
    reason = "compares with Hugging Face's code"
    torch = pytest.importorskip("torch", reason=reason)
    xlnet = pytest.importorskip("transformers.models.xlnet.modeling_xlnet", reason=reason)
    config = xlnet.XLNetConfig(
        d_model=WIDTH, n_head=HEADS, d_inner=8, n_layer=1, vocab_size=5, dropout=0.0,
        attn_type="uni" if is_causal else "bi",
    )  # fmt: skip
    model = xlnet.XLNetModel(config).eval()
    core = model.layer[0].rel_attn
    tensor = lambda x: torch.tensor(np.array(x))  # noqa: E731
    with torch.no_grad():
        core.r_w_bias.copy_(tensor(PARAMS["content_bias"]))
        core.r_r_bias.copy_(tensor(PARAMS["position_bias"]))
        sinusoids = model.relative_positional_encoding(LENGTH, LENGTH, bsz=1)
        projected = torch.einsum("ibd,dnh->ibnh", sinusoids, tensor(PARAMS["kernel"]))
        heads = (tensor(x).swapaxes(0, 1) for x in (QUERY, KEY, VALUE))
        mask = torch.triu(torch.ones(LENGTH, LENGTH), diagonal=1)[:, :, None, None]
        mask = mask if is_causal else None
        want = core.rel_attn_core(*heads, projected, attn_mask=mask).swapaxes(0, 1).numpy()
    bias = bias_of(TransformerXL(), PARAMS)
    got = dot_product_attention(QUERY, KEY, VALUE, bias, is_causal=is_causal)
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_grouped_heads_see_their_own_keys():
    query, key = normal(6, 1, LENGTH, 4, SIZE), normal(7, 1, LENGTH, 2, SIZE)
    shapes = {"kernel": (WIDTH, 4, SIZE), "content_bias": (4, SIZE), "position_bias": (4, SIZE)}
    params = {name: normal(8, *shape) for name, shape in shapes.items()}

    @jax.jit
    def run(key):
        sides = Side(query, PLACES), Side(key, PLACES)
        bias = TransformerXL(width=WIDTH).apply({"params": params}, *sides, method="bias")
        settings = {"scale": 1.0, "allowed": None}
        return bias.dense(query, key, **settings, query_positions=None, key_positions=None)

    np.testing.assert_allclose(run(key), run(jnp.repeat(key, 2, axis=2)), atol=1e-5)


def test_gradients_against_finite_differences_of_the_formula():
    weights = np.asarray(normal(4, HEADS, LENGTH, LENGTH), np.float64)
    loss = jax.jit(lambda p: jnp.sum(dense(bias_of(TransformerXL(), p))[0] * jnp.float32(weights)))
    for name, grad in jax.grad(loss)(PARAMS).items():
        direction = np.asarray(normal(5, *grad.shape), np.float64)
        ends = [
            np.sum(
                literal(PARAMS | {name: np.asarray(PARAMS[name]) + step * direction}, range(LENGTH))
                * weights
            )
            for step in (1e-5, -1e-5)
        ]
        np.testing.assert_allclose(
            np.sum(grad * direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-4, err_msg=name
        )


def test_depends_on_the_distance_only():
    run = jax.jit(lambda places: dense(bias_of(TransformerXL(), PARAMS, places)))
    for shift in (-(2**20), 1, 2**20):
        np.testing.assert_array_equal(run(PLACES), run(PLACES + shift))


def test_far_distances_still_differ():
    places = PLACES.at[0, -1].set(50_000)
    farther = places.at[0, -1].set(50_100)
    a, b = (dense(bias_of(TransformerXL(), PARAMS, p))[0, :, -1] for p in (places, farther))
    assert np.isfinite(a).all()
    assert (jnp.abs(a - b)[:, :-1] > 1e-3).any()


def test_initial_values():
    encoding = TransformerXL(width=500, initial_deviation=0.3)
    shapes = {"kernel": (500, 2, 4), "content_bias": (2, 4), "position_bias": (2, 4)}
    params = encoding.init(jax.random.key(0), *SIDES, method="bias")["params"]
    assert jax.tree.map(jnp.shape, params) == shapes
    np.testing.assert_allclose(jnp.std(params["kernel"]), 0.3, rtol=0.05)
    small = TransformerXL().init(jax.random.key(0), *SIDES, method="bias")["params"]
    for leaf in jax.tree.leaves(small):
        assert 0.005 < float(jnp.std(leaf)) < 0.04


def test_biases_of_all_layers_or_in_each():
    sizes = Sizes(HEADS, HEADS, SIZE)
    assert TransformerXL().init(jax.random.key(0), sizes, method="shared") == {}
    tied = TransformerXL.tied()
    variables = tied.init(jax.random.key(0), sizes, method="shared")
    assert set(variables["params"]) == {"content_bias", "position_bias"}
    pair = tied.apply(variables, sizes, method="shared")
    own = tied.init(jax.random.key(0), *SIDES, pair, method="bias")
    assert set(own["params"]) == {"kernel"}


def test_an_odd_model_width_needs_a_width():
    side = Side(jnp.ones((1, 2, 1, 3)), PLACES[:, :2])
    with pytest.raises(ValueError, match=r"width is N \* H = 3 here; set an even `width`"):
        TransformerXL().init(jax.random.key(0), side, side, method="bias")
