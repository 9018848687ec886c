"""Counts the parameters of hooks in posjax/encodings that a method takes and does not read.

python benchmarks/hook_parameters.py [folder]      posjax/encodings by default
"""

import ast
import sys
from pathlib import Path

FAMILIES = {"base", "distance", "registry", "rotary", "stream", "wrapper"}
HOOKS = {"layer", "positions", "embed", "shared", "cache", "rotate", "bias"}
HOOKS |= {"init_state", "stream_inputs", "update_stream", "extra_values", "update_state"}
HOOKS |= {"turn_of", "turns", "parameters", "function", "inner_indices"}
HOOKS |= {"begin", "keep", "enter", "remember", "carried", "advance"}  # names until version 0.1


def hooks(path: Path):
    """Each hook of the classes in a file: its parameters without self, and the names it reads."""
    for node in ast.walk(ast.parse(path.read_text())):
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef) and method.name in HOOKS:
                given = method.args
                names = [arg.arg for arg in (*given.args[1:], *given.kwonlyargs)]
                inside = (x for part in method.body for x in ast.walk(part))
                yield names, {x.id for x in inside if isinstance(x, ast.Name)}


def main(folder: str = "posjax/encodings") -> None:
    """Prints the counts."""
    files = [path for path in Path(folder).glob("*.py") if path.stem not in FAMILIES]
    found = [hook for path in files for hook in hooks(path)]
    total = sum(len(names) for names, _ in found)
    unused = sum(name not in read for names, read in found for name in names)
    print(f"{len(found)} hooks with {total} parameters, {unused} of them unused")


main(*sys.argv[1:])
