"""Attention as Pallas kernels for TPUs.

| module            | content                                                               |
|-------------------|-----------------------------------------------------------------------|
| attention         | entry: supported calls, layout, gradients by `jax.custom_vjp`         |
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
