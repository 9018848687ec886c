"""The GPU kernels through the compiler for an H200: they lower and fit.

No numbers come of it; those are in `test_gpu.py`. `test_gpu_code.py` compiles heads of 128.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import posjax
from posjax.encodings import CoPE
from posjax.kernels.blocks import GpuBlocks
from posjax.kernels.gpu.tables import table_words
from posjax.models import TransformerConfig
from tests import aot
from tests.cases import linear
from tests.kernels import gpu_steps
from tests.steps import compiled_step

pytestmark = pytest.mark.usefixtures("optimised")


def attention(query, key, value, bias, segments):
    return posjax.dot_product_attention(
        query, key, value, bias, is_causal=True, query_segment_ids=segments, implementation="gpu"
    )


def gradient(*inputs):
    loss = lambda *inputs: jnp.sum(attention(*inputs).astype(jnp.float32))  # noqa: E731
    return jax.grad(loss, argnums=(0, 1, 2, 3), allow_int=True)(*inputs)


def arguments(
    size=128, positions=64, dtype="bfloat16", own_gate_key=False, length=500, relative=False
):
    """Of shapes that no block divides; `positions` 0: no contextual bias."""
    array = lambda heads: jax.ShapeDtypeStruct((2, length, heads, size), dtype)  # noqa: E731
    bias = None
    if positions:
        bias = posjax.ContextualBias(
            jax.ShapeDtypeStruct((positions, size), jnp.float32),
            gate_key=array(2) if own_gate_key else None,
            gate_bias=jax.ShapeDtypeStruct((4,), jnp.float32),
        )
    if relative:
        slopes = jax.ShapeDtypeStruct((4,), jnp.float32)
        distance = posjax.RelativeBias(linear, slopes, distance_only=True)
        bias = distance if bias is None else posjax.BiasSum((bias, distance))
    segments = jax.ShapeDtypeStruct((2, length), jnp.int32) if own_gate_key else None
    return array(4), array(2), array(2), bias, segments


def test_single_steps_compile():
    """The steps that only a GPU runs, in `test_gpu_device.py`."""
    topology = aot.h200_topology()
    array = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    square = array(gpu_steps.ROWS, gpu_steps.KEYS)
    lower = array(128, 128, dtype="float16")
    with aot.described(topology):
        for paired in (False, True):
            step = functools.partial(gpu_steps.inverses, paired=paired)
            assert aot.compiled(step, topology, square)
        assert aot.compiled(gpu_steps.sums, topology, square, lower, square)
        reached = functools.partial(gpu_steps.reached, least=2.5)
        assert aot.compiled(reached, topology, array(gpu_steps.ROWS))
        operands = array(gpu_steps.ROWS, gpu_steps.ROWS), array(64, 64, dtype="bfloat16")
        assert aot.compiled(gpu_steps.transposed_product, topology, *operands)
        for packed in (False, True):
            step = functools.partial(gpu_steps.looked_up, packed=packed)
            table = array(gpu_steps.ROWS, table_words(64, packed))
            assert aot.compiled(step, topology, table, square)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(
    "positions, own_gate_key", [(0, False), (64, False), (64, True), (128, False), (128, True)]
)
@pytest.mark.parametrize("size", [64, 128])
def test_everything_fits_into_shared_memory(size, positions, own_gate_key, relative):
    """Traced only, which says how much a kernel takes."""
    inputs = arguments(size, positions, "bfloat16", own_gate_key, 500, relative)
    with aot.described(aot.h200_topology()):
        outputs = jax.eval_shape(gradient, *inputs)
    assert jax.tree.map(jnp.shape, outputs) == jax.tree.map(jnp.shape, inputs[:4])


def test_too_much_shared_memory_is_named(monkeypatch):
    blocks = GpuBlocks(key=128, count=64, stages=4)
    monkeypatch.setattr("posjax.kernels.gpu.attention.gpu_sizes", lambda *_: blocks)
    with (
        aot.described(aot.h200_topology()),
        pytest.raises(ValueError, match=r"shared memory.*stages"),
    ):
        jax.eval_shape(lambda *x: gradient(*x), *arguments())


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, blocks",
    [
        (64, GpuBlocks(key=64, count=64, stages=4, packed=False, paired=True, ping_pong=True)),
        (64, GpuBlocks(count=128, packed=False, paired=True)),
        (128, GpuBlocks(paired=True, ping_pong=True)),
    ],
    ids=str,
)
def test_choices_compile(size, blocks, monkeypatch):
    monkeypatch.setattr("posjax.kernels.gpu.attention.gpu_sizes", lambda *_: blocks)
    topology, inputs = aot.h200_topology(), arguments(size)
    with aot.described(topology):
        executable = aot.compiled(attention, topology, *inputs)
    assert executable.out_info.shape == inputs[0].shape


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"size": 64, "positions": 128, "dtype": "float16"},
        {"size": 80, "own_gate_key": True, "relative": True},
        {"positions": 0},
        {"size": 64, "positions": 0, "relative": True},
    ],
    ids=str,
)
def test_compiles(settings):
    topology, inputs = aot.h200_topology(), arguments(**settings)
    with aot.described(topology):
        executable = aot.compiled(gradient, topology, *inputs)
    for output, wanted in zip(
        jax.tree.leaves(executable.out_info), jax.tree.leaves(inputs[:4]), strict=True
    ):
        assert (output.shape, output.dtype) == (wanted.shape, wanted.dtype)


@pytest.mark.slow
@pytest.mark.standard_promotion  # Flax's LayerNorm mixes dtypes
def test_a_train_step_on_eight_gpus_has_no_collective_in_attention():
    """Batches and heads over a mesh, activations recomputed (`jax.checkpoint`)."""
    config = TransformerConfig(
        layers=1, width=512, heads=4, dtype="bfloat16", implementation="gpu", remat=True
    )
    mesh, encoding = {"data": 4, "tensor": 2}, CoPE(num_positions=16)
    topology = aot.h200_topology(gpus=8)
    with aot.described(topology):
        text = compiled_step(topology, mesh, config, encoding)
    assert "mosaic_gpu" in text
    kinds = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    assert [kind for kind in kinds if kind in text] == []
    assert "all-reduce" in text  # of the parameters' gradients
