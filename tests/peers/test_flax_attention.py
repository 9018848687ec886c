"""The `attention_fn` of Flax's attention layers, Linen and NNX, without an adapter.

What is documented to differ: a query that sees nothing gives 0 (Flax: the mean of the values);
softmax is float32 in every type; the pairs that are dropped are others than Flax's for a key.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posjax import dot_product_attention
from tests import tolerances

LENGTH, HEADS, WIDTH = 12, 4, 32
FORWARD, GRADIENT = tolerances.FORWARD["float32"], tolerances.GRADIENT["float32"]
reference, xla = (
    functools.partial(dot_product_attention, implementation=name) for name in ("reference", "xla")
)
OURS = pytest.mark.parametrize(
    "attention", [dot_product_attention, xla, reference], ids=["default", "xla", "reference"]
)


def normal(number: int, *shape: int, dtype: str = "float32") -> jax.Array:
    """Random numbers, the same for the same number."""
    return jax.random.normal(jax.random.key(number), shape).astype(dtype)


X = normal(0, 2, LENGTH, WIDTH)
WORDS = jnp.array([[1] * 9 + [0] * 3, [1] * LENGTH])
PACKED = jnp.array([[0] * 5 + [1] * 7, [0] * LENGTH])
MASKS = {
    "none": lambda: None,
    "causal, float": lambda: nn.make_causal_mask(WORDS),
    "causal, bool": lambda: nn.make_causal_mask(WORDS, dtype=bool),
    "padding": lambda: nn.make_attention_mask(jnp.ones_like(WORDS), WORDS),
    "segments": lambda: nn.make_attention_mask(PACKED, PACKED, jnp.equal, dtype=bool),
    "combined": lambda: nn.combine_masks(
        nn.make_causal_mask(WORDS), nn.make_attention_mask(PACKED, PACKED, jnp.equal), dtype=bool
    ),
    "combined, float": lambda: nn.combine_masks(
        nn.make_causal_mask(WORDS), nn.make_attention_mask(jnp.ones_like(WORDS), WORDS)
    ),
    "integers": lambda: nn.make_causal_mask(WORDS, dtype=jnp.int32),
    "fewer axes": lambda: np.tri(LENGTH, dtype=bool),
}


def linen(attention, **settings):
    """A Linen layer; Flax's own attention for None."""
    own = {} if attention is None else {"attention_fn": attention}
    return nn.MultiHeadDotProductAttention(num_heads=HEADS, **own, **settings)


def in_nnx(attention, **settings):
    """An NNX layer with the same parameters each time."""
    own = {} if attention is None else {"attention_fn": attention}
    sizes = {"num_heads": HEADS, "in_features": WIDTH, "decode": False}
    return nnx.MultiHeadAttention(**sizes | own | settings, rngs=nnx.Rngs(0))


