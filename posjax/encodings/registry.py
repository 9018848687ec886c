"""Finds encodings by name: a new file in this folder is a new encoding.

The name of an encoding is the name of its file ("rope"). A classmethod that builds a published or
otherwise special setting is a preset with its own name ("cope.paper" is `CoPE.paper()`); names
joined by "+" are combined.
"""

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable

from posjax import checks
from posjax.encodings.base import PositionEncoding

__all__ = ["COMPOSITIONS", "all_names", "classes", "create", "names", "spec_of"]

# Combinations that papers use: name -> arXiv id.
COMPOSITIONS = {
    "abacus+fire": "2405.17399",
    "abacus+rope": "2405.17399",
    "cope+relative": "2405.18719",
    "cope+rope": "2405.18719",
}
_NO_ENCODING = "nope"
# Files of this folder that hold bases and families.
_NOT_ENCODINGS = ("base", "distance", "hooks", "registry", "rotary", "stream", "wrapper")


@functools.cache
def classes() -> dict[str, type[PositionEncoding]]:
    """All encodings: class name -> class."""
    return {cls.__name__: cls for cls in (PositionEncoding, *_modules().values())}


def names() -> list[str]:
    """All names that `create` knows; "nope" is no encoding.

    >>> "cope.paper" in names()
    True
    """
    return sorted(_makers())


def all_names() -> tuple[str, ...]:
    """All names, and the combinations that papers use."""
    return (*names(), *COMPOSITIONS)


@checks.arguments()
def create(name: str) -> PositionEncoding | None:
    """The encoding with its defaults; None for "nope".

    Args:
        name: one of `names()`, or several joined by "+" for their combination.

    Raises:
        ValueError: an unknown name, with the nearest known one.

    >>> create("rope").base
    10000.0
    """
    parts = [_make(part) for part in name.split("+")]
    if len(parts) == 1:
        return parts[0]
    return classes()["Combine"](tuple(part for part in parts if part is not None))


@checks.arguments()
def spec_of(encoding: PositionEncoding | None) -> str:
    """The name under which `create` knows the class of `encoding`.

    >>> spec_of(create("rope"))
    'rope'
    """
    if encoding is None:
        return _NO_ENCODING
    return next(
        (name for name, cls in _modules().items() if type(encoding) is cls), type(encoding).__name__
    )


def _make(name: str) -> PositionEncoding | None:
    makers = _makers()
    if name not in makers:
        near = difflib.get_close_matches(name.lower(), makers, n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"? ' if near else ""
        raise ValueError(
            f'there is no encoding "{name}"; {hint}known are {", ".join(sorted(makers))}.'
        )
    return makers[name]()


@functools.cache
def _makers() -> dict[str, Callable[[], PositionEncoding | None]]:
    makers: dict[str, Callable] = {_NO_ENCODING: lambda: None}
    for name, cls in _modules().items():
        if all(
            field_has_default(parameter) for parameter in inspect.signature(cls).parameters.values()
        ):
            makers[name] = cls
        for variant, method in vars(cls).items():
            if isinstance(method, classmethod) and not variant.startswith("_"):
                makers[f"{name}.{variant}"] = getattr(cls, variant)
    return makers


def field_has_default(parameter: inspect.Parameter) -> bool:
    """Whether a constructor's parameter may be left out."""
    return parameter.default is not inspect.Parameter.empty


@functools.cache
def _modules() -> dict[str, type[PositionEncoding]]:
    """File name -> the encoding defined in the file."""
    package = __name__.rpartition(".")[0]
    found = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if info.name in _NOT_ENCODINGS:
            continue
        module = importlib.import_module(f"{package}.{info.name}")
        own = [
            cls
            for cls in vars(module).values()
            if inspect.isclass(cls)
            and issubclass(cls, PositionEncoding)
            and cls.__module__ == module.__name__
        ]
        if len(own) != 1:
            raise ImportError(
                f"{module.__name__} must define one PositionEncoding, not {len(own)}."
            )
        found[info.name] = own[0]
    return found
