"""Time of a training step of one language model with CoPE and with RoPE.

    python benchmarks/train_step.py --output step.json              12 layers, T = 2048 and 8192
    python benchmarks/train_step.py --layers 2 --width 64 --lengths 128 --batch-tokens 256 \\
        --vocabulary 512 --dtype float32                            on a CPU, in a minute

The whole step as `train.py` does it: forward, backward, clipping, AdamW. Contenders take turns; a
time is that of several steps in a row by their number, with one wait at the end, without
compilation; medians of the rounds, and their ratio to the fastest step with RoPE. Before any time
is taken the loss and the gradient's norm of every contender are compared with those of blockwise
attention on the same parameters and tokens.
"""

import contextlib
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from attention_timing import NO_TIME, words_of
from gpu_trials import no_gpu
from machine import environment
from rich.console import Console
from rich.table import Table

from posjax.encodings import CoPE, RoPE
from posjax.encodings.base import PositionEncoding
from posjax.models import Transformer, TransformerConfig, layers
from posjax.tasks import SelectiveCopy
from posjax.training import Config, TrainConfig
from posjax.training.mesh import make_mesh
from posjax.training.optimizer import make_optimizer, make_schedule
from posjax.training.state import count_parameters, initial_state
from posjax.training.step import make_train_step

# Relative difference of loss and gradient norm, over all layers in 16 bits or in float32.
TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}
# What CoPE's step may take of RoPE's.
GOAL = 1.25


@dataclasses.dataclass(frozen=True)
class Settings:
    """Model, data and what to compare."""

    lengths: tuple[int, ...] = (2048, 8192)
    """T."""
    batch_tokens: int = 16_384
    """Tokens of a step: B T."""
    layers: int = 12
    heads: int = 12
    width: int = 768
    vocabulary: int = 32_000
    positions: int = 64
    """P of CoPE."""
    dtype: str = "bfloat16"
    """Of activations; parameters are float32."""
    rounds: int = 5
    steps: int = 4
    """Steps of one measurement."""
    contenders: tuple[str, ...] = ()
    """None: all that can run here."""
    budget: float | None = None
    """Seconds after which nothing else is compiled."""
    output: Path | None = None
    """Write everything to this JSON file."""


class Contender(NamedTuple):
    """An encoding, and who computes attention; "cudnn" is jax.nn's."""

    encoding: Callable[[Settings], PositionEncoding]
    implementation: str | None


def _cope(settings: Settings) -> CoPE:
    return CoPE(num_positions=settings.positions)


def _rope(settings: Settings) -> RoPE:
    return RoPE()


CONTENDERS = {
    "cope_gpu": Contender(_cope, "gpu"),
    "rope_cudnn": Contender(_rope, "cudnn"),
    "cope_xla": Contender(_cope, "xla"),
    "rope_xla": Contender(_rope, "xla"),
    "rope_gpu": Contender(_rope, "gpu"),
    "rope": Contender(_rope, None),
}


def available(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """Contenders that can run here; why the others cannot."""
    unknown = [name for name in settings.contenders if name not in CONTENDERS]
    if unknown:
        raise SystemExit(f"unknown contender {unknown[0]!r}; known are {', '.join(CONTENDERS)}")
    missing = {}
    for name in settings.contenders or CONTENDERS:
        implementation = CONTENDERS[name].implementation
        if implementation == "gpu" and (reason := no_gpu()):
            missing[name] = reason
        if implementation == "cudnn" and jax.default_backend() != "gpu":
            missing[name] = f"cuDNN needs a GPU, and JAX runs on {jax.default_backend()}"
    return [n for n in settings.contenders or CONTENDERS if n not in missing], missing


@contextlib.contextmanager
def _attention_by(implementation: str | None) -> Iterator[None]:
    """The model's attention is cuDNN's while it is traced, if that is wanted."""
    before = layers.dot_product_attention

    def cudnn(query, key, value, bias, **settings):
        del bias, settings  # RoPE has none, and the model is causal
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation="cudnn"
        )

    layers.dot_product_attention = cudnn if implementation == "cudnn" else before
    try:
        yield
    finally:
        layers.dot_product_attention = before


