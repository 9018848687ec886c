"""Attention with Contextual Position Encoding and biases of the distance on GPUs (Hopper).

| file             | what                                                                        |
|------------------|-----------------------------------------------------------------------------|
| support          | the problems that they can solve                                            |
| attention        | entry: layout, gradients                                                    |
| plan             | what is known when a kernel is compiled                                     |
| tables           | each query's table, and its gradient from running sums                      |
| forward          | the forward kernel                                                          |
| backward_queries | gradients of queries and tables                                             |
| backward_keys    | gradients of keys and values, or of gate keys                               |
| walk             | rings of blocks in shared memory, and a warpgroup's queries                 |
| tiles, gradients | what a tile of 64 queries and some keys computes                            |
| instructions     | the steps that Pallas has no name for; emulated in the interpreter          |
| reciprocals      | one reciprocal for two keys                                                 |
| diagonals, bands | a bias of the distance: tiles' diagonals, their sums, its array             |
| mlir             | numbers, registers and addresses as MLIR writes them                        |
| stores           | stores without barriers                                                     |
| layout           | shared memory, barriers, start of a kernel                                  |
"""

from posjax.kernels.blocks import GpuBlocks
from posjax.kernels.distances import positions_are_contiguous as holds
from posjax.kernels.gpu.support import refuses
from posjax.problem import Problem
from posjax.types import Array, Num

__all__ = ["holds", "refuses", "run"]


def run(problem: Problem, blocks: GpuBlocks | None = None) -> Num[Array, "B T N E"]:
    """Attention by the GPU kernels, which are imported now; see `kernels.gpu.attention`."""
    from posjax.kernels.gpu import attention

    return attention.run(problem, blocks)
