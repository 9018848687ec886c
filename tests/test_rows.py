"""One rule for rows and for NaN, the same in all implementations.

A row without any weight gives 0 and gradients of 0; finite logits, however low, have their softmax;
NaN never turns into a healthy number.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax import dot_product_attention
from tests.descriptions import ARRAYS, DESCRIPTIONS, floats

IMPLEMENTATIONS = ["reference", "xla"]
each = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
LOWEST = float(jnp.finfo(jnp.float32).min)


def hidden_row(how: str) -> dict:
    """Arguments that leave query 3 without any weight."""
    seen = jnp.ones((1, 1, 9, 9), bool).at[:, :, 3].set(False)
    if how == "mask":
        return {"mask": seen}
    if how == "float mask":
        return {"mask": seen.astype(jnp.float32)}
    if how == "bias":
        return {"bias": jnp.where(seen, 0.0, -jnp.inf)}
    if how == "window and segments":
        ids = jnp.zeros((1, 9), jnp.int32)
        return {"query_segment_ids": ids.at[:, 3].set(1), "key_segment_ids": ids}
    half = (jnp.arange(9) < 5)[None, None, None]
    return {"bias": jnp.where(seen | half, 0.0, -jnp.inf), "mask": seen | ~half}


@each
@pytest.mark.parametrize(
    "how", ["mask", "float mask", "bias", "window and segments", "mask and bias together"]
)
def test_a_row_without_weight_is_zero_and_moves_nothing(how, implementation):
    run = functools.partial(
        dot_product_attention, implementation=implementation, return_residual=True
    )

    def total(arrays, settings):
        output, lse = run(*arrays, **settings)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.where(jnp.isinf(lse), 0.0, lse)), output

    settings = hidden_row(how)
    bias = {"bias": settings.pop("bias")} if "bias" in settings else {}
    of = lambda arrays, bias: total(arrays, settings | bias)  # noqa: E731
    gradient = jax.grad(of, argnums=(0, 1), has_aux=True)
    (of_arrays, of_bias), output = jax.jit(gradient)(ARRAYS, bias)
    assert bool(jnp.all(output[:, 3] == 0)) and bool(jnp.all(of_arrays[0][:, 3] == 0))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in floats((output, of_arrays, of_bias)))
    assert float(jnp.min(jnp.abs(output[:, 2]))) > 0
    _, lse = run(*ARRAYS, **settings, **bias)
    assert bool(jnp.all(lse[:, 3] == -jnp.inf)) and bool(jnp.all(jnp.isfinite(lse[:, 2])))


@each
@pytest.mark.parametrize("low", [-1e30, -2e38, LOWEST])
def test_low_logits_have_their_softmax(low, implementation):
    bias = jnp.full((1, 1, 9, 9), low).at[:, :, :, 5:].set(2 * max(low, LOWEST / 2))
    got = dot_product_attention(*ARRAYS, bias, implementation=implementation)
    want = jax.nn.dot_product_attention(*ARRAYS, bias)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert float(jnp.max(jnp.abs(want))) > 0.1


def attend(arrays, bias, implementation):
    return dot_product_attention(*arrays, bias, is_causal=True, implementation=implementation)


def spoiled(tree, number: int):
    """The tree with its floating-point array of this number all NaN."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    leaves[places[number]] = jnp.full_like(leaves[places[number]], jnp.nan)
    return jax.tree.unflatten(structure, leaves)


NAMES = [(name, i) for name, bias in DESCRIPTIONS.items() for i in range(len(floats(bias)))]


@each
@pytest.mark.parametrize("name, number", NAMES)
def test_nan_in_a_description_reaches_the_output(name, number, implementation):
    output = attend(ARRAYS, spoiled(DESCRIPTIONS[name], number), implementation)
    # The first rows may not need it: pairs of a token with itself, and near ones.
    assert bool(jnp.all(jnp.isnan(output[:, 4:])))


@each
@pytest.mark.parametrize("name", ["none", "contextual", "stick-breaking"])
@pytest.mark.parametrize("number", range(3))
def test_nan_in_query_key_or_value_reaches_the_output(number, name, implementation):
    output = attend(spoiled(ARRAYS, number), DESCRIPTIONS[name], implementation)
    assert bool(jnp.all(jnp.isnan(output[:, 4:])))


@each
def test_one_nan_spoils_the_rows_that_see_it_alike(implementation):
    """A gate key of one token: its count, and so the bias, of every query behind it."""
    bias = DESCRIPTIONS["contextual, own gates"]
    spoilt = jax.tree.map(lambda x: x.at[:, 4].set(jnp.nan) if x.ndim == 4 else x, bias)
    output = attend(ARRAYS, spoilt, implementation)
    assert bool(jnp.all(jnp.isnan(output[:, 4:]))) and bool(jnp.all(jnp.isfinite(output[:, :4])))
