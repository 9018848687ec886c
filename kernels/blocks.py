"""Block sizes of the blockwise implementations."""

import dataclasses

__all__ = ["Blocks", "blockwise_sizes"]


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
