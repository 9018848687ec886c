"""Descriptions with tables of relative positions: loops over their formulas, and blocks of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import posjax.kernels.blocks
from posjax import BiasSum, ContextualBias, dot_product_attention
from posjax.biases.tables import ClippedTableBias, MultiplierBias, look_up

BATCH, LENGTH, HEADS, KV_HEADS, SIZE = 2, 11, 4, 2, 3
CLIP = (3, 2)
ROWS = sum(CLIP) + 1
# Two packed segments, and a gap.
PLACES = np.array([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3], [0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 14]])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


QUERY = normal(0, BATCH, LENGTH, HEADS, SIZE)
KEY, VALUE = normal(1, 2, BATCH, LENGTH, KV_HEADS, SIZE)
EXACT = [np.asarray(x, np.float64) for x in (QUERY, KEY, VALUE)]


def row_of(relative, clip=CLIP):
    """The weights of the table's rows for one relative position: one row, or two neighbours."""
    place = min(max(relative, -clip[0]), clip[1]) + clip[0]
    below = int(np.floor(place))
    fraction = place - below
    return [(below, 1 - fraction)] + ([(below + 1, fraction)] if fraction else [])


def literal(terms, places=PLACES, clip=CLIP, scale=SIZE**-0.5):
    """Attention by loops: `terms(b, n, i, j, {row: weight})` gives logit and value, in float64."""
    output = np.zeros((BATCH, LENGTH, HEADS, SIZE))
    for b, n, i in np.ndindex(BATCH, HEADS, LENGTH):
        logits, values = [], []
        for j in range(i + 1):
            logit, value = terms(b, n, i, j, row_of(float(places[b, j] - places[b, i]), clip))
            logits.append(scale * logit)
            values.append(value)
        weights = np.exp(logits - np.max(logits))
        output[b, i, n] = weights @ np.array(values) / weights.sum()
    return output


def parts(b, n, i, j):
    group = n // (HEADS // KV_HEADS)
    return EXACT[0][b, i, n], EXACT[1][b, j, group], EXACT[2][b, j, group]


def of_head(table, n):
    return table if table.ndim == 2 else table[n]


def attend(bias, **settings):
    settings |= {"is_causal": True, "implementation": "reference"}
    return jax.jit(lambda b: dot_product_attention(QUERY, KEY, VALUE, b, **settings))(bias)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    sizes = posjax.kernels.blocks.Blocks(4, 4)
    monkeypatch.setattr(posjax.kernels.blocks, "blockwise_sizes", lambda queries, keys: sizes)


def shapes_of(per_head):
    return (HEADS, ROWS, SIZE) if per_head else (ROWS, SIZE)


def clipped(tables, places=PLACES, **settings):
    key = KEY if "key_table" in tables else None
    places = jnp.asarray(places)
    return ClippedTableBias(
        **tables, key=key, query_positions=places, key_positions=places, clip=CLIP, **settings
    )


def some_tables(names, per_head):
    return {f"{name}_table": normal(7 + n, *shapes_of(per_head)) for n, name in enumerate(names)}


NAMES = [("query",), ("key",), ("value",), ("query", "key"), ("query", "key", "value")]


@pytest.mark.parametrize("names", NAMES)
def test_clipped_tables_are_their_formula(names):
    tables = some_tables(names, per_head=len(names) == 2)
    exact = {name: np.asarray(table, np.float64) for name, table in tables.items()}

    def terms(b, n, i, j, rows):
        q, k, v = parts(b, n, i, j)
        vector = lambda name: sum(w * of_head(exact[name], n)[r] for r, w in rows)  # noqa: E731
        logit = q @ k
        logit += q @ vector("query_table") if "query" in names else 0
        logit += k @ vector("key_table") if "key" in names else 0
        return logit, v + vector("value_table") if "value" in names else v

    np.testing.assert_allclose(attend(clipped(tables)), literal(terms), atol=3e-6)


