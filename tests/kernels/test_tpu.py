"""The TPU kernels in the TPU interpreter: values and all gradients against the reference.

The interpreter raises where a block is read out of bounds or a transfer races with a use of its
memory; scratch memory starts as NaN.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import posjax
import posjax.kernels.tpu.attention
import posjax.kernels.tpu.forward_pipeline
from posjax.kernels.blocks import TpuBlocks
from tests import tolerances
from tests.cases import (
    Case,
    arrays,
    dense_narrow,
    linear,
    problem,
    run,
    run_with_gradients,
    with_gradients,
)

# Two registers of keys in a block, two blocks in memory, and up to three parts of the keys.
BLOCKS = TpuBlocks(query=128, key=256, memory=512)
CASE = Case(bias="cope", batch=1, queries=300, keys=300, heads=2, kv_heads=1, positions=12)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(posjax.kernels.tpu.attention, "tpu_sizes", lambda *_, **__: BLOCKS)


@pytest.fixture
def plain_interpreter(monkeypatch):
    """Pallas' own interpreter, which checks less and can stand inside other transformations."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr("posjax.kernels.interpreters.is_interpreted", lambda kind: True)


@pytest.fixture(autouse=True)
def interpreter(request):
    if "plain_interpreter" in request.fixturenames:
        yield
        return
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield


def compare(case: Case, inputs: dict, params: dict) -> None:
    """Values and gradients equal the reference's within the table of tolerances."""
    want, want_grads = run_with_gradients(case, inputs, params, "reference")
    got, got_grads = run_with_gradients(case, inputs, params, "tpu")
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerances.FORWARD["float32"])
    flat = jax.tree_util.tree_leaves_with_path(want_grads)
    for (path, w), g in zip(flat, jax.tree.leaves(got_grads), strict=True):
        name = jax.tree_util.keystr(path)
        atol = tolerances.GRADIENT["float32"] * max(1.0, float(jnp.max(jnp.abs(w))))
        if "gate_bias" in name:
            atol *= 10  # a sum of 100,000 terms of both signs, which leave little of each other
        np.testing.assert_allclose(g, w, rtol=0, atol=atol, err_msg=name)


def check(case: Case) -> None:
    compare(case, *problem(case))


RESTRICTED = {
    "causal": {},
    "segments": {"segments": True},
    "window": {"window": (40, 0)},
    "two-sided window": {"window": (20, 50), "causal": False},
    "bidirectional": {"causal": False},
    "everything": {"segments": True, "window": (150, 0), "heads": 4, "kv_heads": 2},
}


def _matrix():
    """CoPE with every restriction; the others with those that reach all of their code."""
    yield from (("cope", name) for name in RESTRICTED)
    yield from (("none", name) for name in ("two-sided window", "everything"))
    yield from (("relative", name) for name in ("bidirectional", "everything"))
    yield "cope + relative", "everything"
    yield from (("cope per head", name) for name in ("bidirectional", "everything"))


@pytest.mark.parametrize("bias, restriction", list(_matrix()))
def test_restrictions(bias, restriction):
    check(dataclasses.replace(CASE, bias=bias, **RESTRICTED[restriction]))


@pytest.mark.parametrize(
    "bias, queries, keys",
    [
        ("cope", 1, 1),
        ("cope", 128, 128),
        ("cope", 129, 129),
        ("cope", 513, 513),
        ("cope", 20, 530),
        ("cope", 300, 9),
        ("none", 1, 1),
        ("none", 20, 530),
    ],
)
def test_lengths(bias, queries, keys):
    """Also with fewer queries than keys, which then stand at the end."""
    check(dataclasses.replace(CASE, bias=bias, queries=queries, keys=keys, offset=queries < keys))


@pytest.mark.parametrize("positions", [2, 100, 129, 300])
def test_tables_of_any_size(positions):
    """More than 128 entries stand in several registers; gates near 1 walk through most of them."""
    case = dataclasses.replace(CASE, positions=positions, bias="cope per head")
    inputs, params = problem(case)
    compare(case, inputs, params | {"gate_bias": jnp.array([1.0, 3.0])})


