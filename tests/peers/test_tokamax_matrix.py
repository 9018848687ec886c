"""The matrix of tokamax's attention: shapes, masks, biases, lengths, windows, caps and types.

Values and gradients are compared with an oracle, and with tokamax itself if it is installed. Two
results are documented to differ. Tokamax caps logits after the bias is added; ours are capped
before, as in Gemma 2 and flash-attention: without a bias the two are the same. A query that sees
nothing gives 0, and the mean of the values in some of tokamax's implementations.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax import dot_product_attention
from tests import tolerances
from tests.peers import oracle

IMPLEMENTATIONS = [None, "xla", "reference"]
# Oracle and inputs are exact there; outputs, and the weights in some products, are rounded.
NARROW = {"bfloat16": 3e-2, "float16": 4e-3}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and arguments of one call; a mask and a bias are given by their shapes."""

    batch: tuple[int, ...] = (2,)
    queries: int = 24
    keys: int = 24
    heads: int = 4
    kv_heads: int = 4
    size: int = 16
    value_size: int = 16
    dtype: str = "float32"
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    lengths: tuple[Any, Any] = (None, None)
    settings: tuple[tuple[str, Any], ...] = ()

    def arrays(self) -> dict[str, jax.Array]:
        """Query, key, value and, if there is one, the bias."""
        shapes = {
            "query": (*self.batch, self.queries, self.heads, self.size),
            "key": (*self.batch, self.keys, self.kv_heads, self.size),
            "value": (*self.batch, self.keys, self.kv_heads, self.value_size),
        }
        if self.bias is not None:
            shapes["bias"] = self.bias
        keys = jax.random.split(jax.random.key(0), len(shapes))
        return {
            name: jax.random.normal(key, shape).astype(self.dtype)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    def restrictions(self) -> dict[str, Any]:
        """Mask and lengths, as arguments."""
        found = {}
        if self.mask is not None:
            found["mask"] = jax.random.bernoulli(jax.random.key(1), 0.6, self.mask)
        names = ("query_seq_lengths", "key_value_seq_lengths")
        pairs = zip(names, self.lengths, strict=True)
        return found | {name: jnp.array(x) for name, x in pairs if x is not None}

    def visible(self) -> np.ndarray:
        """Which pairs may attend."""
        settings, mask = dict(self.settings), self.restrictions().get("mask")
        window = settings.get("local_window_size")
        return oracle.visible(
            self.queries,
            self.keys,
            mask=mask,
            is_causal=settings.get("is_causal", False),
            window=(window, window) if isinstance(window, int) else window,
            lengths=self.lengths,
        )


def case(**changes: Any) -> Case:
    """A case; names that are no fields of it are arguments of attention."""
    fields = {field.name for field in dataclasses.fields(Case)}
    own = {name: value for name, value in changes.items() if name in fields}
    return Case(**own, settings=tuple((n, v) for n, v in changes.items() if n not in fields))


FULL, ROWS, COLUMNS = (2, 4, 24, 24), (2, 4, 24, 1), (2, 4, 1, 24)
CASES = [
    case(),
    case(dtype="bfloat16"),
    case(dtype="float16"),
    # Shapes.
    case(keys=37),
    case(keys=37, bias=(2, 4, 24, 37)),
    case(size=24, value_size=7),
    case(size=8, value_size=40, bias=FULL),
    *(case(queries=q, keys=k) for q, k in [(8, 40), (40, 8), (7, 8), (15, 16), (15, 15), (1, 9)]),
    case(kv_heads=1),
    case(heads=8, kv_heads=2),
    case(heads=8, kv_heads=2, bias=(8, 24, 24), mask=(2, 1, 24, 24), is_causal=True),
    case(batch=()),
    case(batch=(), bias=(4, 24, 24), mask=(1, 24, 24)),
    case(batch=(2, 3, 2), queries=9, keys=9),
    case(batch=(2, 3), bias=(2, 3, 4, 24, 24), mask=(2, 1, 1, 24, 24)),
    case(batch=(2, 3), bias=(3, 1, 1, 24), mask=(3, 1, 24, 1)),
    case(size=12),
    # Biases and masks that broadcast.
    *(case(bias=x) for x in [FULL, ROWS, COLUMNS, (2, 1, 24, 24), (1, 4, 24, 24), (4, 24, 24)]),
    *(case(mask=x) for x in [FULL, ROWS, COLUMNS, (2, 1, 24, 24), (1, 4, 24, 24), (2, 1, 24, 1)]),
    *(case(mask=x) for x in [(1, 4, 24, 1), (2, 1, 1, 24), (1, 4, 1, 24), (24, 24)]),
    # Other restrictions.
    case(is_causal=True),
    *(case(keys=keys, is_causal=True) for keys in (12, 37)),
    case(lengths=((11, 23), (3, 24))),
    case(lengths=((11, 23), None), is_causal=True),
    case(lengths=(None, (0, 24)), mask=(24, 24)),
    *(case(local_window_size=x) for x in [3, (5, 0), (0, 5), (2, 3), (0, 0)]),
    case(local_window_size=(6, 0), is_causal=True, bias=FULL, lengths=((24, 20), (24, 20))),
    # Scale and cap.
    case(scale=0.7),
    case(scale=0.0),
    case(logits_soft_cap=1.5),
    case(logits_soft_cap=1.5, scale=2.0, is_causal=True, kv_heads=2),
    case(logits_soft_cap=1.5, dtype="bfloat16"),
]


def names(one: Case) -> str:
    """What a case has that others do not."""
    plain = Case()
    fields = (field.name for field in dataclasses.fields(Case))
    changed = {name: getattr(one, name) for name in fields}
    changed = {name: x for name, x in changed.items() if x != getattr(plain, name)}
    changed |= dict(changed.pop("settings", ()))
    return ", ".join(f"{name} {value}" for name, value in changed.items()) or "plain"


def with_gradients(one: Case, attention, arrays: dict[str, Any], compares_seen: bool = False):
    """The output, and gradients of a weighting of it; 0 for queries that see nothing if asked."""

    # Queries that see some key.
    seen = np.swapaxes(np.any(one.visible(), axis=-1, keepdims=True), -3, -2)

    def loss(arrays):
        output = attention(**arrays)
        if compares_seen:
            output = jnp.where(seen, output, jnp.zeros_like(output))
        wave = jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape)
        return jnp.sum(output.astype(jnp.float32) * wave), output

    (_, output), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return output, gradients


