"""CoPE as an encoding: its settings, and agreement with independent code."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

from posjax import dot_product_attention
from posjax.encodings import CoPE
from posjax.encodings.base import PositionEncoding, Side, Sizes
from posjax.models import Transformer, TransformerConfig

SIZE = 8


def attend(encoding: CoPE, variables=None, length=12, heads=4, kv_heads=2, implementation="xla"):
    """Output of attention with the encoding's bias, and its variables."""
    keys = jax.random.split(jax.random.key(3), 4)
    query = jax.random.normal(keys[0], (2, length, heads, SIZE))
    key, value = (jax.random.normal(k, (2, length, kv_heads, SIZE)) for k in keys[1:3])
    inputs = jax.random.normal(keys[3], (2, length, 16))
    index = jnp.broadcast_to(jnp.arange(length), (2, length))

    def call(module):
        memory = module.cache(inputs, Sizes(heads, kv_heads, SIZE))
        shared = module.shared(Sizes(heads, kv_heads, SIZE))
        sides = Side(query, index, memory), Side(key, index, memory, value)
        bias = module.bias(*sides, shared)
        return dot_product_attention(
            query, key, value, bias, is_causal=True, implementation=implementation
        )

    if variables is None:
        variables = encoding.init(jax.random.key(0), method=call)
    return encoding.apply(variables, method=call), variables


SETTINGS = {
    "default": ({}, {"table": (64, SIZE)}),
    "per head": ({"per_head": True, "num_positions": 5}, {"table": (4, 5, SIZE)}),
    "trained gate bias": ({"train_gate_bias": True}, {"table": (64, SIZE), "gate_bias": (4,)}),
    "value gates": ({"gate_source": "value"}, {"table": (64, SIZE)}),
    "ones": ({"gate_source": "ones"}, {"table": (64, SIZE)}),
    "shared table": ({"share_layers": True}, {"table": (64, SIZE)}),
}


@pytest.mark.parametrize("settings, shapes", SETTINGS.values(), ids=SETTINGS)
def test_parameters(settings, shapes):
    _, variables = attend(CoPE(**settings))
    assert {name: x.shape for name, x in variables["params"].items()} == shapes


def test_a_gate_key_of_its_own_is_a_projection_of_the_layers_input():
    _, variables = attend(CoPE(gate_source="key"))
    assert variables["params"]["gate_projection"]["projection"]["kernel"].shape == (16, 2, SIZE)


@pytest.mark.parametrize(
    "settings", [s for s, _ in SETTINGS.values()] + [{"gate_source": "key"}, {"scaled": True}]
)
def test_implementations_agree(settings):
    encoding = CoPE(**({"num_positions": 4, "gate_bias": 0.5} | settings))
    want, variables = attend(encoding, implementation="reference")
    np.testing.assert_allclose(attend(encoding, variables)[0], want, atol=1e-5)


def test_the_published_setting_starts_as_no_encoding():
    encoding = CoPE.paper()
    output, variables = attend(encoding)
    assert (
        jnp.all(variables["params"]["table"] == 0)
        and encoding.gate_bias == 0.0
        and not encoding.scaled
    )
    np.testing.assert_allclose(output, attend(CoPE(table_deviation=0.0))[0], atol=1e-6)


def test_the_default_table_has_its_deviation():
    _, variables = attend(CoPE(num_positions=512))
    assert float(jnp.std(variables["params"]["table"])) == pytest.approx(0.1, rel=0.05)


def test_scaled_divides_the_position_term_by_the_root_of_the_head_size():
    output, variables = attend(CoPE(scaled=True))
    smaller = {"params": {"table": variables["params"]["table"] / math.sqrt(SIZE)}}
    np.testing.assert_allclose(output, attend(CoPE(), smaller)[0], atol=1e-5)


def test_a_fixed_gate_bias_moves_the_count():
    wide, variables = attend(CoPE(gate_bias=-4.0))
    assert not jnp.allclose(wide, attend(CoPE(gate_bias=0.0), variables)[0], atol=1e-3)


def test_a_trained_gate_bias_gets_a_gradient():
    encoding = CoPE(train_gate_bias=True, num_positions=8)
    _, variables = attend(encoding)
    grad = jax.grad(lambda v: jnp.sum(attend(encoding, v)[0] ** 2))(variables)["params"][
        "gate_bias"
    ]
    assert jnp.all(grad != 0)


def test_a_model_with_it_runs_in_nnx():
    tokens = jnp.zeros((1, 5), jnp.int32)
    linen = Transformer(TransformerConfig(), 7, CoPE())
    model = bridge.ToNNX(linen, rngs=nnx.Rngs(0))
    bridge.lazy_init(model, tokens)
    assert model(tokens).shape == (1, 5, 7)


@pytest.mark.parametrize("positions", [3, 32])
def test_agrees_with_x_transformers(positions):
    """Values and gradients of the whole attention, in float32."""
    reason = "agreement with x-transformers' CoPE needs torch and x-transformers"
    torch = pytest.importorskip("torch", reason=reason)
    theirs = pytest.importorskip("x_transformers.x_transformers", reason=reason).CoPE(
        SIZE, 2, positions
    )
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value = (jax.random.normal(k, (2, 10, 2, SIZE)) for k in keys[:3])
    table = jax.random.normal(keys[3], (positions, SIZE))

    def ours(query, key, value, table):
        bias = CoPE(num_positions=positions, gate_bias=0.0).apply(
            {"params": {"table": table}}, Side(query, None), Side(key, None), method="bias"
        )
        return dot_product_attention(query, key, value, bias, is_causal=True, implementation="xla")

    weights = jnp.cos(jnp.arange(2 * 10 * 2 * SIZE, dtype=jnp.float32)).reshape(2, 10, 2, SIZE)
    loss = lambda *x: jnp.sum(ours(*x) * weights)  # noqa: E731
    want_output, want = (
        ours(query, key, value, table),
        jax.grad(loss, argnums=(0, 1, 2, 3))(query, key, value, table),
    )

    tensors = [torch.tensor(np.asarray(x), requires_grad=True) for x in (query, key, value, table)]
    theirs.pos_emb = torch.nn.Parameter(tensors[3].detach().clone())
    q, k, v = (x.transpose(1, 2) for x in tensors[:3])
    mask = torch.ones(10, 10, dtype=torch.bool).triu(1)
    logits = (q @ k.transpose(-1, -2) * SIZE**-0.5).masked_fill(
        mask, -torch.finfo(torch.float32).max
    )
    output = ((logits + theirs(q, logits)).softmax(-1) @ v).transpose(1, 2)
    (output * torch.tensor(np.asarray(weights))).sum().backward()
    np.testing.assert_allclose(want_output, output.detach().numpy(), atol=1e-5)
    theirs_grads = [x.grad for x in tensors[:3]] + [theirs.pos_emb.grad]
    for a, b in zip(want, theirs_grads, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-4)


def test_a_shared_table_comes_from_outside():
    side, table = Side(jnp.ones((1, 3, 2, SIZE)), jnp.arange(3)[None]), jnp.ones((64, SIZE))
    bias = CoPE(share_layers=True).apply({}, side, side, table, method="bias")
    assert bias.table is table


def test_every_third_layer():
    encoding = CoPE(every=3)
    kinds = [type(encoding.layer(index, 7)) for index in range(7)]
    # The official code: (index + 1) % 3 == 0.
    assert [kind is CoPE for kind in kinds] == [False, False, True] * 2 + [False]
    assert kinds[1] is PositionEncoding
