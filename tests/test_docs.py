"""Documentation that executes: docstrings, Python and commands on pages, notebooks; links."""

import doctest
import functools
import importlib
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tyro

from posjax.training import cli

ROOT = Path(__file__).parent.parent
SOURCES = {"posjax": "posjax", "kernels": "posjax.kernels"}
MARKDOWN = sorted(
    path
    for folder in (ROOT, *(ROOT / name for name in ("docs", "benchmarks", "notebooks")))
    for path in (folder.glob("*.md") if folder == ROOT else folder.rglob("*.md"))
)
PRESETS = {path.stem: path for path in sorted((ROOT / "configs").glob("[!_]*.py"))}
# Pages and presets that must show a command of `train.py`, of another script, and Python.
MUST_TRAIN = {
    *(ROOT / name for name in ("README.md", "docs/training.md", "docs/results/README.md")),
    *PRESETS.values(),
}
MUST_CALL = {
    ROOT / "docs" / name
    for name in ("encodings.md", "implementations.md", "performance.md", "results/README.md")
}
MUST_RUN = {ROOT / name for name in ("README.md", "docs/encodings.md", "docs/implementations.md")}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What a notebook does for its pictures, and enough of it to see that it runs.
SHORTER = {"steps=300": "steps=20"}


def module_names() -> list[str]:
    """Every module of the package, found by its file."""
    names = []
    for folder, package in SOURCES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            names.append(".".join((package, *(part for part in parts if part != "__init__"))))
    return names


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def own_public(module) -> list[tuple[str, object]]:
    """Public functions and classes that a module defines, and the public methods of its classes."""
    found = []
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            found.append((name, value))
            members = [member for member in vars(value) if not member.startswith("_")]
            methods = [(member, getattr(value, member)) for member in members]
            found += [(f"{name}.{m}", f) for m, f in methods if documentable(value, m, f)]
        elif callable(value):
            found.append((name, value))
    return found


def documentable(owner: type, name: str, value: object) -> bool:
    """Methods and properties written in the class, not fields nor what a framework generates."""
    if name == "setup" or isinstance(vars(owner)[name], type):
        return False
    if isinstance(value, property):
        return True
    return callable(value) and getattr(value, "__module__", None) == owner.__module__


@pytest.mark.parametrize("name", module_names())
def test_everything_public_has_a_docstring(name):
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name} has no docstring"
    assert not [label for label, value in own_public(module) if not inspect.getdoc(value)]


@pytest.mark.parametrize("name", module_names())
def test_doctests_print_what_they_say(name):
    module = importlib.import_module(name)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=options).failed == 0


def commands(path: Path) -> list[list[str]]:
    """What follows `python train.py` on a page, in fenced code, inline code and docstrings."""
    text = path.read_text().replace("\\\n", " ")
    lines = re.findall(r"\bpython train\.py ([^`\n]*)", text)
    parts = [re.split(r"&&|;|\||#", line)[0] for line in lines]
    return [shlex.split(part) for part in parts if "..." not in part]


@pytest.mark.parametrize("path", [*MARKDOWN, *PRESETS.values()], ids=relative)
def test_commands_are_understood(path):
    found = commands(path)
    for preset, *words in found:
        if preset not in ("PRESET", "--help"):
            load = runpy.run_path(str(PRESETS[preset]))[preset]
            if "--help" not in words:
                cli.parse(preset, load(), words, "")
    assert found or path not in MUST_TRAIN


def calls(path: Path) -> list[tuple[str, list[str]]]:
    """(script or module, arguments) of all other Python commands on a page."""
    text = path.read_text().replace("\\\n", " ")
    found = re.findall(r"\bpython (?:-m (posjax\.\w+)|(benchmarks/\w+\.py))([^`\n]*)", text)
    words = [re.split(r"&&|;|#", rest)[0] for *_, rest in found]
    return [
        (module or script, shlex.split(rest))
        for (module, script, _), rest in zip(found, words, strict=True)
    ]


def command_line(name: str):
    """The class or function from which a script or a module makes its command line.

    Calling it does nothing else.
    """
    if name.startswith("posjax."):
        return functools.wraps(importlib.import_module(name).main)(lambda *_, **__: None)
    return importlib.import_module(Path(name).stem).Settings


@pytest.mark.parametrize("path", MARKDOWN, ids=relative)
def test_other_commands_are_understood(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    found = calls(path)
    for name, words in found:
        if "--help" not in words:
            tyro.cli(command_line(name), args=words)
    assert found or path not in MUST_CALL


def python(path: Path) -> str:
    """All Python blocks of a page, in their order."""
    return "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL))


@pytest.mark.parametrize("path", [path for path in MARKDOWN if python(path)], ids=relative)
def test_python_runs_as_a_new_user_copies_it(path, tmp_path):
    """In a process that has none of the settings of these tests."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", python(path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_pages_that_must_have_python():
    assert all(python(path) for path in MUST_RUN)


@pytest.mark.parametrize("path", MARKDOWN, ids=relative)
def test_names_exist(path):
    """`posjax.X.Y` on a page; fields count as names of their class."""
    for name in set(re.findall(r"\bposjax((?:\.[A-Za-z_]\w*)+)", path.read_text())):
        functools.reduce(attribute, name[1:].split("."), importlib.import_module("posjax"))


def attribute(owner: object, name: str) -> object:
    if inspect.ismodule(owner) and not hasattr(owner, name):
        return importlib.import_module(f"{owner.__name__}.{name}")
    return getattr(owner, name)


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_one_address_of_the_repository():
    """`pyproject.toml` has it; other files copy it."""
    (address,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"].values()
    assert f'\nrepository-code: "{address}"\n' in (ROOT / "CITATION.cff").read_text()
    assert f"<{address}>" in (ROOT / "README.md").read_text()
    assert f"git clone {address} " in (ROOT / "CONTRIBUTING.md").read_text()


def anchors(path: Path) -> set[str]:
    """The anchors that a page's headings make, as on GitHub."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}


@pytest.mark.parametrize("path", MARKDOWN, ids=relative)
def test_links_inside_the_repository_resolve(path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(<?([^)\s>]+)>?(?: [^)]*)?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        page = path.parent / name if name else path
        if not page.exists() or (anchor and anchor not in anchors(page)):
            broken.append(target)
    assert not broken


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # half of its time is compilation
    reason = "notebooks run where the extra `notebooks` is installed"
    nbclient = pytest.importorskip("nbclient", reason=reason)
    nbformat = pytest.importorskip("nbformat", reason=reason)
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for long, short in SHORTER.items():
            cell.source = cell.source.replace(long, short)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": ROOT}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
