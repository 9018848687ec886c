"""Attention as Pallas kernels for TPUs.

| module            | content                                                          |
|-------------------|------------------------------------------------------------------|
| attention         | entry: supported calls, layout, gradients by `jax.custom_vjp`    |
| plan              | static settings; shapes and blocks of arrays                     |
| arrays            | arrays that the kernels read and write                           |
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
