"""The one table of tolerances. None is loosened without a reason written beside it."""

# Largest absolute difference from the reference, for inputs of order 1.
FORWARD = {"float32": 1e-5}
GRADIENT = {"float32": 1e-4}
# Narrow types: the largest error against the float32 reference may be this many times that of a
# dense computation in the same type with float32 counts, plus a little for the case that the dense
# one happens to be exact.
NARROW_FACTOR = 2.0
NARROW_SLACK = {"bfloat16": 1e-3, "float16": 1e-4}
# Two ways to compute the same float32 model: decoding and full, scanned and not, sharded and not.
SAME_MODEL = 1e-5
# Root mean square of the error over that of the float32 reference, for kernels whose sums of gates
# have float16 terms and whose sums of gradients bfloat16 ones.
NARROW_RMS = 1e-2
