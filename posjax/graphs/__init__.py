"""Encodings of places in a graph, one file and one line here each.

Each is a Flax module from an adjacency matrix to vectors for the nodes, over pure functions.
"""

import functools
import importlib
import inspect
import pkgutil

from posjax.graphs.base import GraphEncoding as GraphEncoding
from posjax.graphs.laplacian import LapPE as LapPE
from posjax.graphs.random_feature import RFP as RFP
from posjax.graphs.random_walk import RWSE as RWSE
from posjax.graphs.spe import SPE as SPE


@functools.cache
def classes() -> dict[str, type[GraphEncoding]]:
    """All encodings of this folder: class name -> class.

    >>> classes()["LapPE"].__name__
    'LapPE'
    """
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for name, value in vars(module).items():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and issubclass(value, GraphEncoding) and value is not GraphEncoding:
                found[name] = value
    return found
