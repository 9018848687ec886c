"""Attention wherever JAX maps or splits it: meshes of both kinds, shard_map, pmap and vmap.

Values and gradients are those of one device. Errors of sharding come when a function is traced, so
that the whole table of descriptions and places is only lowered, and some of it is run.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import posjax
from posjax import dot_product_attention
from tests.descriptions import ARRAYS, DESCRIPTIONS, floats


def attend(query, key, value, bias, implementation="xla"):
    return dot_product_attention(
        query, key, value, bias, is_causal=True, implementation=implementation
    )


def differentiated(attend):
    """The output and the gradients of a weighting of it."""

    def weighted(*arrays):
        output = attend(*arrays)
        return jnp.sum(jnp.sin(output)), output

    gradient = jax.value_and_grad(weighted, argnums=(0, 1, 2, 3), has_aux=True, allow_int=True)

    def compute(*arrays):
        (_, output), gradients = gradient(*arrays)
        return output, floats(gradients)

    return compute


def lettered(function, bias):
    """`function(letters, array)` over a description; its letters begin with B for batches."""
    return None if bias is None else bias.map_arrays(function)


class Mesh:
    """Under `jax.set_mesh`: batches over the first axis, heads over a second Explicit one."""

    def __init__(self, kind: AxisType, shape, names):
        self.kind, self.shape, self.names = kind, shape, names

    @contextlib.contextmanager
    def entered(self):
        self.mesh = jax.make_mesh(self.shape, self.names, axis_types=(self.kind,) * len(self.shape))
        with jax.set_mesh(self.mesh):
            yield

    def of(self, function):
        return function

    def placed(self, query, key, value, bias):
        if self.kind == AxisType.Auto:
            return query, key, value, bias
        heads = self.names[1] if len(self.names) > 1 else None
        put = lambda x, *spec: jax.device_put(x, NamedSharding(self.mesh, P(*spec)))  # noqa: E731
        batch = self.names[0]
        split = lambda letters, x: put(x, *[batch] * letters.startswith("B"))  # noqa: E731
        key, value = put(key, batch, None, heads), put(value, batch)
        return put(query, batch, None, heads), key, value, lettered(split, bias)

    def together(self, outputs):
        return outputs


class Inside(Mesh):
    """Inside a `jax.shard_map` over the first axis, or over all, that checks what varies."""

    def __init__(self, manual=None):
        super().__init__(AxisType.Auto, (2, 2), ("x", "y"))
        self.manual = manual

    def of(self, function):
        def mapped(query, key, value, bias):
            split = lambda letters, x: P("x") if letters.startswith("B") else P()  # noqa: E731
            specs = P("x"), P("x"), P("x"), lettered(split, bias)
            manual = {} if self.manual is None else {"axis_names": self.manual}
            run = jax.shard_map(function, in_specs=specs, out_specs=P("x"), **manual)
            return run(query, key, value, bias)

        return mapped

    def placed(self, *arrays):
        return arrays


class Mapped(Mesh):
    """Mapped over half of the batch, the other half an axis of the mesh or of the devices."""

    def __init__(self, kind: AxisType, transform):
        super().__init__(kind, (2, 2), ("data", "y"))
        self.transform = transform

    def of(self, function):
        def mapped(*arrays):
            return self.transform(function, in_axes=(0, 0, 0, self.axes))(*arrays)

        return mapped

    def placed(self, query, key, value, bias):
        self.axes = lettered(lambda letters, x: 0 if letters.startswith("B") else None, bias)
        split = lambda letters, x: self.halved(x) if letters.startswith("B") else self.put(x)  # noqa: E731
        return *map(self.halved, (query, key, value)), lettered(split, bias)

    def halved(self, x):
        return self.put(x.reshape(2, 2, *x.shape[1:]), "data")

    def put(self, x, *spec):
        if self.kind == AxisType.Auto:
            return x
        return jax.device_put(x, NamedSharding(self.mesh, P(*spec)))

    def together(self, outputs):
        return outputs.reshape(-1, *outputs.shape[2:])


spmd = functools.partial(jax.vmap, spmd_axis_name="data")
PLACES = {
    "auto": Mesh(AxisType.Auto, (4,), ("data",)),
    "auto, two axes": Mesh(AxisType.Auto, (2, 2), ("data", "tensor")),
    "auto, an axis of one": Mesh(AxisType.Auto, (4, 1), ("data", "tensor")),
    "auto, other names": Mesh(AxisType.Auto, (2, 2), ("rows", "columns")),
    "explicit": Mesh(AxisType.Explicit, (4,), ("data",)),
    "explicit, two axes": Mesh(AxisType.Explicit, (2, 2), ("rows", "columns")),
    "shard_map": Inside(),
    "shard_map over one of two axes": Inside({"x"}),
    "vmap, auto": Mapped(AxisType.Auto, spmd),
    "vmap, explicit": Mapped(AxisType.Explicit, spmd),
    "pmap": Mapped(AxisType.Auto, jax.pmap),
}
# One of each kind.
TRACED = [
    "auto, two axes",
    "explicit, two axes",
    "shard_map over one of two axes",
    "vmap, explicit",
]


@functools.cache
def expected(description):
    return jax.jit(differentiated(functools.partial(attend, implementation="reference")))(
        *ARRAYS, DESCRIPTIONS[description]
    )


def equal(place, found, description):
    output, gradients = expected(description)
    np.testing.assert_allclose(place.together(found[0]), output, atol=1e-5)
    for a, b in zip(found[1], gradients, strict=True):
        np.testing.assert_allclose(np.reshape(a, b.shape), b, atol=1e-4)


def check(name, description, implementation, *, jit):
    place = PLACES[name]
    function = functools.partial(attend, implementation=implementation)
    with _no_mesh() if name == "pmap" else place.entered():
        whole = differentiated(place.of(function))
        arrays = place.placed(*ARRAYS, DESCRIPTIONS[description])
        found = (jax.jit(whole) if jit else whole)(*arrays)
        equal(place, jax.tree.map(np.asarray, found), description)


_no_mesh = contextlib.nullcontext


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("description", DESCRIPTIONS)
def test_every_description_can_be_traced_everywhere(description, name):
    place = PLACES[name]
    with place.entered():
        whole = differentiated(place.of(attend))
        jax.jit(whole).trace(*place.placed(*ARRAYS, DESCRIPTIONS[description]))


@pytest.mark.parametrize("description", DESCRIPTIONS)
def test_every_description_inside_shard_map(description):
    check("shard_map", description, "xla", jit=True)


@pytest.mark.parametrize("name", PLACES)
def test_counts_of_gates_everywhere(name):
    check(name, "contextual, own gates", "xla", jit=True)


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        *(("xla", n) for n in ("auto, two axes", "auto, an axis of one", "explicit, two axes")),
        ("reference", "explicit, two axes"),
        (None, "auto, two axes"),
    ],
)
def test_eagerly_under_a_mesh(implementation, name):
    check(name, "none" if implementation is None else "contextual", implementation, jit=False)


@pytest.mark.parametrize("name", PLACES)
def test_without_a_bias_by_default_everywhere(name):
    check(name, "none", None, jit=True)


# Auto axes: tests/kernels/test_tpu.py.
@pytest.mark.parametrize(
    ("description", "name"),
    [
        ("relative", "explicit, two axes"),
        *(("contextual, own gates", name) for name in ("explicit, two axes", "shard_map", "pmap")),
    ],
)
def test_the_tpu_kernels(description, name):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        check(name, description, "tpu", jit=True)


def test_the_module_has_every_description():
    found = {type(bias) for bias in DESCRIPTIONS.values() if bias is not None}
    public = [getattr(posjax, name) for name in dir(posjax)]
    known = {x for x in public if isinstance(x, type) and issubclass(x, posjax.Bias)}
    assert found == known - {posjax.Bias}