def by_oracle(one: Case):
    """In float32, whatever the type."""
    allowed, settings = one.visible(), dict(one.settings)
    settings = {n: settings[n] for n in ("scale", "logits_soft_cap") if n in settings}

    def attention(**arrays):
        return oracle.attention(**arrays, **settings, allowed=allowed, xp=jnp)[0]

    return with_gradients(one, attention, {n: x.astype("float32") for n, x in one.arrays().items()})


def by_tokamax(one: Case):
    """Its own default for this machine."""
    tokamax = pytest.importorskip("tokamax", reason="tokamax is the peer here")
    attention = functools.partial(
        tokamax.dot_product_attention, **one.restrictions(), **dict(one.settings)
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return with_gradients(one, attention, one.arrays(), compares_seen=True)


@pytest.mark.parametrize("peer", [by_oracle, by_tokamax])
@pytest.mark.parametrize("one", CASES, ids=names)
@pytest.mark.filterwarnings("ignore")
def test_matrix(one, peer):
    if peer is by_tokamax and one.dtype == "float16" and jax.default_backend() == "cpu":
        pytest.skip("tokamax has no float16 on CPUs")
    want = peer(one)
    narrow = NARROW.get(one.dtype)
    for implementation in IMPLEMENTATIONS:
        attention = functools.partial(
            dot_product_attention,
            **one.restrictions(),
            **dict(one.settings),
            implementation=implementation,
        )
        got = with_gradients(one, attention, one.arrays(), compares_seen=peer is by_tokamax)
        assert got[0].dtype == one.dtype
        for mine, other, exact in zip(
            got,
            want,
            (tolerances.FORWARD["float32"], tolerances.GRADIENT["float32"]),
            strict=True,
        ):
            for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
                a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
                atol = (narrow or exact) * max(1.0, abs(b).max())
                np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=str(implementation))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_the_cap_is_applied_before_the_bias(implementation):
    """Tokamax applies it afterwards; the same for a bias of 0."""
    one = case(bias=FULL, logits_soft_cap=1.5)
    arrays = one.arrays()
    got = dot_product_attention(**arrays, logits_soft_cap=1.5, implementation=implementation)
    query, key = (np.asarray(arrays[name], np.float64) for name in ("query", "key"))
    logits = np.einsum("btnh,bsnh->bnts", query, key) / 4
    bias = np.asarray(arrays["bias"], np.float64)
    before, after = (1.5 * np.tanh(x / 1.5) for x in (logits, logits + bias))
    weighted = lambda logits: np.einsum(  # noqa: E731
        "bnts,bsnh->btnh",
        np.exp(logits) / np.exp(logits).sum(-1, keepdims=True),
        np.asarray(arrays["value"], np.float64),
    )
    np.testing.assert_allclose(got, weighted(before + bias), rtol=0, atol=1e-5)
    assert np.abs(got - weighted(after)).max() > 0.05


