"""The command line of one preset: parse, train or compare, report."""

import dataclasses
import itertools
import shlex
import sys
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from posjax.encodings import registry
from posjax.training.arguments import arguments_class, module_from
from posjax.training.config import Config
from posjax.training.interrupts import Interrupted

__all__ = ["main"]

_EXTRA = [
    (
        "resume",
        bool,
        False,
        "Go on from the newest checkpoint; a finished run shows its report again.",
    ),
    (
        "compare",
        tuple[str, ...],
        (),
        "Train these encodings one after the other with the same seed and data, and compare them; "
        '"all" stands for every one there is.',
    ),
    ("seeds", tuple[int, ...], (), "With --compare: train each encoding with each of these seeds."),
    (
        "distributed",
        bool,
        False,
        "Join the processes of a cluster that JAX can see: Slurm, Open MPI, Kubernetes, TPU.",
    ),
]


class UsageError(ValueError):
    """Arguments that do not go together."""


def main(preset: str, config: Config, words: list[str], description: str) -> int:
    """Runs the command `python train.py PRESET WORDS`.

    Args:
        config: what the preset returns.
        description: the preset's docstring, shown by --help.

    Returns:
        The exit status: 0, 1 (training diverged), 2 (bad arguments), 128 + signal.
    """
    console = Console()
    try:
        config, arguments = parse(preset, config, words, description)
        return _run(config, arguments, console)
    except (ValueError, NotImplementedError) as error:
        return _fail(str(error), 2)
    except ArithmeticError as error:
        return _fail(str(error), 1)
    except Interrupted as stop:
        again = [word for word in words if word != "--resume"]
        command = shlex.join(["python", sys.argv[0], preset, *again, "--resume"])
        return _fail(f"{stop}\nresume with: {command}", 128 + stop.number, kind=None)


def _fail(text: str, status: int, kind: str | None = "error") -> int:
    console = Console(stderr=True)
    prefix = f"{kind}: " if kind else ""
    console.print(prefix + text, markup=False, highlight=False, soft_wrap=True)
    return status


def parse(preset: str, config: Config, words: list[str], description: str) -> tuple[Config, Any]:
    """The config with the changes in `words`, and the other arguments.

    Raises:
        ValueError: an unknown encoding, or arguments that do not go together.
        SystemExit: from tyro, for --help and for unknown fields.
    """
    words = [_alias(word) for word in words]
    comparing = _has(words, "--compare")
    if comparing and _has(words, "--encoding"):
        raise UsageError(
            "--encoding and its fields are for a single run; --compare takes each encoding with "
            "its defaults"
        )
    if comparing:
        config = dataclasses.replace(config, name=f"{config.name}-compare")
    encoding, name = config.encoding, registry.spec_of(config.encoding)
    chosen = _value(words, "--encoding")
    if chosen is not None:
        encoding, name = registry.create(chosen), chosen
    _check_encoding_fields(words, encoding, name)
    kind = arguments_class(config, encoding, name, _EXTRA)
    arguments = tyro.cli(
        kind,
        prog=f"train.py {preset}",
        description=_describe(description, config),
        args=words,
        use_underscores=True,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    changes = {f.name: getattr(arguments, f.name, None) for f in dataclasses.fields(Config)}
    if encoding is not None:
        encoding = module_from(encoding, arguments.encoding)
    if arguments.seeds and not arguments.compare:
        raise UsageError("--seeds goes with --compare; a single run takes --seed")
    return Config(**{**changes, "encoding": encoding}), arguments


def _describe(description: str, config: Config) -> str:
    names = ", ".join(registry.names())
    task = "\n\n--data.path is another name of --task.path." if hasattr(config.task, "path") else ""
    return f"{description.strip()}\n\nEncodings: {names}; A+B combines two.{task}"


def _alias(word: str) -> str:
    """`--data.path` stands for `--task.path`."""
    return "--task." + word.removeprefix("--data.") if word.startswith("--data.") else word


def _has(words: list[str], option: str) -> bool:
    return any(word == option or word.startswith((f"{option}=", f"{option}.")) for word in words)


def _value(words: list[str], option: str) -> str | None:
    """The word after an option: the encoding has to be known before tyro reads its fields."""
    value = None
    for word, after in itertools.pairwise([*words, "--"]):
        if word.startswith(f"{option}="):
            value = word.partition("=")[2]
        elif word == option and not after.startswith("--"):
            value = after
    return value


def _check_encoding_fields(words: list[str], encoding: Any, name: str) -> None:
    fields = [word for word in words if word.startswith("--encoding.")]
    if encoding is None and fields:
        raise UsageError(f"{fields[0]}: the encoding {name!r} has no fields")


def _run(config: Config, arguments: Any, console: Console) -> int:
    import jax

    if arguments.distributed:
        jax.distributed.initialize()
    leader = jax.process_index() == 0
    console.quiet = not leader
    directory = Path(config.runs) / config.name
    if arguments.compare:
        from posjax.training.compare import compare_encodings, show_comparison

        seeds, names = arguments.seeds or (config.seed,), arguments.compare
        names = registry.all_names() if names == ("all",) else names
        comparison = compare_encodings(
            config, names, seeds, directory, resume=arguments.resume, console=console
        )
        show_comparison(console, comparison, directory)
        return 0
    from posjax.training.loop import fit
    from posjax.training.report import show_report

    report = fit(config, directory, resume=arguments.resume, console=console)
    show_report(console, report, directory)
    return 0
