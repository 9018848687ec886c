"""The GPU kernels on a Hopper GPU: `JAX_PLATFORMS=cuda,cpu pytest -n 0 tests/kernels`.

Values and gradients of the cases of `test_gpu.py` and of longer ones, and the steps that Pallas's
interpreter cannot run. Without such a GPU the steps are compared in the form that it can run.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.kernels.gpu.tables import tables
from posjax.kernels.interpreters import interpreted_gpu
from tests.cases import problem, run_with_gradients
from tests.conftest import has_hopper
from tests.kernels import gpu_steps
from tests.kernels.test_gpu import CASE, CASES, CHOICES, assert_near, exactly

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
on_device = pytest.mark.skipif(not has_hopper(), reason="JAX sees no Hopper GPU")
LONG = {
    "long": {"queries": 1100, "keys": 1100, "positions": 64, "heads": 8, "kv_heads": 2},
    "long, heads of 128": {
        "queries": 1024, "keys": 1024, "positions": 128, "size": 128, "batch": 2, "heads": 4,
    },
}  # fmt: skip
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def exact_products():
    """Of the reference: no TF32."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def emulated():
    """False on a GPU; elsewhere True, and the interpreter runs the kernels."""
    if has_hopper():
        yield False
    elif not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("the interpreter came with jax 0.11.2")
    else:
        with interpreted_gpu(plgpu.InterpretGPUParams()):
            yield True


@on_device
@pytest.mark.parametrize("changes", (CASES | LONG).values(), ids=CASES | LONG)
def test_values_and_gradients(changes):
    case = dataclasses.replace(CASE, **changes)
    inputs, params = problem(case)
    assert_near(run_with_gradients(case, inputs, params, "gpu"), *exactly(case, inputs, params))


@on_device
@pytest.mark.parametrize("blocks, changes", CHOICES.values(), ids=CHOICES)
def test_choices_of_blocks(blocks, changes, monkeypatch):
    monkeypatch.setattr("posjax.kernels.gpu.attention.gpu_sizes", lambda *_: blocks)
    case = dataclasses.replace(CASE, **changes)
    inputs, params = problem(case)
    assert_near(run_with_gradients(case, inputs, params, "gpu"), *exactly(case, inputs, params))


@on_device
def test_same_bits_twice():
    case = dataclasses.replace(CASE, **LONG["long"])
    first, second = (run_with_gradients(case, *problem(case), "gpu") for _ in range(2))
    chex.assert_trees_all_equal(first, second)


@pytest.mark.parametrize("size, unit", [(64, 64.0), (128, 128.0), (64, 2.0)])
def test_sums_of_gates_are_exact(size, unit, emulated):
    """Whole multiples of U / 2^24 below P: no order of additions changes them."""
    whole = RANDOM.integers(0, 2**11, (gpu_steps.ROWS, size))
    exponents = RANDOM.integers(-24, -11, (gpu_steps.ROWS, size))
    gates = (whole * 2.0**exponents).astype(np.float16)  # up to 1 / 2, so that sums are below P
    gates[:, ::7] = 2.0**-24
    gates = np.where(np.cumsum(gates, 1) < 0.9, gates, np.float16(0))
    start = np.full((gpu_steps.ROWS, size), -0.5, np.float32)
    lower = jnp.tri(size, dtype=jnp.float16) * jnp.float16(unit)
    found = gpu_steps.sums(jnp.asarray(gates, jnp.float32), lower, start, emulated=emulated)
    want = np.float64(start) + np.float64(gates) @ np.tril(np.full((size, size), unit))
    np.testing.assert_array_equal(np.float64(found), np.float64(want.astype(np.float32)))
    assert np.any(gates == 2.0**-24) and np.any(gates > 0.1)


@pytest.mark.parametrize("paired", [False, True])
def test_reciprocals(paired, emulated):
    shape = (gpu_steps.ROWS, gpu_steps.KEYS)
    x = np.exp2(RANDOM.uniform(1, 60, shape)).astype(np.float32)
    x[0, :8] = [2.0, np.inf, np.inf, np.inf, 2.0**100, 64.0, 128.0, 2.0**62]
    found = gpu_steps.inverses(jnp.asarray(x), paired=paired, emulated=emulated)
    want = 1 / np.float64(x)
    want = np.maximum(want, 2.0**-63) if paired else want
    # The instruction is good to the last bit but one; a product rounds twice more.
    np.testing.assert_allclose(found, want, rtol=3 * 2.0**-23)


@pytest.mark.parametrize("row", [None, 0, 8, 31, 63])
def test_whether_all_reach(row, emulated):
    """One row that does not is enough."""
    x = np.full(gpu_steps.ROWS, 2.5, np.float32)
    if row is not None:
        x[row] = np.nextafter(np.float32(2.5), np.float32(0))
    found = gpu_steps.reached(jnp.asarray(x), 2.5, emulated=emulated)
    np.testing.assert_array_equal(found, np.full(gpu_steps.ROWS, row is None, np.float32))


def test_operands_that_a_warpgroup_stores(emulated):
    x, y = RANDOM.integers(-4, 5, (2, gpu_steps.ROWS, gpu_steps.ROWS))
    taken = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.bfloat16)
    found = gpu_steps.transposed_product(*taken, emulated=emulated)
    np.testing.assert_array_equal(found, x.T @ y)


@pytest.mark.parametrize("positions", [64, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_look_ups(packed, positions, emulated):
    z = RANDOM.standard_normal((gpu_steps.ROWS, positions)).astype(np.float32)
    z -= z[:, -1:]
    table = tables(jnp.asarray(z), packed)
    shape = (gpu_steps.ROWS, gpu_steps.KEYS)
    place = RANDOM.uniform(-0.5, positions - 1.25, shape).astype(np.float32)
    place[:, 0], place[:, 1] = -0.5, positions - 1.25
    values = gpu_steps.looked_up(table, jnp.asarray(place), packed=packed, emulated=emulated)
    count, bin_ = np.float64(place) + 0.5, np.round(np.float64(place)).astype(int)
    above = np.minimum(bin_ + 1, positions - 1)
    low, high = (np.take_along_axis(z, index, 1) for index in (bin_, above))
    bias = low + (count - bin_) * np.float64(high - low)
    # Half precision of middles and slopes; or float32 at offsets of up to P slopes.
    limit = 2.0**-7 if packed else 2.0**-23 * 4 * positions
    np.testing.assert_allclose(values.bias, bias, atol=limit * np.max(np.abs(z)), rtol=0)
    np.testing.assert_allclose(values.slope, high - low, atol=limit * 8, rtol=0)
    np.testing.assert_array_equal(values.fraction, place - np.round(place))
