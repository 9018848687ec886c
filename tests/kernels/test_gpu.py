"""The GPU kernels in Pallas's interpreter: values and all gradients against the reference.

All of their control flow runs: warpgroups, transfers, barriers, loops. A few steps are emulated,
see `kernels.gpu.products`. The interpreter raises if a transfer races with a use of its memory.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import posjax
from posjax.kernels.blocks import GpuBlocks
from tests import tolerances
from tests.cases import Case, arrays, linear, problem, run, run_with_gradients, with_gradients

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="the interpreter came with jax 0.11.2"
)
# Keys enough for blocks that are masked, that count, and that are plain attention.
CASE = Case(
    bias="cope", batch=1, queries=100, keys=384, heads=2, kv_heads=1, size=64, positions=12,
    offset=True, dtype="bfloat16",
)  # fmt: skip


@pytest.fixture
def interpreter():
    from posjax.kernels.interpreters import interpreted_gpu

    with interpreted_gpu(plgpu.InterpretGPUParams(detect_races=True)):
        yield


def assert_near(got, want, spread=None) -> None:
    """Within the tolerance of each array's size; the gradient of the gate bias, of its `spread`."""
    for (path, w), g in zip(
        jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True
    ):
        name = jax.tree_util.keystr(path)
        size = jnp.sqrt(jnp.mean(w**2))
        error = jnp.sqrt(jnp.mean((g.astype(jnp.float32) - w) ** 2))
        if "table" in name:
            size *= 2  # a sum over all queries of both signs
        if "gate_bias" in name:
            size = 3 * jnp.max(spread)
        assert error <= tolerances.NARROW_RMS * size, name


def spread_over_queries(case: Case, inputs: dict, params: dict):
    """Root of the sum of squares of what each query adds to the gradient of the gates' bias.

    They have both signs and leave little of each other, so the sum is no measure of its error.
    """
    if "gate_bias" not in params:
        return None

    def per_query(gate_bias):
        output = run(case, inputs, params | {"gate_bias": gate_bias}, "reference")
        weights = jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape)
        return jnp.sum(output * weights, axis=(0, 2, 3))

    return jnp.sqrt(jnp.sum(jax.jacrev(per_query)(params["gate_bias"]) ** 2, axis=0))


def exactly(case: Case, inputs: dict, params: dict):
    """The reference for the same numbers in float32, and `spread_over_queries`."""
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    wide = dataclasses.replace(case, dtype="float32")
    want = run_with_gradients(wide, exact, params, "reference")
    return want, spread_over_queries(wide, exact, params)


CASES = {
    "offset": {},
    "packed table": {"positions": 70},
    "own gate key": {"bias": "cope per head", "size": 128, "segments": True, "dtype": "float16"},
    "large table": {"positions": 100, "size": 80, "window": (200, 0)},
    "bidirectional": {"causal": False, "offset": False, "keys": 200, "batch": 2},
    "distance": {
        "bias": "relative",
        "size": 128,
        "kv_heads": 2,
        "segments": True,
        "dtype": "float16",
        # All distances of one segment would be great, and softmax sees but their differences.
        "offset": False,
    },
    "count and distance": {"bias": "cope + relative", "keys": 300},
    "no bias": {"bias": "none", "heads": 4, "kv_heads": 2, "segments": True, "batch": 2},
}


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_values_and_gradients(changes, interpreter):
    case = dataclasses.replace(CASE, **changes)
    inputs, params = problem(case)
    got = run_with_gradients(case, inputs, params, "gpu")
    assert_near(got, *exactly(case, inputs, params))


@dataclasses.dataclass(frozen=True)
class Linear:
    """A bias of the distance with nothing to train."""

    slope: float

    def __call__(self, params, query_positions, key_positions):
        return linear(jnp.full((2,), self.slope), query_positions, key_positions)


@needs_interpreter
def test_a_fixed_distance_is_that_of_a_trained_one(interpreter):
    """The same numbers, without the kernels' part for what trains."""
    case = dataclasses.replace(CASE, bias="none", queries=128, keys=128, offset=False)
    inputs, _ = problem(case)

    def loss(inputs, slopes):
        trained = slopes is not None
        function = linear if trained else Linear(0.25)
        bias = posjax.RelativeBias(function, slopes, distance_only=True)
        output = posjax.dot_product_attention(
            **inputs, bias=bias, is_causal=True, implementation="gpu"
        )
        return jnp.sum(output.astype(jnp.float32) ** 2)

    fixed = jax.grad(loss)(inputs, None)
    chex.assert_trees_all_equal(fixed, jax.grad(loss)(inputs, jnp.full((2,), 0.25)))


@needs_interpreter
def test_irregular_positions_are_done_another_way(interpreter, monkeypatch):
    case = dataclasses.replace(CASE, bias="relative", queries=128, keys=128, offset=False)
    inputs, params = problem(case)
    positions = jnp.arange(128) + jnp.arange(128) // 7
    settings = {"query_positions": positions, "key_positions": positions}
    monkeypatch.setattr("posjax.kernels.gpu.attention.run", pytest.fail)
    want = run(case, inputs, params, "xla", **settings)
    np.testing.assert_array_equal(run(case, inputs, params, "gpu", **settings), want)