def test_hidden_numbers_do_not_leak():
    """NaN in hidden queries and keys, and huge numbers in hidden values, reach no other query."""
    one = case(lengths=((11, 23), (3, 20)))
    arrays, (queries, keys) = one.arrays(), (np.array(x) for x in one.lengths)
    hidden = lambda lengths: (np.arange(24) >= lengths[:, None])[..., None, None]  # noqa: E731
    poisoned = arrays | {
        "query": jnp.where(hidden(queries), jnp.nan, arrays["query"]),
        "key": jnp.where(hidden(keys), jnp.nan, arrays["key"]),
        "value": jnp.where(hidden(keys), jnp.finfo(jnp.float32).max, arrays["value"]),
    }
    mask = ~hidden(queries)[..., 0] & ~np.swapaxes(hidden(keys)[..., 0], 1, 2)
    forms = ({"mask": mask[:, None]}, one.restrictions())
    for implementation in IMPLEMENTATIONS:
        for form in forms:
            call = functools.partial(dot_product_attention, **form, implementation=implementation)
            got, want = call(**poisoned), call(**arrays)
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "axes",
    [
        [(0, 0, 0, 0, 0)],
        [(0, None, None, 0, 0)],
        [(0, 0, 0, None, 0)],
        [(0, 0, 0, 0, None)],
        [(0, 0, 0, 0, 0), (0, 0, 0, 0, 0)],
        [(None, 0, 0, 0, 0), (None, 0, 0, 0, 0)],
        [(0, None, None, 0, 0), (0, None, None, 0, 0)],
        [(0, None, None, None, 0), (None, 0, 0, 0, None)],
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_vmap_over_any_of_the_arrays(axes, implementation):
    """Once and twice; the same as with all of them broadcast."""
    shapes = [(9, 4, 8), (9, 4, 8), (9, 4, 8), (4, 9, 9), (4, 9, 9)]
    sizes = [2, 3][: len(axes)]
    arrays, full = [], []
    for number, shape in enumerate(shapes):
        # The outermost `vmap` is the last one of `axes`.
        mapped = [level[number] is not None for level in reversed(axes)]
        own = [size for size, is_mapped in zip(sizes, mapped, strict=True) if is_mapped]
        x = jax.random.normal(jax.random.key(number), (*own, *shape))
        x = x < 0.5 if number == 4 else x
        lead = [size if is_mapped else 1 for size, is_mapped in zip(sizes, mapped, strict=True)]
        arrays.append(x)
        full.append(jnp.broadcast_to(x.reshape(*lead, *shape), (*sizes, *shape)))
    call = functools.partial(dot_product_attention, implementation=implementation)
    mapped = lambda *x: call(*x)  # noqa: E731
    for level in axes:
        mapped = jax.vmap(mapped, in_axes=level)
    np.testing.assert_allclose(mapped(*arrays), call(*full), rtol=0, atol=1e-6)
