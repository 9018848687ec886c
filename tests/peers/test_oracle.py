"""Sinks, soft cap, lengths and the log-sum-exp in every implementation, against an oracle.

Values are compared with NumPy's in float64, gradients with those of a dense form.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from posjax import dot_product_attention
from posjax.kernels.blocks import Blocks, TpuBlocks
from tests import tolerances
from tests.peers import oracle

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
HAS_GPU_INTERPRETER = hasattr(plgpu, "InterpretGPUParams")

QUERIES, KEYS, HEADS, SIZE = 20, 36, 4, 16
SEGMENTS = tuple(np.arange(n)[None] // 15 + np.array([[0], [1]]) for n in (QUERIES, KEYS))
LENGTHS = np.array([13, 20]), np.array([36, 0])
# Sums in bfloat16 of numbers of order 1, with its 8 bits.
FORWARD = tolerances.FORWARD | {"bfloat16": 2e-2}
GRADIENT = tolerances.GRADIENT | {"bfloat16": 2e-2}
# Every other query sees nothing.
MASK = np.arange(QUERIES)[:, None] % 2 + np.zeros((2, 1, 1, KEYS), int) == 1

# name -> (settings of posjax, settings of `oracle.visible`)
RESTRICTIONS = {
    "none": ({}, {}),
    "causal": ({"is_causal": True}, {"is_causal": True}),
    "offset": (
        {"is_causal": True, "query_positions": np.arange(QUERIES) + KEYS - QUERIES},
        {"is_causal": True, "query_positions": np.arange(QUERIES) + KEYS - QUERIES},
    ),
    "window": ({"local_window_size": (3, 2)}, {"window": (3, 2)}),
    "segments": (
        dict(zip(("query_segment_ids", "key_segment_ids"), SEGMENTS, strict=True)),
        {"segments": SEGMENTS},
    ),
    "lengths": (
        dict(zip(("query_seq_lengths", "key_value_seq_lengths"), LENGTHS, strict=True)),
        {"lengths": LENGTHS},
    ),
    "mask": ({"mask": MASK}, {"mask": MASK}),
    "causal lengths": (
        {"is_causal": True, "key_value_seq_lengths": LENGTHS[1]},
        {"is_causal": True, "lengths": (None, LENGTHS[1])},
    ),
}
ARGUMENTS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "sinks": {"sinks": np.array([-2.0, 0.0, 1.0, 30.0], np.float32)},
    "soft cap": {"logits_soft_cap": 0.7},
    "bias": {"bias": np.sin(np.arange(HEADS * QUERIES * KEYS, dtype=np.float32) ** 2)},
    "all": {
        "scale": 0.3,
        "sinks": np.array([-2.0, 0.0, 1.0, 30.0], np.float32),
        "logits_soft_cap": 0.7,
        "bias": np.sin(np.arange(HEADS * QUERIES * KEYS, dtype=np.float32) ** 2),
    },
}
ARGUMENTS = {
    name: {n: x.reshape(1, HEADS, QUERIES, KEYS) if n == "bias" else x for n, x in settings.items()}
    for name, settings in ARGUMENTS.items()
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of queries and of keys."""
    monkeypatch.setattr("posjax.kernels.blocks.blockwise_sizes", lambda *_: Blocks(8, 16))
    tpu = TpuBlocks(query=128, key=256, memory=512)
    monkeypatch.setattr("posjax.kernels.tpu.attention.tpu_sizes", lambda *_, **__: tpu)


@contextlib.contextmanager
def interpreted(implementation: str):
    """Pallas's interpreter for the kernels of a chip; nothing for others."""
    if implementation == "tpu":
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
            yield
    elif implementation == "gpu":
        from posjax.kernels.interpreters import interpreted_gpu

        with interpreted_gpu(plgpu.InterpretGPUParams(detect_races=True)):
            yield
    else:
        yield


