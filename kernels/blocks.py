"""Block sizes of the blockwise implementations."""

import dataclasses

__all__ = ["Blocks", "TpuBlocks", "blockwise_sizes", "tpu_sizes"]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a block of queries and of a block of keys."""

    query: int = 256
    key: int = 256

    def __post_init__(self):
        if self.query < 1 or self.key < 1:
            raise ValueError(f"block sizes must be positive, not {self.query=} {self.key=}.")


def blockwise_sizes(queries: int, keys: int) -> Blocks:
    """Sizes for `kernels.blockwise`: 256, or the sequence rounded up to 8 where it is shorter."""
    return Blocks(*(min(256, -(-max(length, 1) // 8) * 8) for length in (queries, keys)))


@dataclasses.dataclass(frozen=True)
class TpuBlocks:
    """Sizes for `kernels.tpu`: queries and keys of a tile, and keys that lie in VMEM together."""

    query: int = 512
    key: int = 512
    memory: int = 8192

    def __post_init__(self):
        if self.query < 128 or self.query % 128:
            raise ValueError(f"{self.query=}; it must be a multiple of 128.")
        if self.key < 128 or self.key % 128:
            raise ValueError(f"{self.key=}; it must be a multiple of 128.")
        if self.memory < self.key or self.memory % self.key:
            raise ValueError(f"{self.memory=}; it must be a multiple of {self.key=}.")


def tpu_sizes(queries: int, keys: int) -> TpuBlocks:
    """Sizes for `kernels.tpu`, not larger than the sequences."""
    query = min(512, _rounded(queries, 128))
    key = min(512, _rounded(keys, 128))
    return TpuBlocks(query, key, min(8192 // key * key, _rounded(keys, key)))


def _rounded(length: int, multiple: int) -> int:
    return -(-max(length, 1) // multiple) * multiple
