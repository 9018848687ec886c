import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import posjax.kernels.blocks
from posjax import ArrayBias, BiasSum, ContextualBias, RelativeBias, dot_product_attention
from posjax.biases.base import Bias
from posjax.biases.running import ForgettingBias, StickBreakingBias
from posjax.biases.scaled import ScaledBias
from posjax.encodings import T5, ALiBi, CoPE, RoPE, Temperature
from posjax.encodings.base import Side, Sizes

X, Y, Z = jax.random.normal(jax.random.key(0), (3, 1, 13, 2, 8))
PLACES = jnp.arange(13)[None]
CAUSAL = jnp.tril(jnp.ones((13, 13), bool))[None, None]
CONTEXT = {
    "scale": 8**-0.5,
    "allowed": CAUSAL,
    "query_positions": PLACES,
    "key_positions": PLACES,
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    sizes = posjax.kernels.blocks.Blocks(4, 4)
    monkeypatch.setattr(posjax.kernels.blocks, "blockwise_sizes", lambda queries, keys: sizes)


def attend(encoding, variables, inputs, implementation):
    query, key, value = inputs

    query, key = encoding.apply(variables, Side(query, PLACES), Side(key, PLACES), method="rotate")
    bias = encoding.apply(
        variables, Side(query, PLACES), Side(key, PLACES, value=value), method="bias"
    )
    return dot_product_attention(
        query, key, value, bias, is_causal=True, implementation=implementation
    )


def literal(encoding, variables, inputs, tau):
    """Softmax of the inner encoding's logits over tau."""
    query, key, value = inputs
    query, key = encoding.apply(variables, Side(query, PLACES), Side(key, PLACES), method="rotate")
    bias = encoding.apply(
        variables, Side(query, PLACES), Side(key, PLACES, value=value), method="bias"
    )
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest") * 8**-0.5
    logits = logits + bias.dense(query, key, **CONTEXT)
    logits = jnp.where(CAUSAL, logits / tau, -1e30)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), value, precision="highest")


CASES = {
    "alibi": (ALiBi(), {}),
    "t5": (
        T5(share_layers=False),
        {"table": jax.random.normal(jax.random.key(1), (32, 2))},
    ),
    "cope": (
        CoPE(num_positions=4),
        {"table": jax.random.normal(jax.random.key(2), (4, 8))},
    ),
}