def inputs(size: int = SIZE, dtype: str = "float32") -> dict[str, jax.Array]:
    """Query, key and value with grouped heads."""
    shapes = {"query": (QUERIES, HEADS), "key": (KEYS, 2), "value": (KEYS, 2)}
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        name: jax.random.normal(key, (2, *shape, size)).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def loss(outputs: tuple[jax.Array, jax.Array]) -> jax.Array:
    """A number that depends on every output and on every finite log-sum-exp."""
    output, log_sum_exp = (x.astype(jnp.float32) for x in outputs)
    waves = [jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in outputs]
    seen = jnp.isfinite(log_sum_exp)
    return jnp.sum(output * waves[0]) + jnp.sum(jnp.where(seen, log_sum_exp, 0.0) * waves[1])


def check(
    implementation: str, argument: str, restriction: str, size: int = SIZE, dtype: str = "float32"
) -> None:
    """Values and gradients of output and log-sum-exp."""
    ours, theirs = RESTRICTIONS[restriction]
    extra, x = ARGUMENTS[argument], inputs(size, dtype)
    trained = {n: jnp.asarray(v) for n, v in extra.items() if isinstance(v, np.ndarray)}
    fixed = {n: v for n, v in extra.items() if n not in trained}
    allowed = oracle.visible(QUERIES, KEYS, **theirs)

    def call(x, trained):
        return dot_product_attention(
            **x, **trained, **fixed, **ours, return_residual=True, implementation=implementation
        )

    def dense(x, trained):
        return oracle.attention(**x, **trained, **fixed, allowed=allowed, xp=jnp)

    with interpreted(implementation):
        gradient = jax.value_and_grad(lambda *both: (loss(r := call(*both)), r), (0, 1), True)
        (_, got), got_grads = jax.jit(gradient)(x, trained)
    want = oracle.attention(**x, **extra, allowed=allowed)
    wide = {name: x.astype(jnp.float32) for name, x in x.items()}
    want_grads = jax.grad(lambda *both: loss(dense(*both)), (0, 1))(wide, trained)
    for tree, like, atol in ((got, want, FORWARD[dtype]), (got_grads, want_grads, GRADIENT[dtype])):
        flat = jax.tree_util.tree_leaves_with_path(like)
        for (path, w), g in zip(flat, jax.tree.leaves(tree), strict=True):
            size = max([1.0, *abs(np.asarray(w)[np.isfinite(w)])])
            name = jax.tree_util.keystr(path)
            np.testing.assert_allclose(
                g.astype(jnp.float32), w, rtol=0, atol=atol * size, err_msg=name
            )


def _matrix():
    """Everything with every restriction, and each argument alone with one of them."""
    yield from (("all", restriction) for restriction in RESTRICTIONS)
    yield from ((argument, "causal lengths") for argument in ARGUMENTS if argument != "all")
    yield "sinks", "mask"


@pytest.mark.parametrize("argument, restriction", list(_matrix()))
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_what_does_everything(implementation, argument, restriction):
    check(implementation, argument, restriction)


@pytest.mark.parametrize(
    "argument, restriction",
    [("plain", "none"), ("scale", "segments"), ("sinks", "offset"), ("sinks", "lengths")],
)
def test_tpu(argument, restriction):
    check("tpu", argument, restriction)


@pytest.mark.skipif(not HAS_GPU_INTERPRETER, reason="the interpreter came with jax 0.11.2")
@pytest.mark.parametrize("argument, restriction", [("plain", "causal"), ("sinks", "lengths")])
def test_gpu(argument, restriction):
    check("gpu", argument, restriction, size=64, dtype="bfloat16")


@pytest.mark.parametrize("implementation", ["tpu", "gpu", "jax", "cudnn"])
@pytest.mark.parametrize(
    "argument, restriction, words",
    [
        ("soft cap", "none", "have no logits_soft_cap"),
        ("bias", "none", "ArrayBias"),
        ("plain", "mask", "explicit mask|more than is_causal"),
    ],
)
def test_what_the_others_refuse(implementation, argument, restriction, words):
    """By name, and with one that can."""
    settings = ARGUMENTS[argument] | RESTRICTIONS[restriction][0]
    x = {name: x.astype(jnp.bfloat16) for name, x in inputs().items()}
    with pytest.raises(NotImplementedError, match=f'({words}).*use implementation="xla"'):
        dot_product_attention(**x, **settings, implementation=implementation)
