"""Derivatives beyond the gradient, export with symbolic sizes, and 64 bits."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from posjax import ContextualBias, dot_product_attention
from tests.descriptions import ARRAYS, DESCRIPTIONS, floats

every = pytest.mark.parametrize("description", DESCRIPTIONS)


def attend(query, key, value, bias, implementation="xla", **settings):
    return dot_product_attention(
        query, key, value, bias, is_causal=True, implementation=implementation, **settings
    )


def loss(implementation, description):
    """A function of query, key and value."""

    def of(query, key, value):
        bias = DESCRIPTIONS[description]
        return jnp.sum(jnp.sin(attend(query, key, value, bias, implementation)))

    return of


def hessian_product(function, direction):
    """The gradient's derivative in a direction, forward over reverse."""
    gradient = jax.grad(function, argnums=(0, 1, 2))
    return jax.jit(lambda *arrays: jax.jvp(gradient, arrays, direction)[1])


@every
def test_products_with_a_hessian(description):
    direction = tuple(jnp.cos(x) for x in ARRAYS)
    want = hessian_product(loss("reference", description), direction)(*ARRAYS)
    got = hessian_product(loss("xla", description), direction)(*ARRAYS)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3 * float(jnp.max(jnp.abs(b))))


def refused(transform, description):
    with pytest.raises(NotImplementedError, match='implementation="reference"'):
        transform(loss("xla", description))
    transform(loss("reference", description))


@pytest.mark.parametrize("description", ["none", "contextual"])
@pytest.mark.parametrize("jit", [False, True])
def test_forward_mode_is_refused_with_what_can(description, jit):
    wrap = jax.jit if jit else lambda function: function
    refused(lambda f: jax.jvp(wrap(f), ARRAYS, ARRAYS), description)
    refused(lambda f: wrap(jax.jacfwd(f))(*ARRAYS), description)


@pytest.mark.parametrize(("description", "jit"), [("none", False), ("contextual", True)])
def test_a_second_backward_pass_is_refused_with_what_can(description, jit):
    wrap = jax.jit if jit else lambda function: function

    def twice(f):
        inner = jax.grad(f)
        return wrap(jax.grad(lambda *arrays: jnp.sum(inner(*arrays) ** 2)))(*ARRAYS)

    refused(twice, description)


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit, jax.vmap])
def test_gradients_inside_other_transformations(wrap):
    bias = DESCRIPTIONS["contextual"]
    own = lambda *arrays: attend(*arrays, bias)  # noqa: E731
    if wrap is jax.vmap:
        own = lambda *arrays: attend(*(x[None] for x in arrays), bias)[0]  # noqa: E731
    function = lambda *arrays: jnp.sum(jnp.sin(wrap(own)(*arrays)))  # noqa: E731
    got = jax.grad(function, argnums=(0, 1, 2))(*ARRAYS)
    want = jax.grad(loss("reference", "contextual"), argnums=(0, 1, 2))(*ARRAYS)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("has_bias", [False, True])
def test_export_with_symbolic_batch_and_length(has_bias):
    table = jnp.ones((5, 8)) * jnp.arange(5.0)[:, None]

    def run(query, key, value):
        bias = ContextualBias(table) if has_bias else None
        return dot_product_attention(query, key, value, bias, is_causal=True)

    symbols = export.symbolic_shape("b, t")
    of = lambda heads: jax.ShapeDtypeStruct((*symbols, heads, 8), jnp.float32)  # noqa: E731
    exported = export.export(jax.jit(run))(of(4), of(2), of(2))
    for batch, length in ((1, 5), (3, 300)):
        keys = jax.random.split(jax.random.key(length), 3)
        arrays = [
            jax.random.normal(key, (batch, length, heads, 8))
            for key, heads in zip(keys, (4, 2, 2), strict=True)
        ]
        want = attend(*arrays, ContextualBias(table) if has_bias else None, "reference")
        np.testing.assert_allclose(exported.call(*arrays), want, atol=1e-5)


def test_export_of_gradients_with_a_symbolic_length():
    def run(query, key, value):
        out = lambda *arrays: jnp.sum(dot_product_attention(*arrays, is_causal=True))  # noqa: E731
        return jax.grad(out)(query, key, value)

    (length,) = export.symbolic_shape("t")
    of = jax.ShapeDtypeStruct((2, length, 2, 8), jnp.float32)
    exported = export.export(jax.jit(run))(of, of, of)
    arrays = [jax.random.normal(jax.random.key(i), (2, 33, 2, 8)) for i in range(3)]
    np.testing.assert_allclose(exported.call(*arrays), run(*arrays), atol=1e-5)


def test_64_bits(tmp_path):
    """Gradients of every description, in float32 and float64; indices are 64 bits wide there."""
    program = "from tests.test_transformations import in_64_bits; in_64_bits()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def in_64_bits():
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    for name, bias in DESCRIPTIONS.items():
        # Indices of 64 bits meet those of 32 bits while a function is traced.
        narrow = jax.jit(_gradient("xla")).trace(*_of_type(jnp.float32, bias)).out_info
        assert all(x.dtype == jnp.float32 for x in floats(narrow)), name
        arrays = _of_type(jnp.float64, bias)
        found = (floats(jax.jit(_gradient(who))(*arrays)) for who in ("xla", "reference"))
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype == jnp.float64, (name, a.dtype)
            worst = float(jnp.max(jnp.abs(a - b)))
            assert worst < 1e-10, (name, worst)


def _gradient(implementation):
    run = functools.partial(attend, implementation=implementation)
    total = lambda *arrays: jnp.sum(jnp.sin(run(*arrays)))  # noqa: E731
    return jax.grad(total, argnums=(0, 1, 2, 3), allow_int=True)


def _of_type(dtype, bias):
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    arrays, own = jax.tree.map(cast, (ARRAYS, bias))
    return *arrays, own
