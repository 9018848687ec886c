"""Tables of the GPU kernels, and their gradients from running sums, on plain arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from posjax.kernels.gpu.plan import CopePlan
from posjax.kernels.gpu.tables import slot_words, table_gradients, table_words, tables

look_ups = pytest.importorskip("posjax.kernels.gpu.look_ups")
LN2 = np.log(2)


def interpolated(z, count):
    """z at each count, which is cut at the last row."""
    count = np.minimum(count, z.shape[1] - 1)
    low = np.minimum(np.floor(count).astype(int), z.shape[1] - 2)
    rows = np.arange(len(z))[:, None]
    return z[rows, low] + (count - low) * (z[rows, low + 1] - z[rows, low])


@pytest.mark.parametrize(
    "positions, packed", [(2, False), (7, False), (64, False), (2, True), (7, True), (128, True)]
)
def test_values_of_a_table(positions, packed):
    """Also if counts are whole numbers, and beyond the end."""
    random = np.random.default_rng(0)
    z = random.normal(size=(8, positions)).astype(np.float32)
    z[:, -1] = 0
    count = np.concatenate(
        [random.uniform(0, positions + 2, (8, 50)), np.arange(positions + 2)[None].repeat(8, 0)], 1
    ).astype(np.float32)
    table = tables(jnp.asarray(z), packed)
    assert table.shape == (8, table_words(positions, packed))
    last = CopePlan(positions, 1.0, False, False).last_place
    place = jnp.minimum(jnp.asarray(count) - 0.5, last)
    value, _, _ = look_ups.table_values(table, place, packed=packed, emulated=True)
    np.testing.assert_allclose(
        value, interpolated(z, count), atol=(2e-2 if packed else 1e-5) * np.abs(z).max()
    )


@pytest.mark.parametrize("steepness", [0.3, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("positions", [1, 2, 12, 100])
def test_gradients_of_a_table(positions, steepness):
    """Steep gates are nearly 0 or 1, so that counts are nearly whole numbers."""
    random = np.random.default_rng(0)
    cope = CopePlan(positions, 1.0, False, False)
    unit = cope.gate_quantum
    gate = 1 / (1 + np.exp(-steepness * random.normal(size=(64, 40))))
    gate = (gate / unit).astype(np.float16).astype(np.float32)
    count = np.cumsum(gate[:, ::-1] * np.float32(unit), axis=1)[:, ::-1]
    dlogits = random.normal(size=count.shape).astype(np.float32)

    place = count - np.float32(0.5)
    cut = np.minimum(place, cope.last_place)
    total = np.cumsum(dlogits, axis=1)
    moment = np.cumsum(dlogits * (cut - np.round(cut)), axis=1)
    slots = Slots(jnp.full((64, slot_words(positions)), jnp.nan))
    look_ups.store_crossings(
        slots, slots, *map(jnp.asarray, (place, gate, total, moment)), last_place=cope.last_place,
        gate_quantum=unit, emulated=True,
    )  # fmt: skip
    got = table_gradients(
        slots[...], jnp.asarray(total[:, -1]), jnp.asarray(moment[:, -1]), positions
    )

    want = np.zeros((64, positions))
    for row, key in np.ndindex(count.shape):
        cut = min(count[row, key], positions - 1)
        low = int(cut)
        if low < positions - 1:
            want[row, low] += dlogits[row, key] * (1 - cut + low)
            want[row, low + 1] += dlogits[row, key] * (cut - low)
    # All rows have the last one subtracted, so what falls on it has no effect.
    np.testing.assert_allclose(got[:, :-1], want[:, :-1] * LN2, atol=2e-5)


class Slots:
    """Shared memory that is an array."""

    def __init__(self, array):
        self.array = array
        self.shape = array.shape

    def __getitem__(self, _):
        return self.array

    def __setitem__(self, _, array):
        self.array = array
