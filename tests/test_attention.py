"""One matrix for every implementation: values and all gradients against the reference."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import posjax.kernels.blocks
from posjax import ContextualBias, dot_product_attention
from tests import tolerances
from tests.cases import BIASES, Case, arrays, dense_narrow, run, run_with_gradients, with_gradients
from tests.goldens import values

IMPLEMENTATIONS = ["xla"]
BLOCK_Q, BLOCK_K = 8, 16

LENGTHS = [(1, 1), (7, 7), (15, 15), (16, 16), (17, 17), (63, 63)]
RECTANGULAR = [(1, 33), (20, 47), (47, 20)]
RESTRICTED = {
    "grouped heads": {},
    "one head for all": {"kv_heads": 1},
    "no grouping": {"heads": 2, "kv_heads": 2},
    "segments": {"segments": True},
    "window": {"window": (5, 0)},
    "two-sided window": {"window": (5, 9), "causal": False},
    "bidirectional": {"causal": False},
    "mask": {"mask": True},
    "everything": {"segments": True, "window": (9, 0), "mask": True},
}
CAUSAL_ONLY = {"forgetting", "stick-breaking", "forgetting + cope"}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks smaller than the sequences, and not square."""
    sizes = posjax.kernels.blocks.Blocks(BLOCK_Q, BLOCK_K)
    monkeypatch.setattr(posjax.kernels.blocks, "blockwise_sizes", lambda queries, keys: sizes)


def check(case: Case, implementation: str) -> dict:
    """Values and gradients equal the reference's within the table of tolerances; these values."""
    inputs, params = arrays(case)
    want, want_grads = run_with_gradients(case, inputs, params, "reference")
    got, got_grads = run_with_gradients(case, inputs, params, implementation)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerances.FORWARD[case.dtype])
    flat = jax.tree_util.tree_leaves_with_path(want_grads)
    for (path, w), g in zip(flat, jax.tree.leaves(got_grads), strict=True):
        name = jax.tree_util.keystr(path)
        # Gradients of what all queries share are sums over them; the tolerance is for terms of
        # order 1.
        size = max(1.0, float(jnp.max(jnp.abs(w))))
        np.testing.assert_allclose(
            g, w, rtol=0, atol=tolerances.GRADIENT[case.dtype] * size, err_msg=name
        )
    return {"gradients": got_grads, "output": got}


def _matrix():
    """Every bias with every restriction; the quick loop takes two restrictions."""
    for bias in BIASES:
        for name in RESTRICTED:
            marks = [] if name in ("grouped heads", "everything") else [pytest.mark.slow]
            yield pytest.param(bias, name, marks=marks, id=f"{bias}-{name}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bias, restriction", list(_matrix()))
def test_matrix_of_restrictions(bias, restriction, implementation):
    case = Case(bias=bias, **RESTRICTED[restriction])
    if bias in CAUSAL_ONLY and not case.causal:
        with pytest.raises(ValueError, match="is_causal=True"):
            run(case, *arrays(case), implementation)
    else:
        found = check(case, implementation)
        if case == Case(bias=bias):
            values.compare(found, f"bias {bias}", f"plain {implementation}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bias", ["none", "cope", "cope + relative", "stick-breaking"])
