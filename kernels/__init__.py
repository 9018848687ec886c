"""Implementations of attention; installed as `posjax.kernels`.

`reference` is the dense specification. `blockwise` is the XLA form with O(T) memory for every
backend. `tpu` and `gpu` are Pallas kernels.
"""
