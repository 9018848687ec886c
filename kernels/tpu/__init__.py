"""Attention as Pallas kernels for TPUs.

| module       | what                                                             |
|--------------|------------------------------------------------------------------|
| support      | the problems that they can solve                                 |
| attention    | entry: layout, gradients by `jax.custom_vjp`                     |
| plan         | static settings; which blocks of keys each block of queries sees |
| counting     | tile mathematics of Contextual Position Encoding                 |
| tiles        | tile mathematics of plain attention                              |
| forward      | the forward kernel                                               |
| backward     | the backward kernel                                              |
"""

from posjax.kernels.blocks import TpuBlocks
from posjax.kernels.distances import positions_are_contiguous as holds
from posjax.kernels.tpu.support import refuses
from posjax.problem import Problem
from posjax.types import Array, Num

__all__ = ["holds", "refuses", "run"]


def run(problem: Problem, blocks: TpuBlocks | None = None) -> Num[Array, "B T N E"]:
    """Attention by the TPU kernels, which are imported now; see `kernels.tpu.attention`."""
    from posjax.kernels.tpu import attention

    return attention.run(problem, blocks)
