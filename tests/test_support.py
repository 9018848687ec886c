"""The tables of docs/implementations.md: every "yes" runs, every other cell is what is said."""

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import pallas as pl
from jax.sharding import AxisType

import posjax
from posjax import dot_product_attention, support
from posjax.implementations import IMPLEMENTATIONS
from tests import tolerances

WAYS = {way.name: way for way in IMPLEMENTATIONS}
HERE = ["reference", "xla", "jax"]


def values(call: support.Call) -> list[jax.Array]:
    """Query, key and value of a call."""
    return [
        jax.random.normal(jax.random.key(number), x.shape, jnp.float32).astype(x.dtype)
        for number, x in enumerate(call.shapes())
    ]


class Module:
    """A module that keeps what is sown."""

    def sow(self, collection, name, x):
        self.sown = {(collection, name): x}


@contextlib.contextmanager
def wide_if(needed: bool):
    """float64 as a type, for one call."""
    with jax.enable_x64(True) if needed else contextlib.nullcontext():
        yield


@pytest.mark.parametrize("name", support.CALLS)
def test_every_yes_about_arguments_runs(name):
    """As the reference computes it; what is refused raises its sentence."""
    call = support.CALLS[name]
    with wide_if(call.dtype == "float64"), jax.numpy_dtype_promotion("standard"):
        inputs, settings = values(call), call.settings()
        if "module" in settings:
            settings["module"] = Module()
        results = {}
        for way in HERE:
            refused = support.refusal(WAYS[way], call)
            run = jax.jit(  # traced settings are arguments
                lambda inputs, traced, way=way: dot_product_attention(
                    *inputs, **settings | traced, implementation=way
                )
            )
            traced = {name: settings[name] for name in call.traced}
            if refused is None:
                results[way] = run(inputs, traced)
            else:
                with pytest.raises(NotImplementedError) as raised:
                    run(inputs, traced)
                assert str(raised.value).startswith(f"{refused}; use implementation=")
        want = jax.tree.map(lambda x: np.asarray(x, np.float64), results.pop("reference"))
        narrow = {"bfloat16": 3e-2, "float16": 4e-3}.get(call.dtype)
        atol = narrow or tolerances.FORWARD["float32"]
        for got in results.values():
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=atol)


def test_every_description_has_a_line():
    public = [getattr(posjax, name) for name in dir(posjax)]
    kinds = {x for x in public if isinstance(x, type) and issubclass(x, posjax.Bias)}
    found = {type(call.settings().get("bias")) for call in support.CALLS.values()}
    # An array is given as it is.
    assert kinds - {posjax.Bias, posjax.ArrayBias} <= found
    assert any(
        isinstance(call.settings().get("bias"), jax.Array) for call in support.CALLS.values()
    )


def test_every_argument_of_attention_has_a_line():
    known = set(inspect.signature(dot_product_attention).parameters)
    used = {name for call in support.CALLS.values() for name in call.settings()}
    not_in_the_table = {
        "query", "key", "value", "implementation", "dtype", "precision", "deterministic",
        "broadcast_dropout", "key_positions", "key_segment_ids",
    }  # fmt: skip
    assert known == used | not_in_the_table


QUERY = jax.random.normal(jax.random.key(0), (2, 8, 2, 16))


def losses(way: str):
    """A loss of the query, and the same without an implementation's name."""
    return lambda query: jnp.sum(
        jnp.sin(dot_product_attention(query, query, query, is_causal=True, implementation=way))
    )


def mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2,), ("data",), axis_types=(kind,))


def on_mesh(kind: AxisType, loss):
    def run():
        with jax.set_mesh(mesh(kind)):
            placed = jax.device_put(QUERY, jax.NamedSharding(mesh(kind), jax.P("data")))
            return jax.jit(jax.grad(loss))(placed)

    return run


def in_shard_map(loss):
    split = jax.P("data")
    run = jax.shard_map(jax.grad(loss), mesh=mesh(AxisType.Auto), in_specs=split, out_specs=split)
    return lambda: jax.jit(run)(QUERY)


def mapped_over_mesh(loss):
    def run():
        with jax.set_mesh(mesh(AxisType.Auto)):
            over = jax.vmap(jax.grad(loss), spmd_axis_name="data")
            return jax.jit(over)(QUERY[:, None])[:, 0]

    return run


def exported(loss):
    def run():
        query = jax.ShapeDtypeStruct((*export.symbolic_shape("b, t"), 2, 16), jnp.float32)
        return export.export(jax.jit(jax.grad(loss)))(query).call(QUERY)

    return run


gradient = lambda loss: lambda: jax.grad(loss)(QUERY)  # noqa: E731
hessian = lambda loss: lambda: jax.jvp(jax.grad(loss), (QUERY,), (QUERY,))[1]  # noqa: E731
TRANSFORMED = {
    "`jax.jit`": lambda loss: lambda: jax.jit(loss)(QUERY),
    "`jax.grad`, `jax.vjp`": gradient,
    "`jax.jvp`, `jax.jacfwd`": lambda loss: lambda: jax.jvp(loss, (QUERY,), (QUERY,))[1],
    "`jax.jvp` of `jax.grad`": hessian,
    "`jax.grad` of `jax.grad`": lambda loss: (
        lambda: jax.grad(lambda query: jnp.sum(jax.grad(loss)(query) * QUERY))(QUERY)
    ),
    "`jax.vmap`": lambda loss: lambda: jax.vmap(jax.grad(loss))(QUERY[:, None])[:, 0],
    "`jax.checkpoint`": lambda loss: gradient(jax.checkpoint(loss)),
    "a mesh with Auto axes": lambda loss: on_mesh(AxisType.Auto, loss),
    "a mesh with Explicit axes": lambda loss: on_mesh(AxisType.Explicit, loss),
    "`jax.shard_map`, also with `check_vma`": in_shard_map,
    "`jax.vmap` with `spmd_axis_name`": mapped_over_mesh,
    "`jax.pmap`": lambda loss: lambda: jax.pmap(jax.grad(loss))(QUERY[:, None])[:, 0],
    "`jax.export` with symbolic batch and length": exported,
}


# `tests/test_meshes.py` has the others for the TPU kernels.
WITH_KERNELS = [
    name
    for name, refused in support.TRANSFORMATIONS.items()
    if "tpu" in refused or name in ("`jax.grad`, `jax.vjp`", "`jax.vmap`", "`jax.checkpoint`")
]


@pytest.mark.parametrize("way", HERE)
@pytest.mark.parametrize("name", support.TRANSFORMATIONS)
def test_transformations(name, way):
    """All of them give what the reference gives without a mesh, or the sentence of the table."""
    expected = {
        "`jax.jit`": lambda loss: lambda: loss(QUERY),
        "`jax.jvp`, `jax.jacfwd`": TRANSFORMED["`jax.jvp`, `jax.jacfwd`"],
        "`jax.jvp` of `jax.grad`": hessian,
        "`jax.grad` of `jax.grad`": hessian,
    }
    want = expected.get(name, gradient)(losses("reference"))()
    run = TRANSFORMED[name](losses(way))
    sentence = support.TRANSFORMATIONS[name].get(way)
    if sentence is None:
        np.testing.assert_allclose(run(), want, rtol=0, atol=1e-4)
    else:
        with pytest.raises(NotImplementedError) as raised:
            run()
        assert str(raised.value).startswith(sentence)


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_transformations_of_the_tpu_kernels(name, monkeypatch):
    """In Pallas's own interpreter, which can be inside other transformations."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr("posjax.kernels.interpreters.is_interpreted", lambda kind: True)
    test_transformations(name, "tpu")
