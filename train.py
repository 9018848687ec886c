"""Trains a preset: `python train.py PRESET [--FIELD VALUE ...]`; see `python train.py --help`."""

import ast
import difflib
import importlib.util
import sys
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent / "configs"

USAGE = """\
usage: python train.py PRESET [--FIELD VALUE ...]

Trains a small transformer with a position encoding, evaluates it and writes runs/NAME/.

Presets:
{presets}

More:
  python train.py PRESET --help                           every field of a preset, with its meaning
  python train.py PRESET --encoding rope                  another position encoding
  python train.py PRESET --compare cope rope learned      several, side by side
  python train.py PRESET --model.layers 4 --seed 1        changed fields
  python train.py PRESET --name mine                      another folder: runs/mine
  python train.py PRESET --resume                         go on after a stop
"""


def presets() -> dict[str, Path]:
    """The files of configs/ by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.py")) if path.stem[0] != "_"}


def description(name: str, path: Path) -> str:
    """The docstring of a preset, read without running the file."""
    for item in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(item, ast.FunctionDef) and item.name == name:
            return ast.get_docstring(item) or ""
    return ""


def usage() -> str:
    """The text of `python train.py --help`."""
    found = presets()
    width = max(map(len, found), default=0)
    lines = (
        f"  {name:{width}}  {description(name, path).partition(chr(10))[0]}"
        for name, path in found.items()
    )
    return USAGE.format(presets="\n".join(lines))


def load(name: str, path: Path):
    """The config that a preset returns."""
    spec = importlib.util.spec_from_file_location(f"configs.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise SystemExit(f"{path} has no function {name}(), which would return the config")
    return getattr(module, name)()


def main(words: list[str]) -> int:
    """Runs a command line; returns the exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if words else 2
    name, found = words[0], presets()
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        print(f"error: there is no preset {name!r}{hint}", file=sys.stderr)
        print(f"Presets: {', '.join(found)}", file=sys.stderr)
        return 2
    from posjax.training.cli import main as run  # After the quick answers: this imports JAX.

    return run(name, load(name, found[name]), words[1:], description(name, found[name]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