@pytest.mark.parametrize("queries, keys", LENGTHS + RECTANGULAR)
def test_lengths(bias, queries, keys, implementation):
    check(Case(bias=bias, queries=queries, keys=keys, offset=queries != keys), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bias", ["none", "relative", "cope", "cope per head"])
def test_narrow_types_are_as_good_as_a_dense_computation(bias, dtype, implementation):
    """At most twice the error of dense attention in the same type with float32 counts."""
    case = Case(bias=bias, dtype=dtype, size=16)
    inputs, params = arrays(case)
    exact = {n: x.astype(jnp.float32) for n, x in inputs.items()}
    want = run_with_gradients(
        dataclasses.replace(case, dtype="float32"), exact, params, "reference"
    )
    got = run_with_gradients(case, inputs, params, implementation)
    dense = dense_narrow(case, inputs, params)
    assert run(case, inputs, params, implementation).dtype == jnp.dtype(dtype)
    for w, g, d in zip(*(jax.tree.leaves(x) for x in (want, got, dense)), strict=True):
        error = lambda x, w=w: float(jnp.max(jnp.abs(x.astype(jnp.float32) - w)))  # noqa: E731
        assert error(g) <= tolerances.NARROW_FACTOR * error(d) + tolerances.NARROW_SLACK[dtype]


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("bias", ["none", "cope"])
def test_a_query_that_sees_nothing_gives_zero(bias, implementation):
    case = Case(bias=bias, mask=True)
    inputs, params = arrays(case)
    output, (grads, _) = run_with_gradients(case, inputs, params, implementation)
    assert jnp.all(output[:, 0] == 0)
    assert jnp.all(grads["query"][:, 0] == 0)
    chex.assert_tree_all_finite(grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bias", ["cope", "cope + relative"])
def test_same_bits_twice(bias, implementation):
    case = Case(bias=bias)
    compute = with_gradients(case, implementation)
    first, second = (compute(*arrays(case)) for _ in range(2))
    chex.assert_trees_all_equal(first, second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causality_by_gradient(implementation):
    """An output has no gradient by any later key or value, and one by every earlier."""
    case = Case(bias="cope", positions=40, batch=1)
    inputs, params = arrays(case)

    def one_output(key, value):
        return jnp.sum(
            run(case, inputs | {"key": key, "value": value}, params, implementation)[:, 10]
        )

    for grad in jax.grad(one_output, argnums=(0, 1))(inputs["key"], inputs["value"]):
        assert jnp.all(grad[:, 11:] == 0)
        assert jnp.all(jnp.any(grad[:, :11] != 0, axis=(2, 3)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_equals_a_loop(implementation):
    case = Case(bias="cope", batch=1)
    problems = [arrays(case, seed)[0] for seed in range(3)]
    params = arrays(case)[1]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *problems)
    together = jax.vmap(lambda inputs: run(case, inputs, params, implementation))(stacked)
    for one, inputs in zip(together, problems, strict=True):
        np.testing.assert_allclose(one, run(case, inputs, params, implementation), atol=1e-6)


def test_checkpoint_gives_the_same_gradients():
    case = Case(bias="cope")
    inputs, params = arrays(case)
    plain = lambda inputs: jnp.sum(run(case, inputs, params, "xla") ** 2)  # noqa: E731
    want, got = (jax.grad(f)(inputs) for f in (plain, jax.checkpoint(plain)))
    chex.assert_trees_all_close(got, want, atol=1e-6)


def test_the_walk_stops_at_saturation():
    """Gate keys left of saturation are not read: NaN in them reaches no output and no gradient."""
    case = Case(bias="cope per head", queries=48, keys=48, positions=3, batch=1)
    inputs, params = arrays(case)
    params["gate_bias"] = jnp.full(4, 30.0)  # every gate is 1, so three keys saturate
    poisoned = params | {"gate_key": params["gate_key"].at[:, :BLOCK_K].set(jnp.nan)}

    def last_block(query, params):
        return run(case, inputs | {"query": query}, params, "xla")[:, -BLOCK_Q:]

    for function in (last_block, jax.grad(lambda q, p: jnp.sum(last_block(q, p) ** 2))):
        want = function(inputs["query"], params)[:, -BLOCK_Q:]
        got = function(inputs["query"], poisoned)[:, -BLOCK_Q:]
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bias", sorted(BIASES))
def test_sharded_equals_unsharded(bias):
    case = Case(bias=bias, batch=8, segments=True)
    inputs, params = arrays(case)
    want = run_with_gradients(case, inputs, params, "xla")
    kinds = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=kinds)
    split = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
    with jax.set_mesh(mesh):
        got = run_with_gradients(case, jax.device_put(inputs, split), params, "xla")
    chex.assert_trees_all_close(got, want, rtol=0, atol=tolerances.GRADIENT["float32"])


def test_no_communication_between_devices_in_the_kernel():
    case = Case(bias="cope", batch=8)
    inputs, params = arrays(case)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    inputs = jax.device_put(inputs, jax.NamedSharding(mesh, jax.P("data")))
    with jax.set_mesh(mesh):
        text = (
            jax.jit(lambda i, p: run(case, i, p, "xla")).lower(inputs, params).compile().as_text()
        )
    assert "while" in text
    assert not any(
        word in text for word in ("all-reduce", "all-gather", "collective-permute", "all-to-all")
    )


@pytest.mark.parametrize("implementation", [None, "reference", "xla"])
def test_plain_attention_equals_jax(implementation):
    inputs, _ = arrays(Case())
    want = jax.nn.dot_product_attention(**inputs, is_causal=True, scale=0.2)
    got = dot_product_attention(**inputs, is_causal=True, scale=0.2, implementation=implementation)
    np.testing.assert_allclose(got, want, atol=tolerances.FORWARD["float32"])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_mask_bias_and_window_mean_what_they_mean_in_jax(implementation):
    case = Case(bias="array", causal=False, window=(4, 3))
    inputs, params = arrays(case)
    mask = (
        jax.random.bernoulli(jax.random.key(3), 0.8, (2, 4, 33, 33))
        | jnp.eye(33, dtype=bool)[None, None]
    )
    want = jax.nn.dot_product_attention(
        **inputs, bias=params["a"], mask=mask, local_window_size=(4, 3)
    )
    got = run(case, inputs, params, implementation, mask=mask)
    np.testing.assert_allclose(got, want, atol=tolerances.FORWARD["float32"])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_packed_segments_equal_separate_sequences(implementation):
    case = Case(bias="cope", batch=1, queries=30, keys=30)
    inputs, params = arrays(case)
    ids = jnp.repeat(jnp.arange(3), 10)[None]
    packed = run(case, inputs, params, implementation, query_segment_ids=ids, key_segment_ids=ids)
    one = dataclasses.replace(case, queries=10, keys=10)
    for start in (0, 10, 20):
        part = {name: x[:, start : start + 10] for name, x in inputs.items()}
        got = packed[:, start : start + 10]
        np.testing.assert_allclose(
            got, run(one, part, params, implementation), atol=tolerances.FORWARD["float32"]
        )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("bias", ["none", "relative", "cope"])
def test_one_query_at_a_time_equals_all_at_once(bias, implementation):
    case = Case(bias=bias, batch=1, queries=12, keys=12)
    inputs, params = arrays(case)
    want = run(case, inputs, params, implementation)
    for place in (0, 5, 11):
        step = dataclasses.replace(case, queries=1)
        query = {"query": inputs["query"][:, place : place + 1]}
        got = run(step, inputs | query, params, implementation, query_positions=jnp.array([place]))
        np.testing.assert_allclose(got[:, 0], want[:, place], atol=tolerances.FORWARD["float32"])


def test_forward_direction_counts_from_the_left_in_the_reference_only():
    case = Case(batch=1, heads=1, kv_heads=1, queries=9, keys=9)
    inputs, _ = arrays(case)
    table = jax.random.normal(jax.random.key(5), (5, 8))
    flip = {name: x[:, ::-1] for name, x in inputs.items()}
    call = lambda inputs, way, how: dot_product_attention(  # noqa: E731
        **inputs, bias=ContextualBias(table, direction=way), implementation=how
    )
    np.testing.assert_allclose(
        call(inputs, "forward", "reference"),
        call(flip, "backward", "reference")[:, ::-1],
        atol=1e-5,
    )
    with pytest.raises(NotImplementedError, match="reference"):
        call(inputs, "forward", "xla")
