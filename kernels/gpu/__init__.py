"""Attention with Contextual Position Encoding and biases of the distance on GPUs (Hopper).

| module           | content                                                                     |
|------------------|-----------------------------------------------------------------------------|
| support          | the problems that they can solve                                            |
| attention        | entry: layout, gradients                                                    |
| plan             | static settings                                                             |
| arrays           | the arrays that the kernels read and write                                  |
| tables           | each query's table, and its gradient from running sums                      |
| forward          | the forward kernel                                                          |
| backward_queries | the backward kernel of queries and tables                                   |
| backward_keys    | the backward kernel of keys and values, or of gate keys                     |
| queries, keys    | a warpgroup's 64 queries, and its 64 keys: shared memory, loops, sums       |
| ring             | rings of blocks in shared memory, and what is copied once                   |
| tiles, gradients | mathematics of a tile of 64 queries and some keys                           |
| relative         | biases of the distance: their array, and sums along diagonals               |
| layout           | shared memory, barriers, start of a kernel                                  |
| products         | matrix products; about the steps that the interpreter emulates              |
| look_ups         | values of tables, and sums that go to slots                                 |
| reciprocals      | one reciprocal for one key or for two                                       |
| diagonals        | numbers added to diagonals of a tile, and sums along them                   |
| stores           | stores without barriers, and barriers alone                                 |
| registers        | arrays in registers; numbers and addresses in MLIR                          |
"""

from posjax.kernels.blocks import GpuBlocks
from posjax.kernels.common import Attended
from posjax.kernels.distances import positions_are_contiguous as holds
from posjax.kernels.gpu.support import refuses, unsupported
from posjax.problem import Problem

__all__ = ["holds", "refuses", "run", "unsupported"]


def run(problem: Problem, blocks: GpuBlocks | None = None) -> Attended:
    """Attention by the GPU kernels, which are imported now; see `kernels.gpu.attention`."""
    from posjax.kernels.gpu import attention

    return attention.run(problem, blocks)