def near(got, want, atol: float) -> None:
    """All arrays of two trees, in their types."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        np.testing.assert_allclose(np.asarray(g, np.float32), np.asarray(w, np.float32), atol=atol)


def with_gradients(layer, variables, *inputs, **settings):
    """The output, and gradients of parameters and inputs, compiled."""

    def loss(params, *inputs):
        output = layer.apply({"params": params}, *inputs, **settings)
        wave = jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape)
        return jnp.sum(output.astype(jnp.float32) * wave), output

    compute = jax.value_and_grad(loss, argnums=tuple(range(1 + len(inputs))), has_aux=True)
    (_, output), gradients = jax.jit(compute)(variables["params"], *inputs)
    return output, gradients


@pytest.mark.parametrize("name", MASKS)
def test_linen(name):
    variables = linen(None).init(jax.random.key(1), X)
    call = lambda attention: with_gradients(linen(attention), variables, X, mask=MASKS[name]())  # noqa: E731
    want = call(None)
    for attention in (dot_product_attention, xla, reference):
        for got, like, atol in zip(call(attention), want, (FORWARD, GRADIENT), strict=True):
            near(got, like, atol)


@pytest.mark.parametrize("name", MASKS)
@OURS
def test_nnx(attention, name):
    """NNX calls `jax.nn.dot_product_attention` itself if nothing is dropped."""

    def call(attention):
        @nnx.jit
        def compute(layer, x, mask):
            wave = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
            loss = lambda layer, x: jnp.sum(layer(x, mask=mask) * wave)  # noqa: E731
            return layer(x, mask=mask), nnx.grad(loss, argnums=(0, 1))(layer, x)

        # For four axes alone.
        mask = MASKS[name]()
        return compute(
            in_nnx(attention),
            X,
            None if mask is None else jnp.asarray(mask)[None, None] if mask.ndim == 2 else mask,
        )

    for got, want, atol in zip(call(attention), call(None), (FORWARD, GRADIENT), strict=True):
        near(got, want, atol)


@OURS
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 2)], ids=str)
def test_any_number_of_batch_axes(attention, batch):
    x = normal(2, *batch, LENGTH, WIDTH)
    mask = nn.make_causal_mask(x[..., 0])
    variables = linen(None).init(jax.random.key(1), x)
    got, want = (linen(a).apply(variables, x, mask=mask) for a in (attention, None))
    near(got, want, FORWARD)
    if batch:
        near(in_nnx(attention)(x, mask=mask), in_nnx(None)(x, mask=mask), FORWARD)


@OURS
@pytest.mark.parametrize(
    "dtype, param_dtype", [("bfloat16", "float32"), ("float16", "float32"), (None, "bfloat16")]
)
@pytest.mark.parametrize("precision", [None, "highest"])
@pytest.mark.standard_promotion
def test_types(attention, dtype, param_dtype, precision):
    settings = {
        "dtype": dtype, "param_dtype": param_dtype, "precision": precision,
        "force_fp32_for_softmax": True,
    }  # fmt: skip
    variables = linen(None, **settings).init(jax.random.key(1), X)
    got, want = (
        linen(a, **settings).apply(variables, X, mask=MASKS["causal, float"]())
        for a in (attention, None)
    )
    near(got, want, 2e-2)


def test_cross_attention_and_other_sizes():
    keys = normal(3, 2, 7, 24)
    settings = {"qkv_features": 16, "out_features": 8}
    variables = linen(None, **settings).init(jax.random.key(1), X, keys)
    want = with_gradients(linen(None, **settings), variables, X, keys)
    for attention in (dot_product_attention, xla, reference):
        got = with_gradients(linen(attention, **settings), variables, X, keys)
        near(got, want, GRADIENT)


@OURS
def test_linen_decodes_from_its_cache(attention):
    layer = linen(attention, decode=True)
    variables = layer.init(jax.random.key(1), X)
    cache, params = variables["cache"], {"params": variables["params"]}
    step = jax.jit(lambda cache, x: layer.apply(params | {"cache": cache}, x, mutable=["cache"]))
    outputs = []
    for place in range(LENGTH):
        output, changed = step(cache, X[:, place : place + 1])
        cache = changed["cache"]
        outputs.append(output)
    want = linen(None).apply(params, X, mask=nn.make_causal_mask(X[..., 0]))
    near(jnp.concatenate(outputs, axis=1), want, FORWARD)


@OURS
def test_nnx_decodes_from_its_cache(attention):
    layer = in_nnx(attention)
    want = in_nnx(None)(X, mask=nn.make_causal_mask(X[..., 0]))
    layer.init_cache(X.shape)
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    outputs = [step(layer, X[:, place : place + 1]) for place in range(LENGTH)]
    near(jnp.concatenate(outputs, axis=1), want, FORWARD)


@pytest.mark.parametrize("heads", [1, 2, HEADS])
@OURS
def test_nnx_is_causal_and_has_grouped_heads(attention, heads):
    got, want = (in_nnx(a, num_kv_heads=heads)(X, is_causal=True) for a in (attention, None))
    near(got, want, FORWARD)


@pytest.mark.parametrize("name", MASKS)
def test_weights_are_sown(name):
    variables, mask = linen(None).init(jax.random.key(1), X), MASKS[name]()
    sow = {"mask": mask, "sow_weights": True, "mutable": ["intermediates"]}
    (got, sown), (want, like) = (
        jax.jit(lambda v, a=a: linen(a).apply(v, X, **sow))(variables)
        for a in (dot_product_attention, None)
    )
    near(got, want, FORWARD)
    near(sown, like, FORWARD)
    with pytest.raises(NotImplementedError, match="no weights to give to a module"):
        linen(xla).apply(variables, X, **sow)


def test_nnx_weights_are_sown():
    settings = {"mask": MASKS["causal, bool"](), "sow_weights": True}
    got, want = (
        nnx.capture(in_nnx(a), nnx.Intermediate)(X, **settings)
        for a in (dot_product_attention, None)
    )
    near(got, want, FORWARD)


@OURS
def test_dropout_in_linen(attention):
    layer = linen(attention, dropout_rate=0.4)
    variables = linen(None).init(jax.random.key(1), X)
    settings = {"deterministic": False}
    apply = jax.jit(lambda key: layer.apply(variables, X, **settings, rngs={"dropout": key}))
    kept = linen(None).apply(variables, X)
    draws = [apply(jax.random.key(number)) for number in range(2)]
    assert not jnp.allclose(draws[0], draws[1], atol=1e-2)
    assert not jnp.allclose(draws[0], kept, atol=1e-2)
    near(apply(jax.random.key(0)), draws[0], 0)
    near(layer.apply(variables, X, deterministic=True), kept, FORWARD)
    # The mean over draws, with the error of so many.
    many = jax.vmap(apply)(jax.random.split(jax.random.key(2), 1000))
    error = jnp.std(many, axis=0) / 1000**0.5
    assert jnp.max(jnp.abs(jnp.mean(many, axis=0) - kept) / error) < 5
    assert jnp.mean(jnp.abs(jnp.mean(many, axis=0) - kept) / error) < 1


@OURS
def test_dropout_in_nnx(attention):
    def call(attention, seed):
        layer = in_nnx(attention, dropout_rate=0.4, deterministic=False)
        return nnx.jit(lambda layer, rngs: layer(X, rngs=rngs))(layer, nnx.Rngs(seed))

    first, again, other = (call(attention, seed) for seed in (0, 0, 1))
    near(again, first, 0)
    assert not jnp.allclose(other, first, atol=1e-2)


def identity_weights(attention, **settings) -> jax.Array:
    """The weights after dropout, [B, N, T, S], of equal logits."""
    query = jnp.zeros((3, LENGTH, HEADS, LENGTH))
    value = jnp.broadcast_to(jnp.eye(LENGTH)[None, :, None], query.shape)
    weights = attention(query, query, value, dropout_rng=jax.random.key(7), **settings)
    return jnp.swapaxes(weights, 1, 2)


@pytest.mark.parametrize("raw", [False, True], ids=["typed key", "raw key"])
@pytest.mark.parametrize("attention", [xla, reference], ids=["xla", "reference"])
def test_which_weights_are_dropped(attention, raw):
    """With a share near the rate, the rest scaled; the same for all heads only if broadcast."""
    rng = jax.random.PRNGKey(7) if raw else jax.random.key(7)
    attention = functools.partial(attention, dropout_rng=rng)
    call = lambda **settings: jax.jit(  # noqa: E731
        lambda: identity_weights(lambda *x, dropout_rng, **s: attention(*x, **s), **settings)
    )()
    shared = call(dropout_rate=0.25)
    assert jnp.all(shared == shared[:1, :1])
    own = call(dropout_rate=0.25, broadcast_dropout=False)
    flat = own.reshape(-1, LENGTH, LENGTH)
    pairs = jnp.any(flat[:, None] != flat[None], axis=(2, 3))
    assert jnp.all(pairs | jnp.eye(len(flat), dtype=bool))
    for weights in (shared, own):
        expected = [0.0, 1 / LENGTH / 0.75]
        assert jnp.all(jnp.isclose(weights, expected[0]) | jnp.isclose(weights, expected[1]))
    assert 0.2 < jnp.mean(own == 0) < 0.3
    assert jnp.all(call(dropout_rate=1.0) == 0)
    np.testing.assert_allclose(call(dropout_rate=0.0), 1 / LENGTH, rtol=1e-6)
    np.testing.assert_allclose(call(dropout_rate=0.5, deterministic=True), 1 / LENGTH, rtol=1e-6)


@pytest.mark.parametrize("broadcast", [False, True])
def test_gradients_with_dropout(broadcast):
    """Those of the blockwise form are the dense form's, whose dropout is a plain product."""
    settings = {"dropout_rate": 0.3, "broadcast_dropout": broadcast, "deterministic": False}
    variables = linen(None).init(jax.random.key(1), X)
    rngs = {"rngs": {"dropout": jax.random.key(3)}, "mask": MASKS["causal, float"]()}
    got, want = (
        with_gradients(linen(a, **settings), variables, X, **rngs) for a in (xla, reference)
    )
    near(got, want, GRADIENT)


def test_dropout_without_a_key_and_kernels_without_dropout():
    query = jnp.ones((1, 8, 2, 4))
    with pytest.raises(ValueError, match="dropout_rng is None; it must be a random key"):
        dot_product_attention(query, query, query, dropout_rate=0.1)
    settings = {"dropout_rng": jax.random.key(0), "dropout_rate": 0.1}
    for name in ("tpu", "gpu", "jax", "cudnn"):
        narrow = query.astype(jnp.bfloat16)
        with pytest.raises(NotImplementedError, match=r"no attention dropout.*xla"):
            dot_product_attention(narrow, narrow, narrow, **settings, implementation=name)
