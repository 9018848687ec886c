"""The devices that are traced for, and sizes of blocks for each kind of them."""

import dataclasses
from typing import Any

import jax

from posjax.kernels.gpu_table import FASTEST
from posjax.types import Length

__all__ = [
    "Blocks",
    "GpuBlocks",
    "TpuBlocks",
    "blockwise_sizes",
    "fastest_tpu_sizes",
    "gpu_sizes",
    "platform",
    "tpu_generation",
    "tpu_sizes",
    "tpu_vmem",
]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a block of queries and of a block of keys."""

    query: int = 256
    key: int = 256

    def __post_init__(self):
        if self.query < 1 or self.key < 1:
            raise ValueError(f"block sizes must be positive, not {self.query=} {self.key=}.")


@dataclasses.dataclass(frozen=True)
class GpuBlocks:
    """Sizes and choices for `kernels.gpu`; benchmarks/tune_gpu.py tries them on a GPU.

    Args:
        key: keys that are fetched at a time.
        count: keys over which one product sums gates; divides `key`.
        stages: blocks of keys in shared memory.
        packed: half precision tables with one load for each key, or float32 with a load of two
            words; see `kernels.gpu.tables`.
        paired: one reciprocal for the gates of two neighbouring keys, and three products more.
        ping_pong: the two warpgroups of the forward kernel take turns at the matrix units.
    """

    key: int = 128
    count: int = 64
    stages: int = 2
    packed: bool = True
    paired: bool = False
    ping_pong: bool = False

    def __post_init__(self):
        if self.count not in (64, 128) or self.key % self.count or self.key < 1:
            raise ValueError(f"{self.count=} must be 64 or 128 and divide {self.key=}.")
        if self.stages < 1:
            raise ValueError(f"{self.stages=}; it must be at least 1.")


def blockwise_sizes(queries: Length, keys: Length) -> Blocks:
    """Sizes for `kernels.blockwise`: 256, or the sequence rounded up to 8 if it is shorter."""
    return Blocks(*map(_blockwise_size, (queries, keys)))


def _blockwise_size(length: Length) -> int:
    return min(256, _rounded(length, 8)) if isinstance(length, int) else 256


@dataclasses.dataclass(frozen=True)
class TpuBlocks:
    """Sizes for `kernels.tpu`.

    Args:
        query: queries of a tile.
        key: keys of a tile.
        memory: keys that lie in VMEM together.
        rows: queries that the counting pipelines work on at a time, so that what they compute for
            them stays in registers; None: all.
        lane_rows: likewise where the backward one sums and searches over lanes.
    """

    query: int = 512
    key: int = 512
    memory: int = 8192
    rows: int | None = None
    lane_rows: int | None = None

    def __post_init__(self):
        if self.query < 128 or self.query % 128:
            raise ValueError(f"{self.query=}; it must be a multiple of 128.")
        if self.key < 128 or self.key % 128:
            raise ValueError(f"{self.key=}; it must be a multiple of 128.")
        if self.memory < self.key or self.memory % self.key:
            raise ValueError(f"{self.memory=}; it must be a multiple of {self.key=}.")
        if self.rows is not None and (self.rows < 8 or self.query % self.rows):
            raise ValueError(f"{self.rows=}; it must be 8 or more and divide {self.query=}.")
        if self.lane_rows is not None and (self.lane_rows < 8 or self.query % self.lane_rows):
            raise ValueError(f"{self.lane_rows=}; it must be 8 or more and divide {self.query=}.")

    def groups_of(self, query: int) -> dict[str, int | None]:
        """`rows` and `lane_rows` for blocks of so many queries; None where they do not fit."""
        groups = {"rows": self.rows, "lane_rows": self.lane_rows}
        return {name: n if n and query % n == 0 else None for name, n in groups.items()}


# Generation -> sizes with the fewest bundles for each pair of query and key, in the schedules of
# benchmarks/tpu_schedule.py; without a TPU those of v6e.
_FASTEST = {
    4: TpuBlocks(128, 512, 1024, rows=16),
    5: TpuBlocks(256, 2048, 8192, rows=16, lane_rows=64),
    6: TpuBlocks(512, 2048, 8192, rows=16),
    7: TpuBlocks(256, 2048, 8192, rows=16),
}


def fastest_tpu_sizes() -> TpuBlocks:
    """The fastest sizes of the chip, for long sequences."""
    return _FASTEST[tpu_generation() or 6]


def tpu_sizes(queries: int, keys: int, relative: bool = False) -> TpuBlocks:
    """Sizes for `kernels.tpu`: the fastest of the chip, or smaller ones for short sequences.

    Args:
        relative: whether there is a relative bias, which wants a power of two of keys, and as many
            keys as queries.
    """
    fastest = _FASTEST[tpu_generation() or 6]
    query = min(fastest.query, _rounded(queries, 128))
    # Of the sizes that pad least the largest; padding is work too.
    sizes = [size for size in (2048, 1536, 1024, 768, 512, 384, 256, 128) if size <= fastest.key]
    if relative:
        sizes = [size for size in sizes if size >= query and size & (size - 1) == 0]
    cost = {size: _rounded(keys, size) * (1 + 64 / size) for size in sizes}
    key = min(cost, key=cost.get)
    memory = min(fastest.memory // key * key, _rounded(keys, key))
    return TpuBlocks(query, key, memory, **fastest.groups_of(query))


def gpu_sizes(size: int, positions: int, own_gate_key: bool) -> GpuBlocks:
    """Sizes for `kernels.gpu` from `kernels.gpu_table`, which says where they come from.

    Args:
        size: of heads, up to 128.
        positions: rows of the table; 0: no contextual bias.
    """
    most = 0 if positions == 0 else 64 if positions <= 64 else 128
    return GpuBlocks(**FASTEST[64 if size <= 64 else 128, most, own_gate_key and positions > 0])


def platform() -> str:
    """The devices that are traced for: "cpu", "gpu" or "tpu".

    Those of the current mesh (a described one, too, for compiling ahead of time), else of
    `jax.default_device`, else JAX's default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    device = jax.config.jax_default_device if device is None else device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def tpu_generation() -> int | None:
    """4 to 7 for the TPU that is traced for; None without one."""
    info = _tpu_info()
    return None if info is None else info.generation


def tpu_vmem() -> int:
    """Bytes of VMEM that a kernel may take: nearly all, 60 MiB without a TPU."""
    info = _tpu_info()
    return 60 * 2**20 if info is None else info.vmem_capacity_bytes - 4 * 2**20


def _tpu_info() -> Any:
    """Of the TPU that is traced for; None without one."""
    from jax.experimental.pallas import tpu as pltpu

    try:
        return pltpu.get_tpu_info()
    except ValueError:
        return None


def _rounded(length: int, multiple: int) -> int:
    return -(-max(length, 1) // multiple) * multiple
