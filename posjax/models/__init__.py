"""Flax models that call the four places of a position encoding and know none by name."""

from posjax.models.config import TransformerConfig as TransformerConfig
from posjax.models.generation import generate as generate
from posjax.models.generation import init_cache as init_cache
from posjax.models.transformer import Cache as Cache
from posjax.models.transformer import Transformer as Transformer
