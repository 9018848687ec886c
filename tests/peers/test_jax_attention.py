"""In the place of `jax.nn.dot_product_attention`, for all that jax's own suite tries.

That suite has 24 cases: values and gradients in narrow types for grouped heads, with and without
`jax.vmap` (12); masks, biases, lengths and windows, alone and together (8); gradients of biases
that are broadcast (4). Ours are float32, so that tolerances are narrow; the types are tried, too.

What is documented to differ: a query that sees nothing gives 0 (jax: the mean of the values), and
its log-sum-exp is -inf; the log-sum-exp is float32 (jax: in query's dtype) and has gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax import dot_product_attention
from tests import tolerances
from tests.peers import oracle

BATCH, QUERIES, KEYS, HEADS, SIZE = 2, 24, 24, 4, 16
IMPLEMENTATIONS = [None, "xla", "reference"]
# Both round the output, and jax the weights, too, to 8 or 11 bits.
NARROW = {"bfloat16": 2e-2, "float16": 4e-3}
SHAPES = {"query": (QUERIES, HEADS), "key": (KEYS, HEADS), "value": (KEYS, HEADS)}


def normal(number: int, *shape: int, dtype: str = "float32") -> jax.Array:
    """Random numbers, the same for the same number."""
    return jax.random.normal(jax.random.key(number), shape).astype(dtype)


def inputs(
    *, groups: int = 1, dtype: str = "float32", batch: tuple[int, ...] = (BATCH,), **lengths
):
    """Query, key and value."""
    heads = {"query": HEADS, "key": HEADS // groups, "value": HEADS // groups}
    sizes = {"query": QUERIES, "key": KEYS, "value": KEYS} | lengths
    return [
        normal(number, *batch, sizes[name], heads[name], SIZE, dtype=dtype)
        for number, name in enumerate(heads)
    ]


def compare(call, arguments, atol: float, gradient: float | None = None) -> None:
    """Results and gradients of all that is floating-point, for one random cotangent.

    A log-sum-exp is compared, too, but not its gradients, for which jax gives 0.

    Args:
        call: maps an attention function to a function of the arguments.
    """

    def everything(attention):
        def function(*x):
            result = call(attention)(*x)
            return result if isinstance(result, tuple) else (result, None)

        output, back, residual = jax.vjp(function, *arguments, has_aux=True)
        return (output, residual), back(normal(9, *output.shape, dtype=output.dtype))

    # JAX's own mixes types if they are narrow, and has none for float16 on CPUs in a `jax.jit`.
    jitted = jax.jit(everything, static_argnums=0)
    with jax.numpy_dtype_promotion("standard"):
        run = everything if arguments[0].dtype == jnp.float16 else jitted
        want = run(jax.nn.dot_product_attention)
    for implementation in IMPLEMENTATIONS:
        got = jitted(functools.partial(dot_product_attention, implementation=implementation))
        for mine, other, tolerance in zip(got, want, (atol, gradient or 10 * atol), strict=True):
            for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                if a.dtype != jax.dtypes.float0:
                    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
                    largest = tolerance * max(1, abs(b).max())
                    np.testing.assert_allclose(a, b, rtol=0, atol=largest, err_msg=implementation)


@pytest.mark.parametrize("use_vmap", [False, True], ids=["batch", "vmap"])
@pytest.mark.parametrize(
    ("dtype", "groups"),
    [*(("float32", groups) for groups in (1, 2, 4)), ("bfloat16", 2), ("float16", 4)],
)
def test_types_groups_and_vmap(dtype, groups, use_vmap):
    def call(attention):
        return jax.vmap(attention, in_axes=(0, 0, 0, None, None)) if use_vmap else attention

    atol = tolerances.FORWARD["float32"] if dtype == "float32" else NARROW[dtype]
    compare(call, (*inputs(groups=groups, dtype=dtype), None, None), atol, 2 * atol)


CAUSAL = np.tri(QUERIES, KEYS, dtype=bool)[None, None]
PADDED = {
    "query_seq_lengths": np.array([QUERIES // 2, QUERIES // 4], np.int32),
    "key_value_seq_lengths": np.array([KEYS // 4, KEYS // 2], np.int32),
}
BIAS = normal(3, 1, HEADS, QUERIES, KEYS)
MASKS = {
    "bias": {"bias": BIAS},
    "causal": {"is_causal": True},
    "padding": PADDED,
    "custom": {"mask": CAUSAL},
    "causal, padding": PADDED | {"is_causal": True},
    "custom, padding": PADDED | {"mask": CAUSAL},
    "bias, causal": {"bias": BIAS, "is_causal": True},
    "causal, window": {"is_causal": True, "local_window_size": (3, 2)},
    "window": {"local_window_size": (3, 0)},
    "window to both sides": {"local_window_size": 4},
    "custom, causal": {"mask": CAUSAL[..., ::-1, ::-1], "is_causal": True},
    "everything": PADDED
    | {"bias": BIAS, "mask": CAUSAL, "is_causal": True, "local_window_size": (5, 5), "scale": 0.3},
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    settings = dict(MASKS[name])
    arrays = [settings.pop("bias", None), settings.pop("mask", None)]
    lengths = [settings.pop(name, None) for name in PADDED]
    lengths = [x if x is None else jnp.asarray(x) for x in lengths]
    # Both give 0 beyond the lengths of queries, but jax looks at no key there in its gradients.
    seen = _seen(arrays[1], lengths, settings)

    def call(attention):
        def function(query, key, value, bias, mask, *lengths):
            output = attention(
                query, key, value, bias, mask, **dict(zip(PADDED, lengths, strict=True)),
                **settings,
            )  # fmt: skip
            return jnp.where(seen, output, 0.0)

        return function

    compare(call, (*inputs(), *arrays, *lengths), tolerances.FORWARD["float32"])


def _seen(mask, lengths, settings) -> np.ndarray:
    """Queries that see some key, [B, T, 1, 1]."""
    window = settings.get("local_window_size")
    pair = (window, window) if isinstance(window, int) else window
    causal = settings.get("is_causal", False)
    visible = oracle.visible(
        QUERIES, KEYS, mask=mask, is_causal=causal, window=pair, lengths=tuple(lengths)
    )
    return np.any(visible, axis=(-3, -1))[..., None, None]


@pytest.mark.parametrize("use_vmap", [False, True], ids=["batch", "vmap"])
@pytest.mark.parametrize("batch", [1, 5])
def test_gradients_of_biases(batch, use_vmap):
    """With one input for query, key and value, and a mask of fewer axes, in bfloat16."""

    def call(attention):
        def function(x, bias, mask):
            return attention(x, x, x, bias, mask)

        return jax.vmap(function, in_axes=(0, 0, None)) if use_vmap else function

    arguments = (
        normal(0, batch, QUERIES, HEADS, SIZE, dtype="bfloat16"),
        normal(1, batch, HEADS, QUERIES, QUERIES, dtype="bfloat16"),
        jnp.ones((1, 1, QUERIES), bool),
    )
    compare(call, arguments, NARROW["bfloat16"], 4e-2)


@pytest.mark.parametrize(
    "shape",
    [
        (QUERIES, KEYS), (KEYS,), (1,), (HEADS, 1, 1), (HEADS, QUERIES, 1), (1, QUERIES, 1),
        (BATCH, 1, 1, 1), (BATCH, 1, 1, KEYS), (BATCH, 1, QUERIES, KEYS), (1, HEADS, 1, KEYS),
        (1, 1, QUERIES, KEYS), (BATCH, HEADS, QUERIES, KEYS), (),
    ],
    ids=str,
)  # fmt: skip
def test_masks_and_biases_that_broadcast(shape):
    bias, mask = normal(4, *shape), normal(5, *shape) < 0.7
    if KEYS in shape[-1:]:
        mask = mask.at[..., 0].set(True)

    def call(attention):
        # Rows that see nothing are compared elsewhere.
        full = jnp.broadcast_to(mask, (BATCH, HEADS, QUERIES, KEYS))
        seen = jnp.swapaxes(jnp.any(full, axis=-1), 1, 2)[..., None]
        return lambda query, key, value, bias: jnp.where(
            seen, attention(query, key, value, bias, mask), 0.0
        )

    compare(call, (*inputs(groups=2), bias), tolerances.FORWARD["float32"])


@pytest.mark.parametrize("bias_shape", [None, (HEADS, QUERIES, KEYS), (1, HEADS, 1, KEYS), (KEYS,)])
def test_without_a_batch(bias_shape):
    bias = None if bias_shape is None else normal(4, *bias_shape)
    arguments = *inputs(batch=()), bias

    def call(attention):
        def function(query, key, value, bias):
            return attention(query, key, value, bias, return_residual=True, is_causal=True)

        return function

    compare(call, arguments, tolerances.FORWARD["float32"])


@pytest.mark.parametrize("queries, keys", [(1, 24), (7, 24), (24, 7)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_other_numbers_of_queries_than_keys(queries, keys, is_causal):
    """Query i has position i in both, also with fewer queries than keys."""

    def call(attention):
        return lambda *x: attention(*x, is_causal=is_causal, return_residual=True)

    arguments = inputs(query=queries, key=keys, value=keys)
    compare(call, arguments, tolerances.FORWARD["float32"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_residual(implementation):
    """Float32 from float32 and narrow inputs; for rows that see nothing -inf."""
    query, key, value = inputs(dtype="bfloat16", groups=2)
    lengths = jnp.array([KEYS, 0])
    output, residual = dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, return_residual=True,
        implementation=implementation,
    )  # fmt: skip
    assert (output.dtype, residual.dtype) == (jnp.bfloat16, jnp.float32)
    assert jnp.all(output[1] == 0) and jnp.all(residual[1] == -jnp.inf)
    wide = [x.astype(jnp.float32) for x in (query, key, value)]
    want = jax.nn.dot_product_attention(*wide, return_residual=True)
    np.testing.assert_allclose(residual[0], want[1][0], rtol=0, atol=NARROW["bfloat16"])


@pytest.mark.parametrize("attention", [dot_product_attention, jax.nn.dot_product_attention])
@pytest.mark.parametrize(
    "change",
    [
        {"key": (BATCH, KEYS, HEADS, SIZE + 1)},
        {"key": (BATCH, KEYS, 3, SIZE), "value": (BATCH, KEYS, 3, SIZE)},
        {"value": (BATCH, KEYS + 1, HEADS, SIZE)},
        {"query": (BATCH + 1, QUERIES, HEADS, SIZE)},
        {"bias": (BATCH, HEADS, QUERIES, KEYS + 1)},
        {"mask": (BATCH, HEADS, QUERIES + 1, KEYS)},
        {"key_value_seq_lengths": (BATCH + 1,)},
    ],
    ids=str,
)
def test_shapes_that_do_not_fit(attention, change):
    """Both refuse them."""
    names = ("query", "key", "value")
    arguments = dict(zip(names, inputs(), strict=True))
    made = {name: jnp.ones(shape) for name, shape in change.items()}
    if "mask" in made:
        made["mask"] = made["mask"] == 1
    if "key_value_seq_lengths" in made:
        made["key_value_seq_lengths"] = made["key_value_seq_lengths"].astype(jnp.int32)
    with pytest.raises((ValueError, TypeError)):
        attention(**arguments | made)
