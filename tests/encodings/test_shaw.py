import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax import dot_product_attention
from posjax.encodings import Shaw
from posjax.encodings.base import Side

LENGTH, HEADS, SIZE = 9, 2, 4


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


QUERY, KEY, VALUE = normal(0, 3, 1, LENGTH, HEADS, SIZE)
TABLES = {"key_table": normal(1, 7, SIZE), "value_table": normal(2, 7, SIZE)}


def output_of(encoding, tables, places, **settings):
    sides = Side(QUERY, places), Side(KEY, places)
    bias = encoding.apply({"params": tables}, *sides, method="bias")
    return dot_product_attention(QUERY, KEY, VALUE, bias, **settings)


def literal(tables, places, k, is_causal):
    """Equations 3 and 4 of the paper by loops, in float64."""
    q, key, value = (np.asarray(x[0], np.float64) for x in (QUERY, KEY, VALUE))
    a_key, a_value = (np.asarray(tables[n], np.float64) for n in ("key_table", "value_table"))
    output = np.zeros((1, LENGTH, HEADS, SIZE))
    for n, i in np.ndindex(HEADS, LENGTH):
        logits, values = [], []
        for j in range(i + 1 if is_causal else LENGTH):
            r = max(-k, min(k, places[j] - places[i])) + k
            logits.append(q[i, n] @ (key[j, n] + a_key[r]) / SIZE**0.5)
            values.append(value[j, n] + a_value[r])
        weights = np.exp(logits)
        output[0, i, n] = weights @ np.array(values) / weights.sum()
    return output


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("places", [list(range(LENGTH)), [0, 1, 2, 7, 8, 30, 31, 33, 34]])
def test_is_the_papers_attention(is_causal, places):
    got = output_of(Shaw(max_distance=3), TABLES, jnp.array([places]), is_causal=is_causal)
    np.testing.assert_allclose(got, literal(TABLES, places, 3, is_causal), atol=2e-6)


@pytest.mark.filterwarnings("ignore")
def test_keys_equal_hugging_face_wav2vec2_bert():
    """Clipped keys in a whole attention layer, without its projections."""
    reason = "compares with Hugging Face's code"
    torch = pytest.importorskip("torch", reason=reason)
    module = pytest.importorskip(
        "transformers.models.wav2vec2_bert.modeling_wav2vec2_bert", reason=reason
    )
    sizes = {"hidden_size": HEADS * SIZE, "num_attention_heads": HEADS}
    left_right = {f"{side}_max_position_embeddings": 3 for side in ("left", "right")}
    config = module.Wav2Vec2BertConfig(
        **sizes, **left_right, position_embeddings_type="relative_key", attention_dropout=0.0
    )
    layer = module.Wav2Vec2BertSelfAttention(config).eval()
    tensor = lambda x: torch.tensor(np.array(x))  # noqa: E731
    with torch.no_grad():
        layer.distance_embedding.weight.copy_(tensor(TABLES["key_table"]))
        query, key, value = (tensor(x).swapaxes(1, 2) for x in (QUERY, KEY, VALUE))
        _, bias = module._apply_relative_key_position_encoding(layer, query, key)
        weights = torch.softmax(query @ key.mT * SIZE**-0.5 + bias, dim=-1)
        want = (weights @ value).swapaxes(1, 2).numpy()
    got = output_of(
        Shaw(max_distance=3, with_values=False),
        {"key_table": TABLES["key_table"]},
        jnp.arange(LENGTH)[None],
    )
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_gradients_against_finite_differences():
    places = jnp.arange(LENGTH)[None]
    encoding = Shaw(max_distance=3)
    loss = jax.jit(lambda t: jnp.sum(jnp.sin(output_of(encoding, t, places, is_causal=True))))
    grads = jax.grad(loss)(TABLES)
    for name, grad in grads.items():
        direction, step = normal(5, 7, SIZE), 1e-2
        ends = [loss(TABLES | {name: TABLES[name] + sign * step * direction}) for sign in (1, -1)]
        numeric = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(jnp.sum(grad * direction), numeric, rtol=5e-3, err_msg=name)
        assert not grad[4:].any()  # rows of keys after the query


def test_depends_on_the_distance_only():
    places = jnp.arange(LENGTH)[None]
    run = jax.jit(lambda p: output_of(Shaw(max_distance=3), TABLES, p))
    for shift in (-(2**20), 1, 2**20):
        np.testing.assert_array_equal(run(places), run(places + shift))


def test_all_further_keys_are_alike():
    near = jnp.array([[0, 1, 2, 3, 4, 5, 6, 7, 20]])
    far = near.at[0, -1].set(5000)
    run = jax.jit(lambda p: output_of(Shaw(max_distance=3), TABLES, p, is_causal=True))
    np.testing.assert_array_equal(run(near), run(far))
    assert Shaw.beyond == "clips"


@pytest.mark.parametrize("per_head", [False, True])
def test_initial_values(per_head):
    encoding = Shaw(max_distance=200, per_head=per_head)
    side = Side(jnp.ones((1, 3, 2, 64)), jnp.arange(3)[None])
    tables = encoding.init(jax.random.key(0), side, side, method="bias")["params"]
    bound = (6 / (401 + 64)) ** 0.5
    for table in tables.values():
        assert table.shape == ((2, 401, 64) if per_head else (401, 64))
        assert 0.99 * bound < float(jnp.max(jnp.abs(table))) <= bound
        np.testing.assert_allclose(jnp.std(table), bound / 3**0.5, rtol=0.02)
    keys = Shaw.keys().init(jax.random.key(0), side, side, method="bias")
    assert jax.tree.map(jnp.shape, keys) == {"params": {"key_table": (33, 64)}}
