"""The sizes and choices of the GPU kernels for each kind of problem.

`python benchmarks/tune_gpu.py --write` measures them and writes this file.
"""

__all__ = ["FASTEST", "SOURCE"]

SOURCE = "instructions in machine code for an H200 (benchmarks/gpu_code.py), not a run"
# (head size, most positions, a gate key of its own) -> fields of `GpuBlocks`.
FASTEST = {
    (64, 0, False): {"key": 128, "count": 128, "stages": 2},
    (64, 64, False): {"key": 128, "count": 128, "stages": 2, "packed": False},
    (64, 64, True): {"key": 128, "count": 128, "stages": 2, "packed": False},
    (64, 128, False): {"key": 128, "count": 128, "stages": 2, "packed": True},
    (64, 128, True): {"key": 128, "count": 128, "stages": 2, "packed": True},
    (128, 0, False): {"key": 128, "count": 64, "stages": 2},
    (128, 64, False): {"key": 128, "count": 64, "stages": 2, "packed": True},
    (128, 64, True): {"key": 64, "count": 64, "stages": 2, "packed": True},
    (128, 128, False): {"key": 64, "count": 64, "stages": 3, "packed": True},
    (128, 128, True): {"key": 64, "count": 64, "stages": 2, "packed": True},
}
