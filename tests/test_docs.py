"""Documentation that executes: docstrings, doctests, the README's commands, links, notebooks."""

import doctest
import importlib
import inspect
import re
import runpy
import shlex
from pathlib import Path

import pytest

from posjax.training import cli

ROOT = Path(__file__).parent.parent
SOURCES = {"posjax": "posjax", "kernels": "posjax.kernels"}
MARKDOWN = sorted(
    path
    for folder in (ROOT, *(ROOT / name for name in ("docs", "benchmarks", "notebooks")))
    for path in (folder.glob("*.md") if folder == ROOT else folder.rglob("*.md"))
)
PRESETS = {path.stem: path for path in sorted((ROOT / "configs").glob("[!_]*.py"))}
MUST_SHOW_COMMANDS = {ROOT / "README.md", *PRESETS.values()}
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
    assert found or path not in MUST_SHOW_COMMANDS


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
