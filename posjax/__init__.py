"""Position encodings for attention in JAX: the position encoding is an argument of attention."""

import importlib
from typing import Any

from posjax import checks as checks
from posjax.attention import dot_product_attention, explain
from posjax.biases.base import ArrayBias, Bias
from posjax.biases.contextual import ContextualBias
from posjax.biases.products import ProductBias, SinusoidBias
from posjax.biases.relative import RelativeBias
from posjax.biases.running import ForgettingBias, StickBreakingBias
from posjax.biases.tables import ClippedTableBias, MultiplierBias
from posjax.biases.total import BiasSum
from posjax.choice import implementations_used

__all__ = [
    "ArrayBias",
    "Bias",
    "BiasSum",
    "ClippedTableBias",
    "ContextualBias",
    "ForgettingBias",
    "MultiplierBias",
    "ProductBias",
    "RelativeBias",
    "SinusoidBias",
    "StickBreakingBias",
    "__version__",
    "dot_product_attention",
    "explain",
    "implementations_used",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Encodings as `posjax.CoPE`, ...; Flax is imported when the first one is asked for."""
    if not name.startswith("_"):
        encodings = importlib.import_module("posjax.encodings")
        if name in encodings.__all__:
            return getattr(encodings, name)
    raise AttributeError(f"module 'posjax' has no attribute {name!r}")