@pytest.mark.parametrize("gate_bias, positions", [(-2.0, 40), (3.0, 500)])
def test_long_walks_through_the_pipelines(gate_bias, positions, monkeypatch):
    """Five full blocks one after the other, in two parts; few counts in a block, and many."""
    sizes = TpuBlocks(128, 256, 768, rows=64, lane_rows=32)
    monkeypatch.setattr(posjax.kernels.tpu.attention, "tpu_sizes", lambda *_, **__: sizes)
    case = dataclasses.replace(CASE, positions=positions, queries=100, keys=1380, offset=True)
    inputs, params = problem(case)
    compare(case, inputs, params | {"gate_bias": jnp.float32(gate_bias)})


@pytest.mark.parametrize(
    "scale, gate_scale, far", [(None, None, 0.0), (None, 0.7, 64.0), (0.0, 0.7, 64.0)]
)
def test_scales_and_steep_tables(scale, gate_scale, far, monkeypatch):
    """Far 0: as if every table were too steep for the bound that the pipeline takes."""
    monkeypatch.setattr(posjax.kernels.tpu.forward_pipeline, "_FAR", far)
    sizes = TpuBlocks(128, 256, 768, rows=64, lane_rows=32)
    monkeypatch.setattr(posjax.kernels.tpu.attention, "tpu_sizes", lambda *_, **__: sizes)
    case = dataclasses.replace(CASE, queries=100, keys=900, positions=40)
    inputs, params = problem(case)

    def loss(inputs, table, implementation):
        bias = posjax.ContextualBias(table, gate_bias=jnp.float32(-2.0), gate_scale=gate_scale)
        return jnp.sum(
            jnp.sin(
                posjax.dot_product_attention(
                    **inputs, bias=bias, scale=scale, is_causal=True, implementation=implementation,
                    query_positions=jnp.arange(800, 900),
                )
            )
        )  # fmt: skip

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    want = gradients(inputs, params["table"], "reference")
    got = gradients(inputs, params["table"], "tpu")
    for w, g in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        atol = tolerances.GRADIENT["float32"] * max(1.0, float(jnp.max(jnp.abs(w))))
        np.testing.assert_allclose(g, w, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "bias, size", [("cope", 64), ("cope", 80), ("cope", 96), ("cope", 256), ("none", 80)]
)
def test_head_sizes(bias, size):
    check(dataclasses.replace(CASE, bias=bias, size=size, queries=130, keys=130, heads=1))


def test_values_of_another_size():
    case = dataclasses.replace(CASE, heads=1, queries=130, keys=130)
    inputs, params = problem(case)
    compare(case, inputs | {"value": jax.random.normal(jax.random.key(7), (1, 130, 1, 20))}, params)


@pytest.mark.parametrize("generation", [5, 6])
@pytest.mark.parametrize("bias", ["none", "cope", "cope per head"])
def test_bfloat16_is_as_good_as_a_dense_computation(bias, generation, monkeypatch):
    """At most twice the error of dense attention in bfloat16 with float32 counts.

    On v5 gates come from an approximate reciprocal, of which the interpreter makes a bfloat16.
    """
    monkeypatch.setattr(posjax.kernels.tpu.attention, "tpu_generation", lambda: generation)
    case = dataclasses.replace(CASE, bias=bias, size=16, dtype="bfloat16")
    inputs, params = problem(case)
    exact = {name: x.astype(jnp.float32) for name, x in inputs.items()}
    wide = dataclasses.replace(case, dtype="float32")
    want = run_with_gradients(wide, exact, params, "reference")
    got = run_with_gradients(case, inputs, params, "tpu")
    dense = dense_narrow(case, inputs, params)
    for (path, w), g, d in zip(
        jax.tree_util.tree_leaves_with_path(want),
        *(jax.tree.leaves(x) for x in (got, dense)),
        strict=True,
    ):
        error = lambda x, w=w: float(jnp.max(jnp.abs(x.astype(jnp.float32) - w)))  # noqa: E731
        slack = tolerances.NARROW_SLACK["bfloat16"]
        assert error(g) <= tolerances.NARROW_FACTOR * error(d) + slack, jax.tree_util.keystr(path)


