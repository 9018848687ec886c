"""Position encodings, one file each. Every subclass of `PositionEncoding` in this folder is exported here by itself."""

from posjax.encodings.registry import classes, create, names

globals().update(classes())

__all__ = sorted([*classes(), "create", "names"])  # noqa: PLE0605
