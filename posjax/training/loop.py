"""Training from a config to a report: build, restore, train, evaluate, write."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from rich.console import Console

from posjax.implementations import implementations_used
from posjax.models import Transformer
from posjax.tasks.data import train_dataset
from posjax.training.checkpoints import Checkpoints
from posjax.training.clock import Clock, NonFiniteLossError, Window
from posjax.training.config import Config, as_json
from posjax.training.evaluate import Evaluation, evaluate
from posjax.training.figures import draw_run
from posjax.training.interrupts import Interrupted, StopSignal
from posjax.training.mesh import check_batch_sizes, is_leader, make_mesh, to_devices
from posjax.training.optimizer import make_optimizer, make_schedule
from posjax.training.progress import TrainingProgress
from posjax.training.records import Records, read_records, write_json
from posjax.training.report import make_report
from posjax.training.runs import create_run, open_run
from posjax.training.state import TrainState, abstract_state, count_parameters, initial_state
from posjax.training.step import make_evaluate_step, make_train_step

__all__ = ["Interrupted", "NonFiniteLossError", "fit"]


def fit(
    config: Config,
    directory: Path | str | None = None,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains and evaluates, and writes everything into a folder.

    Args:
        directory: `runs/name` of the config, if None.
        resume: go on from the newest checkpoint in the folder; a finished run returns its report.
        console: where progress is shown; the standard output if None.

    Returns:
        The report, as in report.json.

    Raises:
        ValueError: the config does not fit together, or the folder does not fit the config.
        NonFiniteLossError: training diverged; the last checkpoint is from before.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    directory = Path(config.runs) / config.name if directory is None else Path(directory)
    report = open_run(directory, as_json(config), resume)
    if report is not None:
        return report
    with StopSignal() as stop:
        return _Trainer(config, directory, console, stop).run(resume)


class _Trainer:
    """One run in progress."""

    def __init__(
        self, config: Config, directory: Path, console: Console | None, stop: StopSignal
    ) -> None:
        self.config, self.directory, self.stop = config, directory, stop
        self.console = console if console and is_leader() else Console(quiet=not is_leader())
        self.mesh = make_mesh(config.mesh)
        check_batch_sizes(config.train, self.mesh)
        self.model = Transformer(
            config.model, vocab_size=config.task.vocabulary.size, encoding=config.encoding
        )
        schedule = make_schedule(config.optimizer, config.train.steps)
        optimizer = make_optimizer(config.optimizer, schedule)
        self.start = (self.model, optimizer, config.task.length, config.seed, self.mesh)
        # Errors of the model, before there is a folder.
        self.attention = self._implementations()
        self.target = abstract_state(*self.start)
        self.batches = iter(
            train_dataset(
                config.task,
                batch_size=config.train.batch_size,
                seed=config.seed,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        )
        self.train_step = make_train_step(self.model, config, self.mesh)
        self.evaluate_step = make_evaluate_step(self.model, config.task, self.mesh)
        self.records: Records | None = None

    def run(self, resume: bool) -> dict[str, Any]:
        """Everything from the first step to the report."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("every process has looked at the folder")
        if is_leader():
            create_run(self.directory, as_json(self.config))
        train = self.config.train
        self.checkpoints = Checkpoints(
            self.directory / "checkpoints",
            every=train.checkpoint_every,
            keep=train.keep_checkpoints,
        )
        if self.attention:
            self._say(self.attention)
        try:
            state = self._restore() if resume else None
            state = self._begin() if state is None else state
            done = int(state.step)
            if is_leader():
                self.records = Records(self.directory, done, last=train.steps)
            with TrainingProgress(self.console, self.config.name, train.steps, done) as progress:
                state = self._train(state, done, progress)
            return self._finish(state)
        finally:
            self.checkpoints.close()
            if self.records:
                self.records.close()

    def _begin(self) -> TrainState:
        self.window, self.clock, self.loss = Window([]), Clock(), None
        return initial_state(*self.start)

    def _restore(self) -> TrainState | None:
        if self.checkpoints.latest() is None:
            self._say(f"no checkpoint in {self.directory} yet: starting at step 0")
            return None
        state, data, meta = self.checkpoints.restore(self.target, as_json(self.config))
        self.batches.set_state(data)
        self.window = Window(meta["pending"])
        self.clock = Clock(meta["seconds"], meta["timed_steps"])
        self.loss = meta["loss"]
        self._say(f"resumed {self.directory} at step {int(state.step)}")
        return state

    def _train(self, state: TrainState, done: int, progress: TrainingProgress) -> TrainState:
        """The steps that are left. Metrics stay on the devices until a line is due."""
        train = self.config.train
        for step in range(done + 1, train.steps + 1):
            self.clock.start()
            state, metrics = self.train_step(state, to_devices(next(self.batches), self.mesh))
            self.window.add(step, metrics)
            self.clock.step(metrics)
            progress.step(step)
            last, log = step == train.steps, step % train.log_every == 0
            if log or last:
                self._log(step, progress)
            if train.evaluate_every and step % train.evaluate_every == 0 and not last:
                self._evaluate(state, step)
            # Several processes have to ask together, and not at every step.
            stopped = self.stop.agreed() if log or jax.process_count() == 1 else 0
            if self.checkpoints.due(step) or last or stopped:
                self._save(state)
            if stopped:
                self.checkpoints.wait()
                self._interrupt(step)
        return state

    def _log(self, step: int, progress: TrainingProgress) -> None:
        values = self._checked(self.window.close)
        self.loss = values["loss"]
        seconds = self.clock.lap()
        values["tokens_per_second"] = self._tokens_per_step() / seconds
        progress.log(step, self.loss, values["tokens_per_second"], seconds)
        if self.records:
            self.records.train(step, values)

    def _tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.task.length

    def _save(self, state: TrainState) -> None:
        pending = self._checked(self.window.fetch)
        self.clock.pause()
        meta = {
            "config": as_json(self.config),
            "pending": pending,
            "loss": self.loss,
            "seconds": self.clock.seconds,
            "timed_steps": self.clock.steps,
        }
        self.checkpoints.save(state, self.batches.get_state(), meta)

    def _checked(self, fetch: Any) -> Any:
        """The result of `fetch`; an error says what to try."""
        try:
            return fetch()
        except NonFiniteLossError as error:
            optimizer = self.config.optimizer
            saved = self.checkpoints.latest()
            raise NonFiniteLossError(
                f"{error}; training stopped. Try a lower --optimizer.learning_rate "
                f"(now {optimizer.learning_rate:g}), a longer --optimizer.warmup_steps "
                f"(now {optimizer.warmup_steps}) or --optimizer.clip_norm 1 (now "
                f"{optimizer.clip_norm:g}), with another --name. "
                + (
                    "No checkpoint was saved"
                    if saved is None
                    else f"The last checkpoint is of step {saved}"
                )
                + f" in {self.directory}"
            ) from error

    def _evaluate(self, state: TrainState, step: int) -> Evaluation:
        jax.block_until_ready(state.step)
        self.clock.pause()
        result = evaluate(
            self.evaluate_step,
            self.config.task,
            state.params,
            self.mesh,
            self.config.train.evaluation_batch_size,
            check=self._check_stop if step == self.config.train.steps else lambda: None,
        )
        if self.records:
            self.records.evaluation(step, result.metrics)
        return result

    def _check_stop(self) -> None:
        if self.stop.number and jax.process_count() == 1:
            self._interrupt(self.config.train.steps)

    def _interrupt(self, step: int) -> None:
        raise Interrupted(self.stop.number, step, self.directory)

    def _finish(self, state: TrainState) -> dict[str, Any]:
        """Evaluates, and writes the report and the figures."""
        self.checkpoints.wait()
        began = time.perf_counter()
        evaluation = self._evaluate(state, self.config.train.steps)
        clock = self.clock
        speed = clock.steps / clock.seconds if clock.seconds else None
        results = {
            "parameters": count_parameters(state.params),
            "steps": int(state.step),
            "final_loss": self.loss,
            "train_seconds": clock.seconds,
            "compile_seconds": clock.compile_seconds,
            "evaluation_seconds": time.perf_counter() - began,
            "steps_per_second": speed,
            "tokens_per_second": speed and speed * self._tokens_per_step(),
        }
        report = make_report(self.config, evaluation, results, self.config.task.baselines())
        if is_leader():
            draw_run(report, read_records(self.directory), self.directory)
            write_json(self.directory / "report.json", report)
        return report

    def _implementations(self) -> str:
        """Which code computes attention, for every layer; nothing for a model without attention."""
        shape = (self.config.train.batch_size, self.config.task.length)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
        # Layers one by one, in a function of its own: jax does not trace one twice.
        config = dataclasses.replace(self.config.model, scan_layers=False, remat=False)
        model = self.model.clone(config=config)
        init = lambda key, tokens: model.init(key, tokens)  # noqa: E731
        try:
            with implementations_used() as used, jax.set_mesh(self.mesh):
                jax.eval_shape(init, jax.random.key(0), tokens)
        except NotImplementedError as error:
            raise ValueError(
                f"model.implementation is {config.implementation!r}: {error}"
            ) from error
        if not used:
            return ""
        if len(set(used)) == 1:
            return f"attention: {used[0]} in all {self.config.model.layers} layers"
        return "attention: " + ", ".join(f"{name} in layer {i}" for i, name in enumerate(used))

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