def test_unscaled_tables_stand_beside_the_scaled_product():
    tables = some_tables(("query",), per_head=False)
    doubled = {name: table * SIZE**0.5 for name, table in tables.items()}
    got, want = attend(clipped(tables, scaled=False)), attend(clipped(doubled))
    np.testing.assert_allclose(got, want, atol=3e-6)


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_the_attentions_scale_multiplies_tables(scale):
    tables = some_tables(("query", "key"), per_head=False)
    got = attend(clipped(tables), scale=scale)
    tile = attend(clipped({n: t * scale for n, t in tables.items()}, scaled=False), scale=scale)
    np.testing.assert_allclose(got, tile, atol=3e-6)


def test_fractions_lie_between_two_rows():
    tables = some_tables(("query", "key", "value"), per_head=False)
    exact = [np.asarray(table, np.float64) for table in tables.values()]
    places = PLACES * 0.4

    def terms(b, n, i, j, rows):
        q, k, v = parts(b, n, i, j)
        a, c, d = (sum(w * t[r] for r, w in rows) for t in exact)
        return q @ k + q @ a + k @ c, v + d

    places32 = np.asarray(places, np.float32)
    got = attend(clipped(tables, jnp.asarray(places32)))
    np.testing.assert_allclose(got, literal(terms, places32.astype(np.float64)), atol=5e-6)