def test_same_bits_twice():
    case = dataclasses.replace(CASE, bias="cope per head", segments=True)
    compute = with_gradients(case, "tpu")
    first, second = (compute(*problem(case)) for _ in range(2))
    chex.assert_trees_all_equal(first, second)


def test_a_query_that_sees_nothing_gives_zero():
    """Queries of a segment without keys; all of a block, and some of another."""
    case = dataclasses.replace(CASE, causal=False)
    inputs, params = problem(case)
    ids = jnp.zeros((1, 300), jnp.int32)
    alone = ids.at[:, :140].set(5)

    def loss(inputs):
        output = run(case, inputs, params, "tpu", query_segment_ids=alone, key_segment_ids=ids)
        return jnp.sum(jnp.sin(output)), output

    grads, output = jax.grad(loss, has_aux=True)(inputs)
    assert jnp.all(output[:, :140] == 0)
    assert jnp.all(jnp.any(output[:, 140:] != 0, axis=-1))
    assert jnp.all(grads["query"][:, :140] == 0)
    chex.assert_tree_all_finite(grads)


def test_the_walk_stops_at_saturation():
    """Gate keys left of saturation are not read: NaN in them reaches no output and no gradient."""
    case = dataclasses.replace(CASE, bias="cope per head", queries=768, keys=768, positions=3)
    inputs, params = problem(case)
    params["gate_bias"] = jnp.full(2, 30.0)  # every gate is 1, so three keys saturate
    poisoned = params | {"gate_key": params["gate_key"].at[:, :256].set(jnp.nan)}

    def last_block(query, params):
        output = run(case, inputs | {"query": query}, params, "tpu")[:, -128:]
        return jnp.sum(output**2), output

    function = jax.jit(jax.grad(last_block, has_aux=True))
    want, got = (function(inputs["query"], x) for x in (params, poisoned))
    chex.assert_trees_all_equal(got[1], want[1])
    np.testing.assert_array_equal(got[0][:, -128:], want[0][:, -128:])


