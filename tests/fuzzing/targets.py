"""The public callables of posjax, found by inspection, and their arguments."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import jax

import posjax

SKIPPED_MODULES = re.compile(
    r"posjax\.(kernels|axes|checks|dropout|forms|implementations|masks|precision|problem|types"
    r"|varying|version)\b"
)

# Callables that are not called, and why.
SKIPPED = {
    "main": "reads a command line",
    "fit": "trains a model; its config has checks of its own",
    "compare_encodings": "trains models",
    "explain": "takes whatever attention takes",
    "Side": "a record that encodings make",
    "Sizes": "a record that models make",
    "Context": "a record that models make",
    "LayerState": "a record that models make",
    "Remembered": "a record that models make",
    "Cache": "a record that models make",
    "Switches": "a record that `switching_positions` makes",
    "TextSegments": "a record that `text_segments` makes",
    "Turn": "a record that `turn_at` makes",
    "Tile": "a record that implementations make",
    "Picture": "a record that `picture` makes",
    "Entry": "a record of a table",
    "Row": "a record of a table",
    "Split": "a record that tasks make",
    "Corpus": "a record that `load_corpus` makes",
    "Evaluation": "a record that `evaluate` makes",
    "TrainState": "a record that `initial_state` makes",
    "Window": "a record of the training clock",
    "Interrupted": "an exception",
    "LengthError": "an exception",
    "RunError": "an exception",
    "CheckpointError": "an exception",
    "NonFiniteLossError": "an exception",
}
SKIPPED_TRAINING = re.compile(
    r"posjax\.training\.(?!config|optimizer|mesh)|posjax\.models\.(layers|cache|door)|posjax\.encodings\.hooks|posjax\.table"
)


def public_callables() -> dict[str, Callable]:
    """Functions and classes of the public modules by their names."""
    found = {"posjax.attention.dot_product_attention": posjax.dot_product_attention}
    for info in pkgutil.walk_packages(posjax.__path__, "posjax."):
        if SKIPPED_MODULES.match(info.name):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            home = getattr(value, "__module__", None)
            if callable(value) and home == module.__name__:
                found[f"{home}.{name}"] = value
    return found


def why_skipped(path: str, call: Callable) -> str | None:
    name = path.rpartition(".")[2]
    if name in SKIPPED:
        return SKIPPED[name]
    if SKIPPED_TRAINING.match(path):
        return "inside the loop of training, or the layers of a model"
    if inspect.isabstract(call) or getattr(call, "_is_protocol", False):
        return "abstract"
    return None


def parameters_of(call: Callable) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of each argument."""
    try:
        hints = typing.get_type_hints(call.__init__ if inspect.isclass(call) else call)
    except Exception:
        hints = {}
    fields = {f.name: f.type for f in dataclasses.fields(call)} if _is_dataclass(call) else {}
    parameters = inspect.signature(call).parameters.values()
    return {
        p.name: (hints.get(p.name, fields.get(p.name, p.annotation)), p.default)
        for p in parameters
        if p.name not in ("parent",)
        and not (p.name == "name" and _is_linen(call))
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


def _is_dataclass(call: Any) -> bool:
    return inspect.isclass(call) and dataclasses.is_dataclass(call)


def _is_linen(call: Any) -> bool:
    return inspect.isclass(call) and "__init__" in vars(call) and hasattr(call, "scope")


def without_none(annotation: Any) -> tuple[Any, bool]:
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        others = [part for part in parts if part is not types.NoneType]
        return others[0], len(others) < len(parts)
    return annotation, False


def is_array(kind: Any) -> bool:
    return kind is jax.Array or hasattr(kind, "dim_str")
