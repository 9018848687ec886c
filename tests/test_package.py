"""What `pip install` gives: every module, a light import, the declared packages."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import posjax
import posjax.kernels.reference
from tests.conftest import OPTIONAL

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Top-level folder -> package that it installs as.
SOURCES = {"posjax": "posjax", "kernels": "posjax.kernels"}
# Imported by train.py and by what it calls, not by attention's users.
HEAVY = {"flax", "orbax", "optax", "grain", "matplotlib", "tensorboardX", "tyro"}


def run(*command: object, cwd: Path, path: Path | None = None) -> str:
    """Output of a command; a failure shows what it printed.

    Args:
        path: where it looks for modules before the installed ones.
    """
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean |= {} if path is None else {"PYTHONPATH": str(path)}
    process = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True
    )
    assert process.returncode == 0, f"{command}\n{process.stdout}\n{process.stderr}"
    return process.stdout


def installed_paths() -> set[str]:
    """Where every module should be in the wheel."""
    return {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in SOURCES.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A source archive and the wheel made of it, from a copy, so that the clone stays as it is."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in SOURCES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore, symlinks=True)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


def test_the_package_and_its_kernels_are_of_one_tree():
    """An installed mapping would give a second clone the kernels of the first one."""
    root = Path(posjax.__file__).parent.parent.resolve()
    kernels = Path(posjax.kernels.__file__).resolve()
    assert root == ROOT
    assert kernels == ROOT / "kernels" / "__init__.py"
    assert Path(posjax.kernels.reference.__file__).resolve() == ROOT / "kernels" / "reference.py"


def test_source_archive_holds_every_module(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= installed_paths()


def test_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    assert names == installed_paths()
    assert len(licences) == 1


def test_installed_wheel_imports_from_another_folder(wheel, tmp_path):
    home = tmp_path / "environment"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The dependencies come from this environment. A .pth file does not run the other .pth files
    # there, so an editable posjax is not seen.
    (site,) = home.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if path.endswith("-packages")]
    (site / "dependencies.pth").write_text("\n".join(shared))
    script = """
        import posjax, posjax.attention, posjax.encodings, posjax.kernels, posjax.models
        print(posjax.__file__, posjax.kernels.__file__)
    """
    output = run(python, "-I", "-c", textwrap.dedent(script), cwd=tmp_path)
    for path in output.split():
        assert Path(path).is_relative_to(site)


def test_import_is_light_and_starts_no_backend(tmp_path):
    script = """
        import sys
        import posjax
        from jax._src import xla_bridge
        print(xla_bridge.backends_are_initialized(), *{name.split(".")[0] for name in sys.modules})
    """
    command = sys.executable, "-c", textwrap.dedent(script)
    started, *modules = run(*command, cwd=tmp_path, path=ROOT).split()
    assert started == "False"
    assert "jax" in modules
    assert HEAVY.isdisjoint(modules)


def test_package_list_equals_the_folders():
    folders = {
        ".".join((package, *path.parent.relative_to(ROOT / folder).parts))
        for folder, package in SOURCES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders
    assert folders == {".".join(Path(path).parent.parts) for path in installed_paths()}


def distribution(requirement: str) -> str:
    """The normalised name at the start of a requirement."""
    name = re.match(r"[\w.-]+", requirement).group()
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(*patterns: str) -> dict[str, set[str]]:
    """Distribution -> files that import it, wherever in the file."""
    providers = importlib.metadata.packages_distributions()
    own = {"train"} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    found: dict[str, set[str]] = {}
    for path in (path for pattern in patterns for path in ROOT.glob(pattern)):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            else:
                continue
            for top in {module.split(".")[0] for module in modules}:
                if top in sys.stdlib_module_names or top in own:
                    continue
                names = {distribution(name) for name in providers.get(top, [top])}
                for name in names:
                    found.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    return found


REQUIRED = {distribution(line) for line in PROJECT["project"]["dependencies"]}
TEST = {distribution(line) for line in PROJECT["project"]["optional-dependencies"]["test"]}
INSTALLED_CODE = ("posjax/**/*.py", "kernels/**/*.py", "train.py", "configs/**/*.py")


def test_installed_code_imports_only_dependencies():
    undeclared = {
        name: files for name, files in imported(*INSTALLED_CODE).items() if name not in REQUIRED
    }
    assert not undeclared


def test_tests_import_only_the_extra_test_and_optional_partners():
    allowed = REQUIRED | TEST | {distribution(name) for name in OPTIONAL}
    found = imported("tests/**/*.py")
    assert not {name: files for name, files in found.items() if name not in allowed}


def test_every_dependency_is_used():
    assert set(imported(*INSTALLED_CODE, "tests/**/*.py")) >= REQUIRED


def test_citation_and_changelog_name_the_version():
    version = re.search(r'__version__ = "(.+)"', (ROOT / "posjax/version.py").read_text())[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
