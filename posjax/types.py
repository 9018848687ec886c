"""Axis letters and array types, in one place.

| letter | axis                                                        |
|--------|-------------------------------------------------------------|
| B      | batch                                                       |
| T      | query length                                                |
| S      | key length                                                  |
| N      | query heads                                                 |
| K      | key/value heads (K divides N)                               |
| G      | query heads per key/value head, N / K                       |
| H      | head size                                                   |
| E      | head size of the values, where it is not H                  |
| D      | model width                                                 |
| P      | number of positions in a table                              |
| V      | vocabulary size                                             |
| L      | layers                                                      |
| t, s   | a block of queries, a block of keys (inside kernels)        |

The letters stand in annotations (`Float[Array, "B T N H"]`), in einsums and in the documentation,
always with this meaning. Query, key and value have the layout of `jax.nn.dot_product_attention`:
[B, length, heads, H].
"""

from typing import Any, Literal

from jax import Array, ShapeDtypeStruct
from jaxtyping import Bool, Float, Int, Num

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Implementation",
    "Int",
    "Length",
    "Num",
    "PyTree",
    "Shaped",
    "Window",
]

PyTree = Any

# The length of an axis: an integer, or a symbol of `jax.export`.
Length = Any

# What has a shape and a dtype.
Shaped = Array | ShapeDtypeStruct

# Which code computes attention; None lets `posjax.dot_product_attention` choose.
Implementation = Literal["reference", "xla", "jax", "cudnn", "tpu", "gpu"]

# Keys at most `left` positions before and `right` positions after the query may be attended to.
Window = int | tuple[int, int] | None