PLACES = np.arange(300)[None]
# Positions of queries and keys, segments, and whether they are regular.
OWN_POSITIONS = {
    "an offset for each row": (PLACES + np.array([[5], [90]]), PLACES, None, True),
    "segments": (PLACES % 50, PLACES % 50, PLACES // 50, True),
    "gaps": (PLACES + PLACES // 7, PLACES + PLACES // 7, None, False),
    "a segment twice": (PLACES % 100, PLACES % 100, PLACES // 100 % 2, False),
    "a gap in a segment": (PLACES % 50, PLACES % 50, PLACES // 100, False),
    "unlike segments": (PLACES % 50, PLACES % 50 + PLACES // 50, PLACES // 50, False),
}


@pytest.mark.parametrize(
    "name, jitted",
    [*((name, False) for name in OWN_POSITIONS), ("segments", True), ("gaps", True)],
)
def test_positions_of_a_relative_bias(name, jitted, monkeypatch, plain_interpreter):
    """By the kernels where positions rise by one, seen when it runs, and else in another way."""
    *own, ids, regular = OWN_POSITIONS[name]
    own = [jnp.asarray(x, jnp.int32) for x in own]
    case = dataclasses.replace(CASE, batch=2, bias="relative")
    inputs, params = problem(case)
    settings = {} if ids is None else {"query_segment_ids": jnp.asarray(ids)}

    def loss(inputs, params, own, implementation):
        bias = posjax.RelativeBias(bent, params["slopes"], *own, distance_only=True)
        return jnp.sum(
            jnp.sin(
                posjax.dot_product_attention(
                    **inputs, bias=bias, is_causal=True, implementation=implementation, **settings
                )
            )
        )

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    gradient = jax.jit(gradient, static_argnums=3) if jitted else gradient
    assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-4)
    want = gradient(inputs, params, own, "reference")
    if not jitted:  # the other way is not even traced
        name = "blockwise.run" if regular else "tpu.attention.run"
        monkeypatch.setattr(f"posjax.kernels.{name}", pytest.fail)
    assert_close(gradient(inputs, params, own, "tpu"), want)


def bent(slopes, query_positions, key_positions):
    """Another value at every distance, not a straight line: softmax would not see its shifts."""
    distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
    return -slopes[None, :, None, None] * jnp.abs(distance + 3).astype(jnp.float32) ** 0.8


def test_vmap_and_checkpoint(plain_interpreter):
    case = dataclasses.replace(CASE, queries=128, keys=128)
    problems = [arrays(case, seed)[0] for seed in range(2)]
    params = problem(case)[1]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *problems)
    loss = lambda inputs: jnp.sum(run(case, inputs, params, "tpu") ** 2)  # noqa: E731
    together = jax.vmap(jax.grad(jax.checkpoint(loss)))(stacked)
    for number, inputs in enumerate(problems):
        one = jax.tree.map(lambda x, number=number: x[number], together)
        chex.assert_trees_all_close(one, jax.grad(loss)(inputs), atol=1e-5)


@pytest.mark.parametrize("bias", ["cope per head", "cope + relative"])
def test_sharded_over_batch_and_heads_equals_unsharded(bias):
    case = dataclasses.replace(
        CASE, bias=bias, batch=2, heads=4, kv_heads=2, queries=128, keys=128, segments=True
    )
    inputs, params = problem(case)
    want = run_with_gradients(case, inputs, params, "tpu")
    kinds = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 1, 2), ("data", "fsdp", "tensor"), kinds, devices=jax.devices()[:4])
    split = jax.NamedSharding(mesh, jax.P("data", None, "tensor"))
    with jax.set_mesh(mesh):
        got = run_with_gradients(case, jax.device_put(inputs, split), params, "tpu")
    chex.assert_trees_all_close(got, want, rtol=0, atol=tolerances.GRADIENT["float32"])


@pytest.mark.parametrize("bias", ["cope", "relative"])
def test_chunked_prefill_equals_all_at_once(bias):
    """Queries in two chunks, each with the keys known by then."""
    case = dataclasses.replace(CASE, bias=bias)
    inputs, params = problem(case)
    whole = run(case, inputs, params, "tpu")
    for start, stop in ((0, 140), (140, 300)):
        known = {name: x[:, :stop] for name, x in inputs.items()}
        known["query"] = inputs["query"][:, start:stop]
        places = jnp.arange(start, stop)
        part = run(case, known, params, "tpu", query_positions=places)
        np.testing.assert_allclose(part, whole[:, start:stop], atol=1e-5)


UNSUPPORTED = {
    "float16": (dataclasses.replace(CASE, dtype="float16"), "float16"),
    "mask array": (dataclasses.replace(CASE, mask=True), "mask array"),
    "array": (dataclasses.replace(CASE, bias="array"), "ArrayBias"),
    "running state": (dataclasses.replace(CASE, bias="forgetting"), "ForgettingBias"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_it_cannot_do_is_named_with_the_alternative(name):
    case, words = UNSUPPORTED[name]
    with pytest.raises(NotImplementedError, match=rf'{words}.*use implementation="xla"'):
        run(case, *problem(case), "tpu")


def test_a_relative_bias_of_more_than_the_distance_is_named():
    case = dataclasses.replace(CASE, bias="relative")
    inputs, params = problem(case)
    bias = posjax.RelativeBias(linear, params["slopes"])
    with pytest.raises(NotImplementedError, match=r"distance_only.*linear"):
        posjax.dot_product_attention(**inputs, bias=bias, implementation="tpu")


def test_blocks_that_do_not_fit_a_relative_bias(monkeypatch):
    sizes = TpuBlocks(128, 384, 768)
    monkeypatch.setattr(posjax.kernels.tpu.attention, "tpu_sizes", lambda *_, **__: sizes)
    with pytest.raises(ValueError, match="key=384"):
        check(dataclasses.replace(CASE, bias="relative"))


@pytest.mark.parametrize(
    "sizes, words",
    [
        ((100, 128, 128), "query=100"),
        ((128, 130, 130), "key=130"),
        ((128, 256, 128), "memory=128"),
        ((128, 128, 128, 48), "rows=48"),
        ((128, 128, 128, None, 48), "lane_rows=48"),
    ],
)
def test_block_sizes_are_checked(sizes, words):
    with pytest.raises(ValueError, match=words):
        TpuBlocks(*sizes)