CASES = {
    "clipped": lambda t: clipped(t),
    "multiplied": lambda t: MultiplierBias(
        t["w"], query_positions=jnp.asarray(PLACES), key_positions=jnp.asarray(PLACES), clip=CLIP
    ),
    "by channel": lambda t: MultiplierBias(
        t["w"], KEY, jnp.asarray(PLACES), jnp.asarray(PLACES), clip=CLIP, by_channel=True
    ),
    "sum": lambda t: BiasSum((clipped({"value_table": t["v"]}), ContextualBias(t["c"]))),
}
ARRAYS = {
    "clipped": lambda: some_tables(("query", "key", "value"), per_head=True),
    "multiplied": lambda: {"w": normal(3, HEADS, ROWS)},
    "by channel": lambda: {"w": normal(3, HEADS, ROWS, SIZE)},
    "sum": lambda: {"v": normal(3, ROWS, SIZE), "c": normal(4, 4, SIZE)},
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_parts_of_the_whole_with_its_gradients(case):
    def loss(tables, inputs, implementation):
        settings = {"is_causal": True, "implementation": implementation}
        output = dot_product_attention(*inputs, CASES[case](tables), **settings)
        return jnp.sum(jnp.sin(output)), output

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    arguments = ARRAYS[case](), (QUERY, KEY, VALUE)
    whole, blocks = grad(*arguments, "reference"), grad(*arguments, "xla")
    chex.assert_trees_all_close(blocks, whole, atol=2e-5)
    assert all(np.any(x) for x in jax.tree.leaves(whole[0][0]))


@pytest.mark.parametrize("name", ["query_table", "key_table", "value_table"])
def test_gradients_of_the_whole_against_finite_differences(name):
    tables = {name: normal(5, ROWS, SIZE)}
    loss = jax.jit(lambda t: jnp.sum(attend(clipped(t)) ** 2))
    grad = jax.grad(loss)(tables)[name]
    direction = normal(6, ROWS, SIZE)
    step = 1e-2
    ends = [loss({name: tables[name] + sign * step * direction}) for sign in (1, -1)]
    numeric = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(jnp.sum(grad * direction), numeric, rtol=5e-3)


@pytest.mark.parametrize("absolute", [False, True])
def test_multipliers_by_head_are_their_formula(absolute):
    clip = (0, 3) if absolute else CLIP
    w, places = normal(2, HEADS, sum(clip) + 1), jnp.asarray(PLACES)
    exact = np.asarray(w, np.float64)

    def terms(b, n, i, j, rows):
        q, k, v = parts(b, n, i, j)
        if absolute:
            rows = row_of(abs(float(PLACES[b, j] - PLACES[b, i])), clip)
        return sum(weight * exact[n, r] for r, weight in rows) * (q @ k), v

    bias = MultiplierBias(
        w, query_positions=places, key_positions=places, clip=clip, absolute=absolute
    )
    np.testing.assert_allclose(attend(bias), literal(terms, clip=clip), atol=3e-6)


@pytest.mark.parametrize("per_head", [False, True])
def test_multipliers_by_channel_are_their_formula(per_head):
    w, places = normal(2, *shapes_of(per_head)), jnp.asarray(PLACES)
    exact = np.asarray(w, np.float64)

    def terms(b, n, i, j, rows):
        q, k, v = parts(b, n, i, j)
        return np.sum(q * k * sum(weight * of_head(exact, n)[r] for r, weight in rows)), v

    bias = MultiplierBias(w, KEY, places, places, clip=CLIP, by_channel=True)
    np.testing.assert_allclose(attend(bias), literal(terms), atol=3e-6)


def test_blocks_beyond_the_table_are_its_ends():
    """The shortcut for far blocks, its gradient included, and blocks just at its border."""
    rows, weights = normal(0, 1, 2, 3, ROWS), normal(1, 1, 2, 3, 4)
    run = jax.jit(lambda relative: jax.vjp(lambda rows: look_up(rows, relative, CLIP), rows))
    pull_back = jax.jit(lambda pull: pull(weights)[0])
    for shift in (-40, -7, -6, -5, -1, 0, 3, 4, 5, 40):
        relative = (jnp.arange(4)[None, :] - jnp.arange(3)[:, None] + shift)[None]
        index = np.clip(np.asarray(relative), -CLIP[0], CLIP[1]) + CLIP[0]
        want, grad = np.zeros((1, 2, 3, 4), np.float32), np.zeros(rows.shape, np.float32)
        for n, i, j in np.ndindex(2, 3, 4):
            want[0, n, i, j] = rows[0, n, i, index[0, i, j]]
            grad[0, n, i, index[0, i, j]] += weights[0, n, i, j]
        found, pull = run(relative)
        np.testing.assert_array_equal(found, want)
        np.testing.assert_allclose(pull_back(pull), grad, atol=1e-6)


def test_tables_without_positions_use_those_of_the_call():
    tables = some_tables(("query", "value"), per_head=False)
    own = clipped(tables, np.broadcast_to(np.arange(LENGTH), (BATCH, LENGTH)))
    np.testing.assert_array_equal(attend(ClippedTableBias(**tables, clip=CLIP)), attend(own))


@pytest.mark.parametrize(
    ("bias", "words"),
    [
        (
            ClippedTableBias(normal(0, 5, SIZE), clip=CLIP),
            r"query_table with clip=\(3, 2\) has shape \(5, 3\); it must be \[6, 3\] or "
            r"\[4, 6, 3\]",
        ),
        (
            ClippedTableBias(value_table=normal(0, 6, 2), clip=CLIP),
            r"value_table .* has shape \(6, 2",
        ),
        (ClippedTableBias(key_table=normal(0, 6, 3), clip=CLIP), r"must be the keys, .* is None"),
        (
            ClippedTableBias(key_table=normal(0, 6, 3), key=QUERY, clip=CLIP),
            r"must be the keys, \(2, 11, 2, 3\); it is of shape \(2, 11, 4, 3\)",
        ),
        (ClippedTableBias(clip=(1, -1)), r"clip is \(1, -1\); it must be a tuple of 2 integers"),
        (MultiplierBias(normal(0, 4, 5), clip=CLIP), r"multipliers with clip.* has shape \(4, 5\)"),
        (MultiplierBias(normal(0, 4, 6), clip=CLIP, absolute=True), "its first number must be 0"),
        (MultiplierBias(normal(0, 6, 3), clip=CLIP, by_channel=True), "channels of keys, so `key`"),
        (
            MultiplierBias(normal(0, 6, 4), KEY, clip=CLIP, by_channel=True),
            "multipliers .* has shape",
        ),
    ],
)
def test_bad_arguments(bias, words):
    with pytest.raises(ValueError, match=words):
        attend(bias)
