"""The public callables of posjax, found by inspection, and their arguments."""

import dataclasses
import functools
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
    r"|varying|version|encodings\.hooks|models\.inputs)\b"
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
    "Call": "a record of a table",
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
    r"posjax\.training\.(?!config|optimizer|mesh)|posjax\.models\.layers|posjax\.table"
)


# Classes whose call, or another method, is tried too.
METHODS = {
    "posjax.frequencies": ("__call__", ("Linear", "NTKAware", "DynamicNTK", "YaRN", "LongRoPE")),
    "posjax.graphs": ("__call__", ("LapPE", "RFP", "RWSE", "SPE")),
    "posjax.kernelized": ("__call__", ("KernelizedAttention",)),
    "posjax.models": ("__call__", ("Transformer",)),
    "posjax.tasks": ("example", ("FlipFlop", "SelectiveCopy", "Text")),
    "posjax.tasks.base": ("decode", ("Vocabulary",)),
    "posjax.tasks.trigram": ("fit", ("Trigram",)),
}


def public_callables() -> dict[str, Callable]:
    """Functions and classes of the public modules, and some methods, by their names."""
    return _functions_and_classes() | {
        f"{module}.{name}.{method}": _method(getattr(importlib.import_module(module), name), method)
        for module, (method, names) in METHODS.items()
        for name in names
    }


def _method(cls: type, name: str) -> Callable:
    """A function of the method's arguments; the object has its right arguments (`samples`)."""
    # The base class says the types of the arguments.
    said = next(vars(base)[name] for base in reversed(cls.__mro__) if name in vars(base))
    said = getattr(said, "__func__", said)

    @functools.wraps(said)
    def call(**arguments: Any) -> Any:
        from tests.fuzzing.samples import right_arguments

        is_bound = isinstance(vars(cls).get(name), classmethod)
        owner = cls if is_bound else cls(**right_arguments(cls, cls.__name__))
        if not hasattr(owner, "init_with_output") or name != "__call__":
            return getattr(owner, name)(**arguments)
        keys = {"params": jax.random.key(0), "encoding": jax.random.key(1)}
        return owner.init_with_output(keys, **arguments, mutable=True)[0]

    signature = inspect.signature(said)
    own = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    call.__signature__ = signature.replace(parameters=own)
    return call


def _functions_and_classes() -> dict[str, Callable]:
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


def short_name(path: str) -> str:
    """The name of a function or class, or "Class.method"."""
    module, _, name = path.rpartition(".")
    owner = module.rpartition(".")[2]
    return f"{owner}.{name}" if owner[:1].isupper() else name


def why_skipped(path: str, call: Callable) -> str | None:
    name = short_name(path)
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
