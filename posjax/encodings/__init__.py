"""Position encodings, one file each; every `PositionEncoding` in this folder is exported."""

from posjax.encodings import registry
from posjax.encodings.registry import create, names

globals().update(registry.classes())

__all__ = ["create", "names", *registry.classes()]