def config_of(settings: Settings, name: str, length: int) -> Config:
    """As `train.py` has it."""
    contender = CONTENDERS[name]
    own = None if contender.implementation == "cudnn" else contender.implementation
    return Config(
        name="benchmark",
        task=SelectiveCopy(),  # gives no data here
        model=TransformerConfig(
            layers=settings.layers,
            heads=settings.heads,
            width=settings.width,
            dtype=settings.dtype,
            scan_layers=True,
            implementation=own,
        ),
        encoding=contender.encoding(settings),
        train=TrainConfig(steps=1000, batch_size=max(1, settings.batch_tokens // length)),
    )


class Running:
    """One contender: its compiled step and its state, which every step replaces."""

    def __init__(self, settings: Settings, name: str, length: int):
        config = config_of(settings, name, length)
        mesh = make_mesh(dataclasses.replace(config.mesh, data=1))
        model = Transformer(config.model, settings.vocabulary, config.encoding)
        optimizer = make_optimizer(
            config.optimizer, make_schedule(config.optimizer, config.train.steps)
        )
        random = np.random.default_rng(0)
        shape = (config.train.batch_size, length + 1)
        tokens = jnp.asarray(random.integers(0, settings.vocabulary, shape), jnp.int32)
        ones = jnp.ones((shape[0], length), jnp.float32)
        self.batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": ones}
        self.step = make_train_step(model, config, mesh)
        with _attention_by(CONTENDERS[name].implementation):
            self.state = initial_state(model, optimizer, length, config.seed, mesh)
            self.parameters = count_parameters(self.state.params)
            self.first = {k: float(v) for k, v in self.run(1).items()}  # compiles

    def run(self, steps: int) -> dict:
        """Some steps; returns the last one's metrics when they are there."""
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
        return jax.block_until_ready(metrics)


def check(settings: Settings, running: dict[str, Running]) -> dict[str, str]:
    """Those whose first step differs from that with blockwise attention."""
    wrong, limit = {}, TOLERANCE[settings.dtype]
    for name, found in running.items():
        other = running.get(f"{name.partition('_')[0]}_xla")
        for what in ("loss", "gradient_norm"):
            want = found.first[what] if other is None else other.first[what]
            error = abs(found.first[what] / want - 1)
            if not error <= limit:
                wrong[name] = f"the {what} differs by {error:.1e} of it, more than {limit:.0e}"
    return wrong


def measured(settings: Settings, names: list[str], length: int, deadline: float) -> dict:
    """Rows of one length: times, or what is wrong."""
    running, rows = {}, {}
    for name in names:
        if time.monotonic() > deadline:
            rows[name] = {"failed": NO_TIME}
            continue
        try:
            running[name] = Running(settings, name, length)
        except Exception as error:  # any library's: the others go on
            rows[name] = {"failed": words_of(error)}
    rows |= {name: {"wrong": reason} for name, reason in check(settings, running).items()}
    running = {name: found for name, found in running.items() if name not in rows}
    seconds = {name: [] for name in running}
    for _ in range(settings.rounds):
        for name, found in running.items():
            found.run(1)
            start = time.perf_counter()
            found.run(settings.steps)
            seconds[name].append((time.perf_counter() - start) / settings.steps)
    for name, found in seconds.items():
        rows[name] = {"seconds": found, "median_seconds": float(np.median(found))}
        rows[name] |= {"first": running[name].first, "parameters": running[name].parameters}
    return rows


def show(console: Console, length: int, rows: dict) -> None:
    """A table, and whether the goal is met."""
    medians = {name: row["median_seconds"] for name, row in rows.items() if "seconds" in row}
    best = {
        kind: min((x for name, x in medians.items() if name.startswith(kind)), default=None)
        for kind in ("rope", "cope")
    }
    table = Table("", "step, ms", "to the fastest RoPE", title=f"T = {length}")
    for name, row in rows.items():
        if "seconds" not in row:
            table.add_row(name, row.get("failed") or f"wrong: {row['wrong']}")
            continue
        spread = f"[{1e3 * min(row['seconds']):.4g}, {1e3 * max(row['seconds']):.4g}]"
        ratio = f"{medians[name] / best['rope']:.3f}" if best["rope"] else ""
        table.add_row(name, f"{1e3 * medians[name]:.4g} {spread}", ratio)
    console.print(table)
    if None not in best.values():
        ratio = best["cope"] / best["rope"]
        word = "met" if ratio <= GOAL else "missed"
        console.print(f"CoPE / RoPE = {ratio:.3f}; the goal of {GOAL} is {word}")


def main(settings: Settings) -> None:
    """Checks, measures, prints, writes."""
    end, console = time.monotonic() + (settings.budget or 0), Console(width=120)
    names, missing = available(settings)
    command = ("python benchmarks/train_step.py " + shlex.join(sys.argv[1:])).strip()
    content = {"command": command, **environment(), "missing": missing, "results": {}}
    content["settings"] = dataclasses.asdict(settings) | {"output": str(settings.output)}
    for length in settings.lengths:
        # Every length has its part of what is left.
        parts = len(settings.lengths) - len(content["results"])
        now = time.monotonic()
        deadline = now + (end - now) / parts if settings.budget is not None else float("inf")
        rows = measured(settings, names, length, deadline)
        content["results"][str(length)] = rows
        show(console, length, rows)
        jax.clear_caches()
        if settings.output is not None:
            settings.output.write_text(json.dumps(content, indent=1) + "\n")
    for name, reason in missing.items():
        console.print(f"not run: {name}: {reason}", markup=False)
    if any("wrong" in row for rows in content["results"].values() for row in rows.values()):
        raise SystemExit("Some contenders were wrong and not timed; see above.")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
