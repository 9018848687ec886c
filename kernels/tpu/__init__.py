"""Attention as Pallas kernels for TPUs.

| module       | what                                                             |
|--------------|------------------------------------------------------------------|
| attention    | entry: what is supported, layout, gradients by `jax.custom_vjp`  |
| plan         | static settings; which blocks of keys each block of queries sees |
| counting     | tile mathematics of Contextual Position Encoding                 |
| tiles        | tile mathematics of plain attention                              |
| forward      | the forward kernel                                               |
| backward     | the backward kernel                                              |
"""
