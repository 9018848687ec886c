"""Attention as Pallas kernels for TPUs.

| module            | content                                                          |
|-------------------|------------------------------------------------------------------|
| attention         | entry: supported calls, layout, gradients by `jax.custom_vjp`    |
| plan              | static settings                                                  |
| arrays, layout    | arrays that the kernels read and write; their shapes and blocks  |
| forward           | the forward kernel: its grid and its walk over the keys          |
| forward_step      | its scratch memory, and online softmax of a tile                 |
| forward_pipeline  | its counting tiles, as a pipeline                                |
| backward          | the backward kernel: its grid and its walk over the keys         |
| backward_step     | its scratch memory, and the gradients of a tile                  |
| backward_pipeline | its counting tiles, as a pipeline                                |
| tiles             | tile mathematics of attention                                    |
| counting, tables  | tile mathematics of Contextual Position Encoding                 |
| relative          | tile mathematics of biases that depend on the distance alone     |
| registers         | arrays one register wide                                         |
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
