"""Configs as command line arguments: a plain dataclass for tyro, made from the objects of a config.

A Flax module has fields of Flax's own, so tyro gets a dataclass with the module's own fields
instead, and the module is built from what tyro returns.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import textwrap
import types
import typing
from typing import Annotated, Any, Literal

import tyro

from posjax.training.config import Config

__all__ = ["arguments_class", "field_help", "module_arguments", "module_from"]

# Options that --help shows in their own way: name and placeholder.
_OPTIONS = {
    "encoding_name": ("encoding", "NAME"),
    "compare": (None, "NAME [NAME ...]"),
    "seeds": (None, "INT [INT ...]"),
}
_PLAIN = (bool, int, float, str, type(None))


@functools.cache
def field_help(cls: type) -> dict[str, str]:
    """The documentation of a class's fields: in strings below them, or in its docstring."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("posjax") and dataclasses.is_dataclass(base):
            texts |= _docstring_fields(base)
            try:
                body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
            except (OSError, TypeError):
                continue
            for item, after in itertools.pairwise(body):
                text = after.value if isinstance(after, ast.Expr) else None
                if isinstance(item, ast.AnnAssign) and isinstance(text, ast.Constant):
                    texts[item.target.id] = " ".join(str(text.value).split())
    return texts


def _docstring_fields(cls: type) -> dict[str, str]:
    names = {item.name for item in dataclasses.fields(cls)}
    texts, current, indent = {}, None, 0
    for line in inspect.getdoc(cls).splitlines() if cls.__doc__ else ():
        start = re.match(r"(\s*)(\w+):\s+(.*)", line)
        depth = len(line) - len(line.lstrip())
        if start and start[2] in names:
            current, indent = start[2], depth
            texts[current] = start[3].strip()
        elif current and line.strip() and depth > indent:
            texts[current] += " " + line.strip()
        else:
            current = None
    return texts


def _is_module(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and hasattr(value, "parent")


def _is_settings(value: Any) -> bool:
    """Whether a value is a plain dataclass, whose fields become options below its own name."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_plain(annotation: Any) -> bool:
    """Whether tyro can read the type from words."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return True
    if origin in (typing.Union, types.UnionType, tuple):
        return all(part is ... or _is_plain(part) for part in typing.get_args(annotation))
    return annotation in _PLAIN


def module_arguments(module: Any) -> Any:
    """A plain dataclass with the own fields of a Flax module; parts of a combination are nested.

    So are fields that hold a dataclass of settings, such as the scaling of RoPE. Fields that cannot
    be written on a command line, such as functions, are left out, and stay as they are.
    """
    cls = type(module)
    hints, texts = typing.get_type_hints(cls), field_help(cls)
    fields, values = [], {}
    for item in _own_fields(module):
        value = getattr(module, item.name)
        parts = value if isinstance(value, tuple) else (value,)
        if parts and all(map(_is_module, parts)):
            nested = {key: module_arguments(part) for key, part in _keys(parts).items()}
            fields += [(key, type(part)) for key, part in nested.items()]
            values |= nested
        elif _is_settings(value):
            values[item.name] = module_arguments(value)
            fields.append((item.name, type(values[item.name])))
        elif _is_plain(hints[item.name]):
            help_text = texts.get(item.name, "")
            fields.append((item.name, Annotated[hints[item.name], tyro.conf.arg(help=help_text)]))
            values[item.name] = value
    return dataclasses.make_dataclass(cls.__name__, fields, frozen=True)(**values)


def module_from(module: Any, arguments: Any) -> Any:
    """The module with the fields that `arguments`, from `module_arguments`, has."""
    changed = {}
    for item in _own_fields(module):
        value = getattr(module, item.name)
        parts = value if isinstance(value, tuple) else (value,)
        if parts and all(map(_is_module, parts)):
            new = [module_from(part, getattr(arguments, key)) for key, part in _keys(parts).items()]
            changed[item.name] = tuple(new) if isinstance(value, tuple) else new[0]
        elif _is_settings(value):
            changed[item.name] = module_from(value, getattr(arguments, item.name))
        else:
            changed[item.name] = getattr(arguments, item.name, value)
    return type(module)(**changed)


def _own_fields(module: Any) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name")]


def _keys(parts: tuple[Any, ...]) -> dict[str, Any]:
    """Parts of a combination by their class names in lower case; equal ones are numbered."""
    keys: dict[str, Any] = {}
    for part in parts:
        key, number = type(part).__name__.lower(), 2
        while key in keys:
            key, number = f"{type(part).__name__.lower()}{number}", number + 1
        keys[key] = part
    return keys


def arguments_class(config: Config, encoding: Any, encoding_name: str, extra: list[tuple]) -> type:
    """The dataclass that tyro parses: the config's fields with their defaults, and `extra` ones.

    Args:
        encoding: the module whose fields are offered; None for none.
        encoding_name: shown as the default of --encoding.
        extra: (name, type, default, help).
    """
    texts = field_help(Config)
    name_help = "Name of the position encoding, or several joined by +; its fields follow below."
    rows = [*extra, ("encoding_name", str, encoding_name, name_help)]
    for item in dataclasses.fields(Config):
        value = getattr(config, item.name)
        if item.name == "encoding":
            if encoding is None:
                continue
            value = module_arguments(encoding)
        rows.append((item.name, type(value), value, texts.get(item.name, "")))
    rows.sort(key=lambda row: dataclasses.is_dataclass(row[1]))
    fields = []
    for name, kind, default, text in rows:
        note = tyro.conf.arg(help=text)
        if not dataclasses.is_dataclass(kind):
            option, metavar = _OPTIONS.get(name, (None, None))
            hint = "" if default == () else None
            note = tyro.conf.arg(name=option, metavar=metavar, help=text, help_behavior_hint=hint)
        fields.append((name, Annotated[kind, note], dataclasses.field(default=default)))
    return dataclasses.make_dataclass("Arguments", fields, frozen=True)
