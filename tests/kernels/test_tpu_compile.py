"""The TPU kernels compile for real chips, fit, and stay where the mesh puts them."""

import jax
import jax.numpy as jnp
import pytest

import posjax
import posjax.kernels.tpu.attention
from posjax.encodings import CoPE
from posjax.kernels.blocks import TpuBlocks
from posjax.models import TransformerConfig
from tests import aot
from tests.steps import compiled_step

pytestmark = pytest.mark.usefixtures("optimised")
CHIPS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


@pytest.fixture
def small_blocks(monkeypatch):
    """Each tile is written out, so small ones compile in seconds."""
    sizes = TpuBlocks(128, 256, 512)
    monkeypatch.setattr(posjax.kernels.tpu.attention, "tpu_sizes", lambda *_, **__: sizes)


def attention(query, key, value, table, **settings):
    bias = None if table is None else posjax.ContextualBias(table)
    return posjax.dot_product_attention(
        query, key, value, bias, is_causal=True, implementation="tpu", **settings
    )


def gradient(*inputs):
    loss = lambda *inputs: jnp.sum(attention(*inputs).astype(jnp.float32))  # noqa: E731
    which = tuple(i for i, x in enumerate(inputs) if x is not None)
    return jax.grad(loss, argnums=which)(*inputs)


def arguments(length, heads=2, kv_heads=1, size=128, positions=64, dtype="bfloat16"):
    """Query, key, value and table."""
    array = lambda heads: jax.ShapeDtypeStruct((1, length, heads, size), dtype)  # noqa: E731
    table = jax.ShapeDtypeStruct((positions, size), jnp.float32)
    return array(heads), array(kv_heads), array(kv_heads), table


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_every_generation(chip, small_blocks):
    topology = aot.tpu_topology(chip)
    with aot.described(topology):
        executable = aot.compiled(gradient, topology, *arguments(1024))
    assert executable.as_text().count("posjax_attention_") >= 2


def linear(slopes, query_positions, key_positions):
    distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
    return -slopes[None, :, None, None] * jnp.abs(distance).astype(jnp.float32)


def relative_gradient(query, key, value, table, slopes):
    """With positions that are known when it runs, so that the program holds both ways."""
    bias = posjax.RelativeBias(linear, slopes, distance_only=True)
    bias = bias if table is None else posjax.BiasSum((posjax.ContextualBias(table), bias))
    loss = lambda bias: jnp.sum(  # noqa: E731
        posjax.dot_product_attention(
            query, key, value, bias, is_causal=True, implementation="tpu"
        ).astype(jnp.float32)
    )
    return jax.grad(loss)(bias)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_relative_biases_compile(chip, small_blocks):
    """Also added to CoPE, on one of the chips."""
    topology = aot.tpu_topology(chip)
    *inputs, table = arguments(1024)
    table = table if chip.startswith("v6e") else None
    slopes = jax.ShapeDtypeStruct((2,), jnp.float32)
    with aot.described(topology):
        executable = aot.compiled(relative_gradient, topology, *inputs, table, slopes)
    assert executable.as_text().count("posjax_attention_") >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"size": 64}, {"size": 80}, {"size": 256}, {"positions": 200}, {"dtype": "float32"}],
    ids=str,
)
def test_compiles_for_every_size_and_type(settings, small_blocks):
    topology = aot.tpu_topology("v5e:2x2")
    with aot.described(topology):
        executable = aot.compiled(gradient, topology, *arguments(1024, **settings))
    for output, wanted in zip(executable.out_info, arguments(1024, **settings), strict=True):
        assert (output.shape, output.dtype) == (wanted.shape, wanted.dtype)


@pytest.mark.slow
def test_a_long_sequence_fits_with_the_default_blocks():
    """16 heads of 128 over 32,768 tokens."""
    topology = aot.tpu_topology("v5e:2x2")
    inputs = arguments(32768, heads=16, kv_heads=8)
    with aot.described(topology):
        executable = aot.compiled(gradient, topology, *inputs)
    query_bytes = inputs[0].size * 2
    # Residuals, float32 gradients, and keys and values in the kernels' order.
    assert executable.memory_analysis().temp_size_in_bytes < 8 * query_bytes


@pytest.mark.slow
@pytest.mark.standard_promotion  # Flax's LayerNorm mixes dtypes
@pytest.mark.parametrize(
    "slice_, mesh", [("v5e:4x4", {"data": 16}), ("v5p:4x4x4", {"data": 16, "tensor": 4})]
)
def test_a_train_step_on_many_chips_has_no_collective_in_attention(slice_, mesh, small_blocks):
    config = TransformerConfig(layers=1, width=512, heads=4, dtype="bfloat16", implementation="tpu")
    encoding = CoPE(num_positions=16)
    text = compiled_step(aot.tpu_topology(slice_), mesh, config, encoding)
    assert text.count("posjax_attention_forward") and text.count("posjax_attention_backward")
    assert "all-reduce" in text  # of the parameters' gradients
    assert "all-to-all" not in text
