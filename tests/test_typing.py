"""Editors and type checkers see everything that a user reaches."""

import ast
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jedi
import pytest

import posjax
from posjax import encodings
from posjax.encodings import registry

ROOT = Path(__file__).parent.parent
SCRIPT = '''\
"""A user's script."""

import jax
import jax.numpy as jnp

import posjax
from posjax.encodings import CoPE, RoPE, create
from posjax.models import Transformer, TransformerConfig, generate
from posjax.tasks import SelectiveCopy
from posjax.training import Config, TrainConfig, fit

query = jnp.ones((1, 8, 2, 16))
bias: posjax.Bias = posjax.ContextualBias(jnp.ones((4, 16)), gate_bias=jnp.float32(-2.0))
output: jax.Array = posjax.dot_product_attention(query, query, query, bias, is_causal=True)
text: str = posjax.explain(query, query, query, implementation=("tpu", "xla"))
own: posjax.encodings.CoPE = posjax.CoPE(num_positions=8)
yarn: RoPE = posjax.RoPE.yarn()
model = Transformer(TransformerConfig(layers=1), vocab_size=9, encoding=CoPE(num_positions=4))
other = posjax.models.Transformer(posjax.models.TransformerConfig(), 9, encoding=create("rope"))
named: list[str] = posjax.encodings.names()
graph = posjax.graphs.LapPE
kernelized = posjax.kernelized.kernelized_attention
task = SelectiveCopy(symbols=4)
steps = TrainConfig(steps=9, batch_size=4)
config = Config("mine", task, TransformerConfig(), posjax.CoPE(), train=steps)
train = fit
continue_text = generate
'''


def test_pyright_is_clean_on_a_users_script(tmp_path):
    """Also strict about names that are private to a module or missing."""
    assert shutil.which("pyright"), "pyright comes with the extra `test`"
    (tmp_path / "script.py").write_text(SCRIPT)
    settings = {"extraPaths": [str(ROOT)], "pythonVersion": "3.11", "typeCheckingMode": "standard"}
    settings |= {"reportPrivateImportUsage": "error", "reportMissingImports": "error"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = ["pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    report = json.loads(found.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    assert [error["message"] for error in report["generalDiagnostics"]] == []


@pytest.mark.parametrize("name", ["CoPE", "RoPE", "models", "dot_product_attention", "T5"])
def test_an_editor_completes_names_and_settings(name):
    project = jedi.Project(ROOT)
    text = f"import posjax\nposjax.{name[:2]}"
    names = {found.name for found in jedi.Script(text, project=project).complete()}
    assert name in names


def test_an_editor_completes_the_settings_and_finds_the_definition():
    project = jedi.Project(ROOT)
    text = "import posjax\nposjax.CoPE(num_pos"
    found = {one.name for one in jedi.Script(text, project=project).complete()}
    assert "num_positions=" in found
    (place,) = jedi.Script("import posjax\nposjax.CoPE", project=project).goto(
        2, 9, follow_imports=True
    )
    assert place.module_path == ROOT / "posjax" / "encodings" / "cope.py"


def test_lazy_submodules_are_those_that_tools_see():
    """The lines under `if TYPE_CHECKING` and the names that `__getattr__` imports are the same."""
    tree = ast.parse((ROOT / "posjax" / "__init__.py").read_text())
    (block,) = (one for one in tree.body if isinstance(one, ast.If))
    seen = {alias.name for one in block.body for alias in one.names}
    assert seen - {"*"} == set(posjax._SUBMODULES)
    for name in posjax._SUBMODULES:
        assert getattr(posjax, name) is importlib.import_module(f"posjax.{name}")


def test_everything_is_listed_and_reached():
    listed = set(dir(posjax))
    assert listed >= set(posjax._SUBMODULES) | set(registry.classes()) | {"create", "names"}
    assert not {"importlib", "Any", "ModuleType", "TYPE_CHECKING"} & listed
    for name in registry.classes():
        assert getattr(posjax, name) is getattr(encodings, name)
    with pytest.raises(AttributeError, match="no attribute 'Copee'"):
        posjax.Copee  # noqa: B018


def test_a_second_clone_runs_its_own_kernels(tmp_path):
    """Also where another clone is installed: a broken kernel is seen by the clone's own tests."""
    for name in ("posjax", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    path = tmp_path / "kernels" / "reference.py"
    path.write_text(
        path.read_text().replace("    dots = ", "    raise SystemExit(7)\n    dots = ", 1)
    )
    script = "import jax, posjax; q = jax.numpy.ones((1, 2, 1, 4)); "
    script += "posjax.dot_product_attention(q, q, q, implementation='reference')"
    found = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False)
    assert found.returncode == 7
