import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.encodings import AxialRoPE, RoPE
from posjax.encodings.axial_rope import axial_rotate
from posjax.encodings.base import Side
from posjax.encodings.rope import rotate

REASON = "compares with Hugging Face's code"
X = jax.random.normal(jax.random.key(0), (1, 6, 2, 12))
GRID = jnp.array([[[0, 0], [0, 1], [2, 3], [5, 1], [40, 7], [3, 3]]])


def slow(x, coordinates, base, layout):
    """The formula for one head of one token, in Python's numbers."""
    size, axes = len(x), len(coordinates)
    each, out = size // (2 * axes), np.array(x, np.float64)
    for axis, place in enumerate(coordinates):
        for m in range(each):
            pair = axis * each + m
            at = (pair, pair + size // 2) if layout == "half" else (2 * pair, 2 * pair + 1)
            angle = place * base ** (-m / each)
            a, b = (float(x[i]) for i in at)
            out[at[0]] = a * math.cos(angle) - b * math.sin(angle)
            out[at[1]] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_equals_the_formula(layout, axes):
    positions = jnp.concatenate((GRID, GRID[..., :1] + 1), axis=-1)[..., :axes]
    found = axial_rotate(X, positions, base=100.0, layout=layout)
    for t, n in np.ndindex(6, 2):
        want = slow(np.asarray(X[0, t, n]), positions[0, t].tolist(), 100.0, layout)
        np.testing.assert_allclose(found[0, t, n], want, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_halves_equal_hugging_face_qwen2_vl():
    torch = pytest.importorskip("torch", reason=REASON)
    name = "transformers.models.qwen2_vl.modeling_qwen2_vl"
    qwen = pytest.importorskip(name, reason=REASON)
    if not hasattr(qwen, "Qwen2VLVisionRotaryEmbedding"):
        pytest.skip("this version of transformers has its vision RoPE elsewhere")
    config = qwen.Qwen2VLVisionConfig(embed_dim=24, num_heads=3, head_dim=8)
    module = qwen.Qwen2VLVisionRotaryEmbedding(config)
    cos, sin = module(torch.zeros(1), torch.tensor(GRID[0].tolist()))
    x = torch.tensor(np.asarray(X[0, :, :, :8]))
    want, _ = qwen.apply_rotary_pos_emb_vision(x, x, cos, sin)
    found = axial_rotate(X[..., :8], GRID)
    np.testing.assert_allclose(found[0], want.numpy(), atol=1e-5)


def test_interleaved_is_rope_by_rows_on_one_half_and_by_columns_on_the_other():
    found = axial_rotate(X[..., :8], GRID, layout="interleaved")
    for axis, part in enumerate((slice(0, 4), slice(4, 8))):
        want = rotate(X[..., part], GRID[..., axis], layout="interleaved")
        np.testing.assert_allclose(found[..., part], want, atol=1e-6)


def test_the_module_turns_by_rows_and_columns():
    encoding = AxialRoPE(width=5, base=50.0, layout="interleaved")
    places = jnp.array([[0, 4, 5, 9, 12, 1000]])
    indices, carry = encoding.apply({}, jnp.zeros((1, 6), int), places, method="positions")
    assert indices[0].tolist() == [[p // 5, p % 5] for p in places[0].tolist()]
    assert carry is None
    x = X[..., :8]
    query, key = encoding.apply(
        {}, Side(x, indices), Side(x[:, :2, :1], indices[:, 1:3]), method="rotate"
    )
    settings = {"base": 50.0, "layout": "interleaved"}
    np.testing.assert_array_equal(query, axial_rotate(x, indices, **settings))
    want = axial_rotate(x[:, :2, :1], indices[:, 1:3], **settings)
    np.testing.assert_array_equal(key, want)


def test_scores_depend_on_differences_of_coordinates_only():
    def scores(shift):
        grid = GRID + jnp.array(shift)[None, None, :]
        query, key = (axial_rotate(x[..., :8], grid) for x in (X, X[:, ::-1]))
        return jnp.einsum("btnh,bsnh->bnts", query, key)

    np.testing.assert_allclose(scores([3, 50]), scores([0, 0]), atol=1e-3)
    norms = (jnp.linalg.norm(x, axis=-1) for x in (axial_rotate(X, GRID), X))
    np.testing.assert_allclose(*norms, rtol=1e-5)


def test_in_the_first_row_half_of_the_channels_stay():
    encoding = AxialRoPE(width=100)
    places = jnp.arange(6)[None, :]
    indices, _ = encoding.apply({}, jnp.zeros((1, 6), int), places, method="positions")
    query, _ = encoding.apply({}, Side(X, indices), Side(X, indices), method="rotate")
    by_row = [0, 1, 2, 6, 7, 8]
    np.testing.assert_array_equal(query[..., np.array(by_row)], X[..., np.array(by_row)])
    assert AxialRoPE.vit() == AxialRoPE(14, 100.0, "interleaved")
    assert not np.allclose(
        query, RoPE().apply({}, Side(X, places), Side(X, places), method="rotate")[0]
    )


@pytest.mark.parametrize(("size", "axes"), [(6, 2), (8, 3), (3, 1)])
def test_each_axis_needs_its_pairs(size, axes):
    words = f"head size is {size}; {axes} axes of pairs need a multiple of {2 * axes}"
    with pytest.raises(ValueError, match=words):
        axial_rotate(jnp.ones((1, 1, 1, size)), jnp.zeros((1, 1, axes), jnp.int32))