CHOICES = {
    "paired": (GpuBlocks(paired=True), {}),
    "paired, exact": (GpuBlocks(count=128, packed=False, paired=True), {"size": 128}),
    # The first warpgroup needs a block less, the second one counts longer.
    "ping-pong": (GpuBlocks(key=64, ping_pong=True), {"queries": 128, "keys": 320}),
    "ping-pong, window": (GpuBlocks(key=64, stages=3, ping_pong=True), {"window": (70, 0)}),
    "ping-pong, two halves": (GpuBlocks(ping_pong=True, paired=True), {"positions": 70}),
    "ping-pong, no bias": (GpuBlocks(ping_pong=True), {"bias": "none"}),
}


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("blocks, changes", CHOICES.values(), ids=CHOICES)
def test_choices_of_blocks(blocks, changes, interpreter, monkeypatch):
    monkeypatch.setattr("posjax.kernels.gpu.attention.gpu_sizes", lambda *_: blocks)
    case = dataclasses.replace(CASE, **changes)
    inputs, params = problem(case)
    want, spread = exactly(case, inputs, params)
    if blocks.paired and not blocks.ping_pong:
        assert_near(run_with_gradients(case, inputs, params, "gpu"), want, spread)
    else:
        assert_near(run(case, inputs, params, "gpu"), want[0])


@needs_interpreter
def test_one_warpgroup_sees_nothing_and_they_take_turns(interpreter, monkeypatch):
    blocks = GpuBlocks(key=64, ping_pong=True)
    monkeypatch.setattr("posjax.kernels.gpu.attention.gpu_sizes", lambda *_: blocks)
    case = dataclasses.replace(CASE, causal=False, offset=False, queries=128, keys=192)
    inputs, params = problem(case)
    ids = jnp.zeros((1, 192), jnp.int32)
    alone = ids[:, :128].at[:, :64].set(5)
    segments = {"query_segment_ids": alone, "key_segment_ids": ids}
    output = run(case, inputs, params, "gpu", **segments)
    assert not np.any(output[:, :64])
    assert_near(output, run(case, inputs, params, "reference", **segments).astype(jnp.float32))


def test_paired_reciprocals_stay_finite():
    from posjax.kernels.gpu.reciprocals import paired_reciprocal

    x = jnp.array([[2.0, 2.0, 3.0, 1e30, jnp.inf, 64.0, jnp.inf, 2.0**100]])
    found = np.asarray(paired_reciprocal(x, emulated=True))
    np.testing.assert_allclose(found, np.maximum(1 / np.asarray(x), 2.0**-63), rtol=3e-7)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"count": 32}, "self.count=32 must be 64 or 128"),
        ({"key": 192, "count": 128}, "divide self.key=192"),
        ({"stages": 0}, "self.stages=0"),
    ],
)
def test_wrong_blocks(wrong, words):
    with pytest.raises(ValueError, match=words):
        GpuBlocks(**wrong)


@needs_interpreter
def test_same_bits_twice(interpreter):
    case = dataclasses.replace(CASE, bias="cope + relative", heads=1, keys=128, offset=False)
    compute = with_gradients(case, "gpu")
    first, second = (compute(*problem(case)) for _ in range(2))
    chex.assert_trees_all_equal(first, second)


@needs_interpreter
@pytest.mark.slow
def test_vmap_over_a_batch(interpreter):
    """`jax.checkpoint` and meshes, not for this interpreter, are in `test_gpu_compile.py`."""
    case = dataclasses.replace(CASE, heads=1, queries=64, keys=64, offset=False)
    problems, params = [arrays(case, seed)[0] for seed in range(2)], problem(case)[1]
    loss = lambda inputs: jnp.sum(run(case, inputs, params, "gpu").astype(jnp.float32) ** 2)  # noqa: E731
    gradient = jax.grad(loss)
    together = jax.jit(jax.vmap(gradient))(jax.tree.map(lambda *x: jnp.stack(x), *problems))
    alone = jax.jit(gradient)
    for number, inputs in enumerate(problems):
        one = jax.tree.map(lambda x, number=number: x[number], together)
        chex.assert_trees_all_equal(one, alone(inputs))


@needs_interpreter
def test_a_query_that_sees_nothing_gives_zero(interpreter):
    case = dataclasses.replace(CASE, causal=False, offset=False, queries=128, keys=128)
    inputs, params = problem(case)
    ids = jnp.zeros((1, 128), jnp.int32)
    alone = ids.at[:, :70].set(5)
    output = run(case, inputs, params, "gpu", query_segment_ids=alone, key_segment_ids=ids)
    assert not np.any(output[:, :70])
    assert np.all(np.any(output[:, 70:], axis=(2, 3)))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dtype": "float32"}, "query has dtype float32"),
        ({"size": 256}, "head size 256"),
        ({"positions": 300}, "the table has 300 rows"),
        ({"bias": "forgetting"}, "ForgettingBias has no GPU kernel"),
        ({"mask": True}, "an explicit mask array"),
    ],
)
def test_what_it_cannot_do(changes, words):
    case = dataclasses.replace(CASE, **changes)
    with pytest.raises(NotImplementedError, match=words + '.*use implementation="xla"'):
        run(case, *problem(case), "gpu")


@pytest.mark.standard_promotion
def test_explain():
    query = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    bias = posjax.ContextualBias(jnp.zeros((4, 64)))
    chosen, *others = posjax.explain(query, query, query, bias, is_causal=True).splitlines()
    assert chosen == "xla"
    found = dict(line.removeprefix("not ").split(": ", 1) for line in others)
    assert sorted(found) == ["cudnn", "gpu", "jax", "reference", "tpu"]
    assert found["jax"].startswith("ContextualBias")
    plain = posjax.explain(query, query, query, is_causal=True).splitlines()
    assert plain[0] == "jax"
    device = jax.sharding.AbstractDevice("NVIDIA H200", num_cores=132, platform="gpu")
    described = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(described):
        asked = posjax.explain(query, query, query, bias, is_causal=True, implementation="gpu")
    assert asked.splitlines()[0] == "gpu"
