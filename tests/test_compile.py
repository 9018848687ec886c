"""Blockwise attention compiles for real TPUs and GPUs, and builds no [T, S] array there."""

import jax
import jax.numpy as jnp
import pytest

import posjax
from tests import aot

pytestmark = pytest.mark.usefixtures("optimised")
DEVICES = ("v5e:2x2", "v6e:2x2", "h200")
HEADS, SIZE, POSITIONS = 2, 64, 16


def arguments(length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Query, key, value and table."""
    x = jax.ShapeDtypeStruct((1, length, HEADS, SIZE), jnp.bfloat16)
    return x, x, x, jax.ShapeDtypeStruct((POSITIONS, SIZE), jnp.float32)


def forward(query, key, value, table):
    return posjax.dot_product_attention(
        query, key, value, posjax.ContextualBias(table), is_causal=True, implementation="xla"
    )


def gradient(*inputs):
    def loss(*inputs):
        return jnp.sum(forward(*inputs).astype(jnp.float32))

    return jax.grad(loss, argnums=(0, 1, 2, 3))(*inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [forward, gradient])
def test_compiles_and_builds_no_square_array(function, device):
    length = 4096
    square = HEADS * length * length * jnp.dtype(jnp.float32).itemsize
    executable = aot.compiled(function, aot.topology(device), *arguments(length))
    outputs = jax.tree.leaves(executable.out_info)
    assert len(outputs) == (4 if function is gradient else 1)
    for output, wanted in zip(outputs, arguments(length), strict=False):
        assert (output.shape, output.dtype) == (wanted.shape, wanted.dtype)
    assert executable.memory_analysis().temp_size_in_bytes < square / 4
