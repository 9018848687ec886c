import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax import dot_product_attention
from posjax.encodings import TAPE
from posjax.encodings.base import Side, Sizes
from posjax.encodings.rope import rotate
from posjax.encodings.tape import multiply_pairs, rotary_state

B, T, N, H, D, P = 2, 5, 3, 8, 6, 4
SIZES = Sizes(N, N, H)
PLACES = jnp.broadcast_to(jnp.arange(T), (B, T))
QUERY, KEY, VALUE = jax.random.normal(jax.random.key(0), (3, B, T, N, H))
CHANGE = jax.random.normal(jax.random.key(1), (B, T, D))


def random_params(seed=0):
    shapes = {"attention": (N, N), "up": (N, P), "inputs": (D, P), "down": (P, N)}
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=s), jnp.float32) for name, s in shapes.items()}


def one_layer(encoding, params, state):
    """Attention output and next state, by the hooks."""

    def call(module):
        sides = (Side(x, PLACES, state) for x in (QUERY, KEY))
        query, key = module.rotate(*sides)
        values = jnp.concatenate((VALUE, module.extra_values(state)), axis=-1)
        mixed = dot_product_attention(query, key, values, is_causal=True)
        return mixed[..., :H], module.update_state(state, CHANGE, mixed[..., H:])

    return encoding.apply({"params": params}, method=call)


def official_layer(params, cos, sin, mix_heads=False):
    """A transcription of the official layer: cos, sin [B, N, T, H] with both halves equal."""
    q, k, v = (np.moveaxis(np.asarray(x), 2, 1) for x in (QUERY, KEY, VALUE))
    half = lambda x: np.concatenate((-x[..., H // 2 :], x[..., : H // 2]), -1)  # noqa: E731
    q, k = (x * cos + half(x) * sin for x in (q, k))
    logits = np.where(np.tri(T, dtype=bool), q @ np.swapaxes(k, 2, 3) / np.sqrt(H), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = "bqnd,qe->bend" if mix_heads else "bqnd,qe->bqnd"
    after = []
    for e in (cos, sin):
        mix = np.asarray(params["attention"])
        # The matrix of the paper's form maps head k to head j as mix[j, k].
        e = e + np.einsum(mixed, weights @ e, mix.T if mix_heads else mix)
        x = np.asarray(CHANGE) @ np.asarray(params["inputs"])
        gate = np.moveaxis(x / (1 + np.exp(-x)), 2, 1)[..., None]
        wide = gate * np.einsum("bqnd,qe->bend", e, params["up"])
        after.append(e + np.einsum("bend,eq->bqnd", wide, params["down"]))
    return np.moveaxis(weights @ v, 1, 2), after


def both_halves(state):
    """[B, T, N, 2, H / 2] as the official cos and sin."""
    cos, sin = (np.moveaxis(np.asarray(state[..., part, :]), 2, 1) for part in (0, 1))
    return [np.concatenate((x, x), axis=-1) for x in (cos, sin)]


@pytest.mark.parametrize("mix_heads", [False, True])
def test_two_layers_equal_the_official_ones(mix_heads):
    encoding = TAPE(size=P, mix_heads=mix_heads)
    state = encoding.apply({}, PLACES, SIZES, method="init_state")
    cos, sin = both_halves(state)
    for seed in range(2):
        params = random_params(seed)
        output, state = one_layer(encoding, params, state)
        want, (cos, sin) = official_layer(params, cos, sin, mix_heads)
        np.testing.assert_allclose(output, want, atol=1e-4)
        for got, expected in zip(both_halves(state), (cos, sin), strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)


def test_starts_as_rope():
    encoding = TAPE()
    state = encoding.apply({}, PLACES, SIZES, method="init_state")
    np.testing.assert_allclose(multiply_pairs(QUERY, state), rotate(QUERY, PLACES), atol=1e-6)
    mixed = jnp.ones((B, T, N, H))
    variables = encoding.init(jax.random.key(0), state, CHANGE, mixed, method="update_state")
    shapes = {"attention": (N, N), "up": (N, 48), "inputs": (D, 48), "down": (48, N)}
    assert jax.tree.map(jnp.shape, variables["params"]) == shapes
    np.testing.assert_array_equal(
        encoding.apply(variables, state, CHANGE, mixed, method="update_state"), state
    )


def test_turning_all_states_by_one_angle_changes_nothing():
    """Relative only: the outputs stay and the next states are turned by the same angle."""
    params = random_params()
    here, there = (
        one_layer(TAPE(size=P), params, rotary_state(PLACES + shift, N, H)) for shift in (0, 7)
    )
    np.testing.assert_allclose(here[0], there[0], atol=1e-4)
    as_complex = lambda e: jax.lax.complex(e[..., 0, :], e[..., 1, :])  # noqa: E731
    angle = as_complex(rotary_state(jnp.array([[7]]), 1, H))
    np.testing.assert_allclose(as_complex(here[1]) * angle, as_complex(there[1]), atol=1e-3)


def test_grouped_heads_share_the_state_of_their_key_head():
    state = jax.random.normal(jax.random.key(2), (B, T, 1, 2, H // 2))
    mixed = jax.random.normal(jax.random.key(3), (B, T, N, H))
    params = {"attention": jnp.ones((1, 1)), "up": jnp.zeros((1, P))}
    params |= {"inputs": jnp.zeros((D, P)), "down": jnp.zeros((P, 1))}
    after = TAPE(size=P).apply({"params": params}, state, CHANGE, mixed, method="update_state")
    mean = jnp.mean(mixed, axis=2, keepdims=True).reshape(state.shape)
    np.testing.assert_allclose(after, state + mean, rtol=1e-5, atol=1e-6)


def test_training_shifts_the_whole_batch_by_one_number():
    def draw(seed, **settings):
        rngs = {"encoding": jax.random.key(seed)}
        tokens = jnp.zeros((B, T), jnp.int32)
        call = TAPE(**settings).apply
        return call({}, tokens, PLACES, method="positions", rngs=rngs, deterministic=False)[0]

    shifts = jnp.stack([draw(seed, max_shift=3)[0, 0] for seed in range(40)])
    assert set(shifts.tolist()) == {0, 1, 2, 3}
    assert len(set((draw(0) - PLACES).ravel().tolist())) == 1
    np.testing.assert_array_equal(draw(0, max_shift=0), PLACES)


def test_an_odd_head_is_refused():
    with pytest.raises(ValueError, match="head_size is 7"):
        rotary_state(PLACES, 1, 7)
