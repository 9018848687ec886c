"""Flax models that call the four places of a position encoding and know none by name."""

from posjax.models.config import TransformerConfig
from posjax.models.generation import generate, init_cache
from posjax.models.transformer import Cache, Transformer

__all__ = ["Cache", "Transformer", "TransformerConfig", "generate", "init_cache"]
