"""Attention as Pallas kernels for TPUs.

| module            | content                                                               |
|-------------------|-----------------------------------------------------------------------|
| support           | the problems that they can solve                                      |
| attention         | entry: layout, gradients by `jax.custom_vjp`                          |
| plan              | static settings                                                       |
| arrays            | the arrays that the kernels read and write                            |
| layout            | their shapes and blocks                                               |
| forward           | the forward kernel: grid and walk over the keys                       |
| forward_step      | its scratch memory; online softmax of one tile                        |
| forward_pipeline  | its tiles that count, as a pipeline                                   |
| backward          | the backward kernel: grid and walk over the keys                      |
| backward_step     | its scratch memory; gradients of one tile                             |
| backward_pipeline | its tiles that count, as a pipeline                                   |
| tiles             | tile mathematics of attention                                         |
| counting, tables  | tile mathematics of Contextual Position Encoding: counts, interpolation |
| relative          | tile mathematics of biases of the distance                            |
| registers         | arrays one register wide                                              |
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
