"""Checks annotations at run time, the shapes in them included."""

import typing

import beartype

_CONFIG = beartype.BeartypeConf(is_pep484_tower=True)


def checked(function):
    """beartype for jaxtyping's import hook, which decorates methods one by one: no `Self` there."""
    hints = getattr(function, "__annotations__", {})
    for name, hint in hints.items():
        if hint is typing.Self or typing.Self in typing.get_args(hint):
            hints[name] = typing.Any
    return beartype.beartype(conf=_CONFIG)(function)
