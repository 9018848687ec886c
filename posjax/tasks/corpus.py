"""Bytes for language modelling: which files, and which of them are held out."""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from posjax import checks

__all__ = ["Corpus", "load_corpus"]

# Left out of the standard library, by name:
_NOT_LIBRARY = (
    *("site-packages", "dist-packages"),  # packages that were installed here
    *("test", "tests", "idlelib"),  # tests repeat themselves; an application, not a library
    *("encodings", "pydoc_data"),  # tables and texts that programs wrote
    *("config-*", "_sysconfigdata*", "__pycache__"),  # made for this machine
)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and held-out bytes (uint8), and the files they come from."""

    train: np.ndarray
    validation: np.ndarray
    train_files: tuple[Path, ...]
    validation_files: tuple[Path, ...]


@checks.arguments(validation_fraction=checks.Limits(above=0, below=1))
def load_corpus(
    path: tuple[str, ...], suffixes: tuple[str, ...] = (), validation_fraction: float = 0.1
) -> Corpus:
    """Reads files, and holds some of them out.

    Files are sorted by a hash of their name, relative to the folder that was given. In this order
    each is held out that still fits into `validation_fraction` of all bytes; if none fits, the
    smallest is. So the same files give the same split on every machine. A single file is cut
    instead, and its last part held out. Contents follow each other in the same order, with nothing
    between.

    Args:
        path: files and folders. A file is taken as it is. A folder gives all files below it whose
            path has no name that begins with a dot. Without any: the Python source of the standard
            library of this interpreter.
        suffixes: of a folder, only files whose names end so, such as (".py", ".md").

    Raises:
        ValueError: a path that does not exist or gives no bytes.
    """
    found = _named_files(path, suffixes) if path else _standard_library()
    content = [np.frombuffer(file.read_bytes(), np.uint8) for _, file in found]
    kept = [i for i, data in enumerate(content) if data.size]
    files, content = [found[i][1] for i in kept], [content[i] for i in kept]
    total = sum(data.size for data in content)
    budget = total * validation_fraction
    if len(files) == 1:
        cut = total - max(int(budget), 1)
        return Corpus(content[0][:cut], content[0][cut:], tuple(files), tuple(files))
    held_out = _hold_out([data.size for data in content], budget)
    rest = [i for i in range(len(files)) if i not in held_out]
    return Corpus(
        train=np.concatenate([content[i] for i in rest]),
        validation=np.concatenate([content[i] for i in held_out]),
        train_files=tuple(files[i] for i in rest),
        validation_files=tuple(files[i] for i in held_out),
    )


def _hold_out(sizes: list[int], budget: float) -> dict[int, None]:
    """The files, in order, that fit into the budget together; the smallest if none does."""
    taken, used = {}, 0
    for i, size in enumerate(sizes):
        if used + size <= budget:
            taken[i], used = None, used + size
    return taken or {sizes.index(min(sizes)): None}


def _named_files(path: tuple[str, ...], suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """The files that a user named, each once, in hash order."""
    found: dict[Path, str] = {}
    for name in path:
        root = Path(name).expanduser()
        exists = root.is_file() or root.is_dir()
        checks.require("entry of path", name, exists, "a file or a folder")
        if root.is_file():
            files = [(root.name, root)]
        else:
            files = [(n, f) for n, f in _walk(root, (".*",)) if f.name.endswith(suffixes or "")]
        ending = f" ending in {' or '.join(suffixes)}" if suffixes and root.is_dir() else ""
        has_bytes = any(file.stat().st_size for _, file in files)
        checks.require("entry of path", name, has_bytes, f"one with bytes in files{ending}")
        for relative, file in files:
            found.setdefault(file.resolve(), relative)
    return _by_hash((relative, file) for file, relative in found.items())


def _standard_library() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [(name, file) for name, file in _walk(root, _NOT_LIBRARY) if name.endswith(".py")]
    if not files:
        raise ValueError(
            f"path is not given, and the standard library at {root} holds no Python source; "
            "give files or folders with --data.path"
        )
    return _by_hash(files)


def _walk(root: Path, leave_out: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Files below a folder, with their names in it; links to folders are not followed."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not any(fnmatch(f, p) for p in leave_out))
        for name in sorted(files):
            file = Path(folder, name)
            if file.is_file() and not any(fnmatch(name, pattern) for pattern in leave_out):
                yield file.relative_to(root).as_posix(), file


def _by_hash(files: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    return sorted(files, key=lambda pair: (hashlib.sha256(pair[0].encode()).digest(), pair[1]))
