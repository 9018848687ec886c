"""How every test runs: 8 CPU devices unless JAX_PLATFORMS says otherwise; no silent promotion."""

import importlib.metadata
import os
from pathlib import Path

# Before the first import of jax. Workers share a GPU, so none may take all of its memory.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs that tests start run this clone, also if another one is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# libtpu as a compiler on a machine without a TPU: ask no server, let several workers load it.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import hypothesis
import jax
import jaxtyping
import matplotlib
import numpy as np
import pytest

import tests.typecheck

jax.config.update("jax_num_cpu_devices", 8)
# Halves the time of the suite on a CPU, most of which goes into compiling.
jax.config.update("jax_disable_most_optimizations", os.environ["JAX_PLATFORMS"] == "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # A quarter less with an older code generator, and a tenth where it does not split its work.
    # Flags are read once, by the first compilation; other compilers, such as libtpu, read them when
    # they start, and may not know these.
    faster = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    if jax.__version_info__ < (0, 11):
        faster = "--xla_cpu_use_fusion_emitters=false"
    before = os.environ.get("XLA_FLAGS", "")
    one = "--xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{before} {faster} {one}".strip()
    jax.jit(lambda: 0)()
    os.environ["XLA_FLAGS"] = before
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
matplotlib.use("agg")
# Kernels only: elsewhere a wrong argument must meet our own ValueError, not jaxtyping's.
jaxtyping.install_import_hook("posjax.kernels", f"{tests.typecheck.__name__}.checked")

hypothesis.settings.register_profile(
    "posjax",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=20,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("posjax")

# Distribution -> what is not tested without it.
OPTIONAL = {
    "torch": "agreement with PyTorch code: RoPE, ALiBi, T5 and CoPE of other libraries",
    "transformers": "agreement with Hugging Face's ALiBi, T5 and RoPE",
    "x-transformers": "agreement with x-transformers' CoPE",
    "tokamax": "agreement with tokamax's attention",
    "networkx": "graph spectra against networkx's",
    "libtpu": "compilation for TPUs (extra `aot`)",
    "jax-cuda13-plugin": "compilation for an H200 (extra `aot`)",
    "nvidia-cuda-nvdisasm": "machine code of the GPU kernels (extra `aot`)",
    "nbclient": "execution of the notebooks (extra `notebooks`)",
}


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """Compiled programs of all modules together would take many GB."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def same_draws(request):
    """A module's RANDOM starts anew for each test, whatever this process ran before."""
    if hasattr(request.module, "RANDOM"):
        request.module.RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def promotion(request):
    """Lets a test marked `standard_promotion` run third-party code that mixes dtypes."""
    if request.node.get_closest_marker("standard_promotion") is None:
        yield
    else:
        with jax.numpy_dtype_promotion("standard"):
            yield


@pytest.fixture(scope="module")
def optimised():
    """Compiled as users compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def installed(distribution: str) -> bool:
    """Whether a distribution is there, without importing it."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def has_hopper() -> bool:
    """Whether JAX runs on a GPU that the GPU kernels are for."""
    if jax.default_backend() != "gpu":
        return False
    return str(jax.devices()[0].compute_capability).startswith("9.")


def pytest_report_header(config):
    """Says at the top which versions run."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}; {versions}"


def pytest_terminal_summary(terminalreporter):
    """Says at the bottom what was not tested because an optional package is missing."""
    missing = {name: what for name, what in OPTIONAL.items() if not installed(name)}
    if missing:
        terminalreporter.section("not tested: optional packages are missing")
        for name, what in missing.items():
            terminalreporter.line(f"{name}: {what}")
    if not has_hopper():
        terminalreporter.section("not tested: JAX sees no Hopper GPU")
        terminalreporter.line("the GPU kernels on their device (tests/kernels/test_gpu_device.py)")
    if jax.__version_info__ < (0, 11, 2):
        terminalreporter.section("not tested: jax is too old")
        terminalreporter.line("numerics of the GPU kernels: their interpreter came with jax 0.11.2")
