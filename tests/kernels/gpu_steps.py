"""Single steps of the GPU kernels as kernels of their own, to be run on a GPU."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from posjax.kernels.gpu import instructions, layout, stores
from posjax.kernels.gpu.reciprocals import paired_reciprocal

ROWS, KEYS = 64, 128


def _one_warpgroup(step, inputs: dict, outputs: dict, scratch: dict) -> dict:
    """Runs `step(refs, scratch)` in a warpgroup; a second one does nothing."""

    def kernel(refs, scratch):
        pl.when(jax.lax.axis_index("group") == 0)(functools.partial(step, refs, scratch))

    one = {"head": 1, "tile": 1, "batch": 1}
    name = "posjax_step"
    return layout.launch(kernel, inputs, outputs, grid=one, scratch=scratch, name=name, groups=1)


def _fetch(refs, scratch, name: str) -> None:
    plgpu.copy_gmem_to_smem(refs[name], scratch[name], scratch["full"].at[0])
    plgpu.barrier_wait(scratch["full"].at[0])


def inverses(x, *, paired: bool, emulated: bool = False):
    """1 / x of [64, 128]."""
    invert = paired_reciprocal if paired else instructions.reciprocal

    def step(refs, scratch):
        taken = instructions.load(refs["x"], plgpu.Layout.WGMMA)
        refs["inverse"][...] = invert(taken, emulated=emulated)

    shape = jax.ShapeDtypeStruct((ROWS, KEYS), jnp.float32)
    return _one_warpgroup(step, {"x": x}, {"inverse": shape}, {})["inverse"]


def sums(gates, lower, start, *, emulated: bool = False):
    """start + gates @ lower in the matrix unit; gates [64, n] and lower [n, n] are float16."""

    def step(refs, scratch):
        _fetch(refs, scratch, "lower")
        narrow = instructions.load(refs["gates"], plgpu.Layout.WGMMA).astype(jnp.float16)
        before = instructions.load(refs["start"], plgpu.Layout.WGMMA)
        found = instructions.multiply_into(before, narrow, scratch["lower"], emulated=emulated)
        refs["sums"][...] = found

    size = lower.shape[0]
    scratch = {"lower": layout.matrix((size, size), jnp.float16), "full": layout.Barriers(1)}
    outputs = {"sums": jax.ShapeDtypeStruct((ROWS, size), jnp.float32)}
    inputs = {"gates": gates, "lower": lower, "start": start}
    return _one_warpgroup(step, inputs, outputs, scratch)["sums"]


def looked_up(table, place, *, packed: bool, emulated: bool = False):
    """Bias, slope and fraction at places [64, 128] of tables [64, words]."""
    names = ("bias", "slope", "fraction")

    def step(refs, scratch):
        _fetch(refs, scratch, "table")
        taken = instructions.load(refs["place"], plgpu.Layout.WGMMA)
        values = instructions.table_values(
            scratch["table"], taken, packed=packed, emulated=emulated
        )
        for name, value in zip(names, values, strict=True):
            refs[name][...] = value

    scratch = {"table": plgpu.SMEM(table.shape, jnp.float32), "full": layout.Barriers(1)}
    outputs = dict.fromkeys(names, jax.ShapeDtypeStruct((ROWS, KEYS), jnp.float32))
    return _one_warpgroup(step, {"table": table, "place": place}, outputs, scratch)


def reached(x, least: float, *, emulated: bool = False):
    """[64] of 1 where all numbers of x [64] are at least `least`, and else of 0."""

    def step(refs, scratch):
        taken = instructions.load(refs["x"], layout.row_layout())
        found = stores.all_reach(taken, least, emulated=emulated)
        answer = layout.per_row(found.astype(jnp.float32))
        stores.store(refs["answer"], answer, layout.row_layout(), emulated=emulated)

    shape = jax.ShapeDtypeStruct((ROWS,), jnp.float32)
    return _one_warpgroup(step, {"x": x}, {"answer": shape}, {})["answer"]


def transposed_product(x, y, *, emulated: bool = False):
    """x^T @ y of [64, 64], x stored in halves of 32 columns as the kernel of keys does."""
    half = KEYS // 4

    def step(refs, scratch):
        _fetch(refs, scratch, "y")
        taken = instructions.load(refs["x"], plgpu.Layout.WGMMA).astype(jnp.bfloat16)
        for start in (0, half):
            room = scratch["x"].at[:, start : start + half]
            part = taken[:, start : start + half]
            stores.store_matrix(room, part, swizzle=2 * half, emulated=emulated)
        plgpu.commit_smem()
        zero = plgpu.layout_cast(jnp.zeros((ROWS, ROWS), jnp.float32), plgpu.Layout.WGMMA)
        operands = scratch["x"], scratch["y"]
        found = instructions.multiply_transposed_into(zero, *operands, emulated=emulated)
        refs["product"][...] = found
        stores.meet(emulated=emulated)

    room = layout.matrix((ROWS, ROWS), jnp.bfloat16, swizzle=2 * half)
    scratch = {"x": room, "y": room, "full": layout.Barriers(1)}
    outputs = {"product": jax.ShapeDtypeStruct((ROWS, ROWS), jnp.float32)}
    return _one_warpgroup(step, {"x": x, "y": y}, outputs, scratch)["product"]