@pytest.mark.parametrize(("name", "tau"), [("alibi", 0.5), ("t5", 1.7), ("cope", 0.5)])
def test_values_and_gradients_are_those_of_logits_over_tau(name, tau):
    inner, params = CASES[name]
    encoding = Temperature(inner, temperature=tau)

    def loss(params, inputs, implementation):
        variables = {"params": {"encoding": params}} if params else {}
        output = attend(encoding, variables, inputs, implementation)
        return jnp.sum(jnp.sin(output)), output

    def wanted(params, inputs):
        output = literal(inner, {"params": params} if params else {}, inputs, tau)
        return jnp.sum(jnp.sin(output)), output

    inputs = (X, Y, Z)
    want, output = jax.jit(jax.grad(wanted, argnums=(0, 1), has_aux=True))(params, inputs)
    for implementation in ("reference", "xla"):
        grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
        got, same = grad(params, inputs, implementation)
        np.testing.assert_allclose(same, output, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


def test_without_a_bias_only_the_query_changes():
    encoding = Temperature(RoPE(), temperature=0.5)
    query, key = encoding.apply({}, Side(X, PLACES), Side(Y, PLACES), method="rotate")
    plain, turned = RoPE().apply({}, Side(X, PLACES), Side(Y, PLACES), method="rotate")
    np.testing.assert_allclose(query, 2 * plain, rtol=1e-6)
    np.testing.assert_array_equal(key, turned)
    assert encoding.apply({}, Side(X, PLACES), Side(X, PLACES), method="bias") is None


def test_t5_inside_shares_its_table_as_alone():
    variables = Temperature().init(jax.random.key(0), Sizes(3, 3, 8), method="shared")
    assert jax.tree.map(jnp.shape, variables) == {"params": {"encoding": {"table": (32, 3)}}}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Values(Bias):
    """A description that only adds query times weight sums to the values."""

    has_values: ClassVar = True

    def dense(self, query, key, **context):
        return jnp.zeros((1, 1, 1, 1))

    def tile(self, rows, tile, carry):
        return jnp.zeros((1, 1, 1, 1)), None

    def weigh(self, rows, tile, weights):
        sums = jnp.sum(weights * tile.dots, axis=-1, keepdims=True)
        return tile.query.astype(jnp.float32) * sums


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_what_is_added_to_values_is_not_scaled(implementation):
    def call(query, bias):
        return dot_product_attention(
            query, Y, Z, bias, is_causal=True, scale=1.0, implementation=implementation
        )

    # Queries twice as large whose originals are seen: as large queries, weights at half of them.
    got = call(2 * X, ScaledBias(Values(), factor=3.0, query_factor=2.0))
    logits = jnp.where(CAUSAL, jnp.einsum("btnh,bsnh->bnts", 2 * X, Y, precision="highest"), -1e30)
    weights = jax.nn.softmax(logits)
    dots = jnp.einsum("btnh,bsnh->bnts", X, Y, precision="highest")
    sums = jnp.moveaxis(jnp.sum(weights * dots, axis=-1), 1, 2)[..., None]
    want = jnp.einsum("bnts,bsnh->btnh", weights, Z, precision="highest") + X * sums
    np.testing.assert_allclose(got, want, atol=5e-5)


def test_a_scaled_description_keeps_what_its_inner_one_is():
    table = jax.random.normal(jax.random.key(1), (4, 8))
    distance = RelativeBias(
        CASES["alibi"][0].apply({}, Side(X, PLACES), Side(X, PLACES), method="bias").function
    )
    inner = BiasSum((ContextualBias(table), distance))
    scaled = ScaledBias(inner, 2.0)
    assert scaled.has_state
    assert scaled.uses_softmax
    assert not scaled.zero_once_finished
    assert not scaled.has_values
    dense = scaled.dense(X, Y, **CONTEXT)
    np.testing.assert_allclose(dense, 2 * inner.dense(X, Y, **CONTEXT), rtol=1e-6)
    array = ScaledBias(ArrayBias(dense), 0.5)
    got = dot_product_attention(X, Y, Z, array, is_causal=True, implementation="xla")
    want = dot_product_attention(X, Y, Z, inner, is_causal=True, implementation="reference")
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("factor", [0.01, 1.0, 2.0])
def test_forgotten_keys_come_back_where_logits_shrink(factor):
    """A gate of exp(-60) hides all keys before it, unless its bias is scaled down."""
    gates = jnp.zeros((1, 13, 2)).at[0, ::3].set(-60.0)
    bias = ScaledBias(ForgettingBias(gates), factor)
    assert bias.zero_once_finished == (factor >= 1)
    got = dot_product_attention(X, Y, Z, bias, is_causal=True, implementation="xla")
    dense = ArrayBias(bias.dense(X, Y, **CONTEXT))
    want = dot_product_attention(X, Y, Z, dense, is_causal=True, implementation="reference")
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_an_encoding_without_softmax_is_refused():
    with pytest.raises(ValueError, match="StickBreakingBias has no softmax"):
        dot_product_attention(X, Y, Z, ScaledBias(StickBreakingBias(), 2.0), is_causal=True)


@pytest.mark.parametrize("field", ["factor", "query_factor"])
def test_factors_are_positive(field):
    bias = ScaledBias(ArrayBias(jnp.zeros((1, 1, 13, 13))), **{"factor": 1.0} | {field: 0.0})
    with pytest.raises(ValueError, match=f"ScaledBias.{field} is 0.0; it must be above 0"):
        dot_product_attention(X, Y, Z, bias, is_causal=True)
