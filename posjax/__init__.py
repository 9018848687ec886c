"""Position encodings for attention in JAX: the position encoding is an argument of attention.

Importing this loads the attention function and the descriptions of biases. Encodings (such as
`posjax.CoPE`) and subpackages (such as `posjax.models`) are loaded when they are asked for.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from posjax import checks as checks
from posjax.attention import dot_product_attention as dot_product_attention
from posjax.attention import explain as explain
from posjax.biases.base import ArrayBias as ArrayBias
from posjax.biases.base import Bias as Bias
from posjax.biases.contextual import ContextualBias as ContextualBias
from posjax.biases.grouped import GroupedBias as GroupedBias
from posjax.biases.products import ProductBias as ProductBias
from posjax.biases.products import SinusoidBias as SinusoidBias
from posjax.biases.relative import RelativeBias as RelativeBias
from posjax.biases.running import ForgettingBias as ForgettingBias
from posjax.biases.running import StickBreakingBias as StickBreakingBias
from posjax.biases.scaled import ScaledBias as ScaledBias
from posjax.biases.sum import BiasSum as BiasSum
from posjax.biases.tables import ClippedTableBias as ClippedTableBias
from posjax.biases.tables import MultiplierBias as MultiplierBias
from posjax.implementations import implementations_used as implementations_used
from posjax.version import __version__ as __version__

if TYPE_CHECKING:
    # What editors and type checkers see; `__getattr__` gives it when it is asked for.
    from posjax import alignment as alignment
    from posjax import biases as biases
    from posjax import encodings as encodings
    from posjax import frequencies as frequencies
    from posjax import graphs as graphs
    from posjax import kernelized as kernelized
    from posjax import kernels as kernels
    from posjax import models as models
    from posjax import plot as plot
    from posjax import positions as positions
    from posjax import table as table
    from posjax import tasks as tasks
    from posjax import training as training
    from posjax.encodings import *  # noqa: F403

# Submodules that users reach as attributes; tests/test_package.py compares with the lines above.
_SUBMODULES = (
    "alignment",
    "biases",
    "encodings",
    "frequencies",
    "graphs",
    "kernelized",
    "kernels",
    "models",
    "plot",
    "positions",
    "table",
    "tasks",
    "training",
)


def __getattr__(name: str) -> Any:
    """Submodules, and encodings, for which Flax is imported."""
    if name in _SUBMODULES:
        return importlib.import_module(f"posjax.{name}")
    if not name.startswith("_"):
        found = getattr(importlib.import_module("posjax.encodings"), name, None)
        if found is not None and not isinstance(found, ModuleType):
            return found
    raise AttributeError(f"module 'posjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Everything that `__getattr__` gives, too."""
    encodings = importlib.import_module("posjax.encodings")
    lazy = {name for name, value in vars(encodings).items() if not isinstance(value, ModuleType)}
    own = set(globals()) - {"Any", "ModuleType", "TYPE_CHECKING", "importlib"}
    return sorted({*own, *_SUBMODULES, *(name for name in lazy if not name.startswith("_"))})
