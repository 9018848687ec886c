import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax import BiasSum, RelativeBias
from posjax.encodings import (
    T5,
    TAPE,
    Abacus,
    ALiBi,
    Combine,
    CoPE,
    Learned,
    RoPE,
    Sinusoidal,
)
from posjax.encodings.base import PositionEncoding, Side, Sizes
from posjax.encodings.rope import rotate

TOKENS = jnp.array([list(b"12+3")])
PLACES = jnp.arange(4)[None]
X = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))


SIZES = Sizes(heads=2, kv_heads=2, head_size=8)


class Gain(PositionEncoding):
    """Multiplies embeddings, query and key: does not commute with addition."""

    factor: float = 2.0

    def embed(self, embeddings, indices):
        return self.factor * embeddings

    def rotate(self, query, key):
        return self.factor * query.x, key.x + 1

    def cache(self, inputs, sizes, state=None):
        return self.factor


def test_each_part_has_its_own_indices_and_carry():
    combined = Combine((Abacus(), RoPE(), Abacus(digits=(ord("+"),))))
    indices, carry = combined.apply({}, TOKENS, PLACES, method="positions")
    np.testing.assert_array_equal(
        jnp.stack(indices), [[[1, 2, 0, 1]], [[0, 1, 2, 3]], [[0, 0, 1, 0]]]
    )
    assert jax.tree.map(lambda x: x.tolist(), carry) == ([1], None, [0])
    after, _ = combined.apply({}, TOKENS[:, :1], PLACES[:, :1] + 4, carry, method="positions")
    assert jax.tree.map(lambda x: x.tolist(), after) == ([[2]], [[4]], [[0]])


def test_parts_embed_and_rotate_in_order():
    x = jnp.ones((1, 4, 2))
    waves = Sinusoidal().apply({}, jnp.zeros_like(x), PLACES, method="embed")
    for parts, want in (
        ((Sinusoidal(), Gain()), 2 * (1 + waves)),
        ((Gain(), Sinusoidal()), 2 + waves),
    ):
        out = Combine(parts).apply({}, x, (PLACES, PLACES), method="embed")
        np.testing.assert_allclose(out, want, rtol=1e-6)
    query, key = Combine((RoPE(), Gain())).apply(
        {}, Side(X, (PLACES,) * 2), Side(X, (PLACES,) * 2), method="rotate"
    )
    np.testing.assert_allclose(query, 2 * rotate(X, PLACES), rtol=1e-6)
    np.testing.assert_allclose(key, rotate(X, PLACES) + 1, rtol=1e-6)


def test_parts_act_on_their_own_indices():
    indices = PLACES, PLACES[:, ::-1] + 9
    x = jnp.zeros((1, 4, 2))
    waves = [Sinusoidal().apply({}, x, i, method="embed") for i in indices]
    both = Combine((Sinusoidal(), Sinusoidal())).apply({}, x, indices, method="embed")
    np.testing.assert_allclose(both, waves[0] + waves[1], rtol=1e-6)
    turn = Combine((RoPE(), RoPE())).apply(
        {}, Side(X, indices), Side(X, indices[::-1]), method="rotate"
    )
    np.testing.assert_allclose(turn[0], rotate(X, sum(indices)), atol=1e-4)
    np.testing.assert_allclose(turn[1], rotate(X, sum(indices)), atol=1e-4)
    bias = Combine((ALiBi(), ALiBi())).apply(
        {}, Side(X, indices), Side(X, indices[::-1]), method="bias"
    )
    for part, queries, keys in zip(bias.parts, indices, indices[::-1], strict=True):
        np.testing.assert_array_equal(part.query_positions, queries)
        np.testing.assert_array_equal(part.key_positions, keys)


def bias_of(*parts, shared=None, memory=None):
    side = Side(X, (PLACES,) * len(parts), memory, X)
    return Combine(parts).apply({}, side, side, shared, method="bias")


def test_biases_are_summed():
    assert bias_of(RoPE(), Sinusoidal()) is None
    assert isinstance(bias_of(RoPE(), ALiBi()), RelativeBias)
    both = bias_of(ALiBi(), RoPE(), ALiBi())
    assert isinstance(both, BiasSum)
    context = {"scale": 1.0, "allowed": None, "query_positions": None, "key_positions": None}
    np.testing.assert_allclose(
        both.dense(X, X, **context), 2 * bias_of(ALiBi()).dense(X, X, **context)
    )


def test_memory_and_shared_reach_their_part():
    table = jnp.ones((32, 2))
    assert bias_of(RoPE(), T5(), shared=(None, table)).params is table
    combined = Combine((Gain(), RoPE(), Gain(3.0)))
    assert combined.apply({}, X[..., 0], SIZES, method="cache") == (2.0, None, 3.0)
    combined = Combine((T5(), T5(num_buckets=8)))
    shared, variables = combined.init_with_output(jax.random.key(0), SIZES, method="shared")
    assert [table.shape for table in shared] == [(32, 2), (8, 2)]
    assert sorted(variables["params"]) == ["encodings_0", "encodings_1"]


def test_parts_of_one_kind_have_their_own_parameters():
    part = Learned(max_length=4)
    x, places = jnp.zeros((1, 4, 2)), (PLACES, PLACES)
    params = Combine((part, part)).init(jax.random.key(0), x, places, method="embed")["params"]
    assert sorted(params) == ["encodings_0", "encodings_1"]
    assert not np.allclose(params["encodings_0"]["table"], params["encodings_1"]["table"])


def test_combinations_nest():
    nested = Combine((Abacus(), Combine((RoPE(), ALiBi()))))
    indices, _ = nested.apply({}, TOKENS, PLACES, method="positions")
    assert jax.tree.map(jnp.shape, indices) == ((1, 4), ((1, 4), (1, 4)))
    bias = nested.apply({}, Side(X, indices), Side(X, indices), method="bias")
    assert isinstance(bias, RelativeBias)


def test_one_causal_part_makes_it_causal():
    assert not Combine((RoPE(), ALiBi())).is_causal_only
    assert Combine((RoPE(), CoPE())).is_causal_only


def test_at_most_one_part_carries_a_state():
    state = TAPE().apply({}, PLACES, SIZES, method="init_state")
    values = Combine((RoPE(), TAPE())).apply({}, (None, state), method="extra_values")
    assert values.shape == (1, 4, 2, 8)
    with pytest.raises(NotImplementedError, match="one part"):
        Combine((TAPE(), TAPE())).apply({}, (state, state), method="extra_values")


def test_layers_have_the_parts_own_forms():
    combined = Combine((CoPE(every=2), RoPE()))
    assert combined.layer(1, 4) == combined
    assert type(combined.layer(0, 4).encodings[0]) is PositionEncoding
    assert combined.layer(0, 4).encodings[1] == RoPE()


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ((RoPE(), CoPE()), "extrapolates"),
        ((CoPE(), T5()), "clips"),
        ((RoPE(), Learned()), "raises"),
    ],
)
def test_far_positions_are_as_the_strictest_part_has_them(parts, word):
    assert Combine(parts).beyond == word
