import subprocess
import sys

import pytest
import tyro

import train
from posjax.encodings import CoPE, RoPE, registry
from posjax.frequencies import Linear, LongRoPE, YaRN
from posjax.training import cli
from posjax.training.arguments import field_help, module_arguments, module_from
from tests.training.tiny import tiny

PRESETS = sorted(train.presets())


def parse(*words, preset="debug"):
    return cli.parse(preset, train.load(preset, train.presets()[preset]), list(words), "About.")


def main(*words):
    try:
        return train.main(list(words))
    except SystemExit as end:
        return end.code


def test_presets_are_found_beside_train_py():
    wanted = {
        "debug", "flip_flop", "flip_flop_paper", "selective_copy", "selective_copy_paper", "text",
        "text_paper",
    }  # fmt: skip
    assert wanted <= set(PRESETS)


def test_help_lists_the_presets(capsys):
    assert main("--help") == 0
    text = capsys.readouterr().out
    for name, path in train.presets().items():
        first = train.description(name, path).splitlines()[0]
        assert first.endswith(".")
        assert f"{name} " in text and first in text
    assert main() == 2


def test_help_needs_no_jax_and_works_from_another_folder(tmp_path):
    code = (
        "import runpy, sys; sys.argv = ['train.py', '--help']\n"
        f"try: runpy.run_path({train.__file__!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "selective_copy" in result.stdout


@pytest.mark.parametrize("preset", PRESETS)
def test_help_of_a_preset_explains_every_field(preset, capsys):
    assert main(preset, "--help") == 0
    text = capsys.readouterr().out
    for option in (
        "--model.layers INT", "--optimizer.learning_rate FLOAT", "--train.steps INT", "--seed INT",
        "--encoding NAME", "--encoding.num_positions INT", "--mesh.data INT", "--compare NAME",
    ):  # fmt: skip
        assert option in text
    config = train.load(preset, train.presets()[preset])
    for part in (config, config.task, config.model, config.train, config.optimizer, config.mesh):
        for name, meaning in field_help(type(part)).items():
            assert meaning, name
    assert f"(default: {config.train.steps})" in text
    words = " ".join(text.replace("│", " ").split())
    assert field_help(type(config.train))["batch_size"] in words
    assert ("--data.path" in words) == hasattr(config.task, "path")


def test_overrides():
    config, arguments = parse(
        "--model.layers", "4", "--optimizer.learning_rate", "3e-4", "--train.steps", "100",
        "--task.blanks", "6", "--seed", "3", "--name", "x", "--resume",
    )  # fmt: skip
    assert config.model.layers == 4 and config.optimizer.learning_rate == 3e-4
    assert config.train.steps == 100 and config.task.blanks == 6
    assert config.seed == 3 and config.name == "x" and arguments.resume
    base, _ = parse()
    assert config.task.symbols == base.task.symbols and config.encoding == base.encoding
    assert base == train.load("debug", train.presets()["debug"])


def test_hyphens_work_too():
    assert parse("--train.batch-size", "16")[0].train.batch_size == 16


def test_the_encoding_and_its_fields():
    assert parse("--encoding.num_positions", "5")[0].encoding == CoPE(num_positions=5)
    assert parse("--encoding", "rope", "--encoding.base", "500")[0].encoding == RoPE(base=500.0)
    assert parse("--encoding=nope")[0].encoding is None
    config, _ = parse("--encoding", "cope.paper", "--encoding.num_positions", "9")
    paper = CoPE.paper()
    assert config.encoding.num_positions == 9 and config.encoding.gate_bias == paper.gate_bias
    assert config.encoding.table_deviation == paper.table_deviation


@pytest.mark.parametrize("name", [n for n in registry.names() if n != "nope"] + ["abacus+rope"])
def test_every_encoding_survives_the_command_line(name):
    module = registry.create(name)
    assert module_from(module, module_arguments(module)) == module
    assert parse("--encoding", name)[0].encoding == module


def test_fields_of_a_combination():
    config, _ = parse("--encoding", "abacus+rope", "--encoding.rope.base", "77")
    expected = registry.create("abacus+rope")
    (name,) = (f for f in ("encodings", "parts") if hasattr(expected, f))
    assert getattr(config.encoding, name)[1] == RoPE(base=77.0)
    assert getattr(config.encoding, name)[0] == getattr(expected, name)[0]


def test_settings_inside_an_encoding():
    words = ("--encoding.scaling.factor", "8", "--encoding.scaling.ramp", "rotations")
    config, _ = parse("--encoding", "rope.yarn", *words, "--encoding.fraction", "0.5")
    scaling = YaRN(factor=8.0, ramp="rotations")
    assert config.encoding == RoPE(fraction=0.5, scaling=scaling)
    words = ("--encoding.scaling.long_factors", "1.5", "2", "--encoding.scaling.factor", "4")
    config, _ = parse("--encoding", "rope.longrope", *words)
    assert config.encoding == RoPE(scaling=LongRoPE(long_factors=(1.5, 2.0), factor=4.0))


def test_settings_inside_a_combination():
    config, _ = parse("--encoding", "abacus+rope.linear", "--encoding.rope.scaling.factor", "2")
    assert config.encoding.encodings[1] == RoPE(scaling=Linear(factor=2.0))


def test_data_path_is_task_path():
    config, _ = parse("--data.path", "a", "b", preset="text")
    assert config.task.path == ("a", "b")
    assert parse("--task.path", "c", preset="text")[0].task.path == ("c",)


def test_names_of_runs():
    assert parse()[0].name == "debug"
    config, arguments = parse("--compare", "cope", "rope", "--seeds", "0", "1")
    assert config.name == "debug-compare"
    assert arguments.compare == ("cope", "rope") and arguments.seeds == (0, 1)
    assert parse("--compare", "cope", "--name", "mine")[0].name == "mine"


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["selectiv_copy"], ["no preset 'selectiv_copy'", "did you mean 'selective_copy'"]),
        (["zzz"], ["no preset 'zzz'", "Presets: debug, flip_flop"]),
        (["debug", "--encoding", "rop"], ['no encoding "rop"', 'did you mean "rope"']),
        (["debug", "--encoding.num_position", "3"], ["--encoding.num_position", "num_positions"]),
        (["debug", "--model.layer", "3"], ["Unrecognized", "--model.layers"]),
        (["debug", "--learning_rate", "3"], ["Unrecognized", "--optimizer.learning_rate"]),
        (["debug", "--model.layers", "x"], ["--model.layers", "'x'"]),
        (["debug", "--model.norm", "per"], ["--model.norm", "'pre'", "'post'"]),
        (["debug", "--train.steps", "0"], ["train.steps is 0; it must be at least 1."]),
        (["debug", "--encoding.num_positions", "1"], ["num_positions", "1", "at least 2"]),
        (
            ["debug", "--encoding", "rope.yarn", "--encoding.scaling.factor", "0.5"],
            ["YaRN factor is 0.5; it must be at least 1"],
        ),
        (["debug", "--encoding", "nope", "--encoding.base", "3"], ["'nope' has no fields"]),
        (["debug", "--compare", "cope", "--encoding", "rope"], ["--encoding", "single run"]),
        (["debug", "--compare", "cope", "--encoding.num_positions", "8"], ["single run"]),
        (["debug", "--compare", "cope", "rop"], ['did you mean "rope"']),
        (["debug", "--compare", "cope", "cope"], ["none of them twice", "cope"]),
        (["debug", "--seeds", "1", "2"], ["--seeds goes with --compare"]),
        (["debug", "--model.heads", "3"], ["model.heads is 3", "a divisor"]),
        (["debug", "--mesh.fsdp", "2"], ["mesh.fsdp=2 is not possible yet"]),
        (["debug", "--mesh.data", "3"], ["train.batch_size is 8", "a multiple of", "--mesh.data"]),
        (["debug", "--task.symbols", "0"], ["symbols", "0"]),
        (["debug", "--name", "a/b"], ["name", "'a/b'"]),
        (["debug", "--resume"], ["holds no run to resume"]),
        (["debug", "--compare", "cope", "--resume"], ["holds no comparison to resume"]),
        (["text", "--data.path", "/no/such/file"], ["/no/such/file"]),
    ],
)
def test_mistakes(words, texts, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(*words) == 2
    found = capsys.readouterr()
    seen = " ".join((found.out + found.err).replace("│", " ").split())
    assert all(text in seen for text in texts), seen
    assert not list(tmp_path.iterdir())


def test_divergence_is_status_1(monkeypatch, capsys):
    from posjax.training.clock import NonFiniteLossError

    def fit(*_, **__):
        raise NonFiniteLossError("loss is nan at step 5")

    monkeypatch.setattr("posjax.training.loop.fit", fit)
    assert cli.main("debug", tiny(), [], "About.") == 1
    assert "error: loss is nan at step 5" in capsys.readouterr().err


def test_modules_without_command_line_types_keep_their_fields():
    arguments = module_arguments(CoPE(num_positions=7))
    assert type(arguments).__name__ == "CoPE" and arguments.num_positions == 7
    assert tyro.cli(type(arguments), args=[], default=arguments) == arguments
