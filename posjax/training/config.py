"""A run as data: task, model, encoding, optimizer and training as one frozen dataclass.

The objects are the configuration: `task` is the task that is trained, `encoding` the module that is
used.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from posjax import checks
from posjax.encodings.base import PositionEncoding
from posjax.models.config import TransformerConfig
from posjax.tasks.base import Task

__all__ = ["Config", "MeshConfig", "OptimizerConfig", "TrainConfig", "as_json", "differences"]

# Fields that change neither the parameters nor the data: they may differ when a run is resumed.
FREE_ON_RESUME = (
    "name",
    "runs",
    "mesh",
    "train.log_every",
    "train.evaluate_every",
    "train.evaluation_batch_size",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a warm-up, a schedule and clipping; only leaves named "kernel" decay.

    Raises:
        ValueError: a field is out of its range.
    """

    learning_rate: float = 1e-3
    """Highest learning rate, reached at the end of the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises linearly; 0 for none."""
    final_fraction: float = 0.02
    """Learning rate at the end, as a fraction of the highest (cosine and linear)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms, biases, embeddings and encodings never decay."""
    b1: float = 0.9
    """Adam's decay of the first moment."""
    b2: float = 0.98
    """Adam's decay of the second moment."""
    eps: float = 1e-8
    """Adam's term against division by zero."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 switches clipping off."""
    encoding_learning_rate_multiplier: float = 1.0
    """Factor on the learning rate of the position encoding's own parameters."""

    def __post_init__(self) -> None:
        """Checks the ranges."""
        zero, decay = checks.at_least(0), checks.Limits(low=0, below=1)
        checks.fields(
            self,
            "optimizer.",
            learning_rate=checks.above(0),
            warmup_steps=zero,
            final_fraction=checks.between(0, 1),
            weight_decay=zero,
            b1=decay,
            b2=decay,
            eps=checks.above(0),
            clip_norm=zero,
            encoding_learning_rate_multiplier=zero,
        )


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, on how much, and when to log, evaluate and save.

    Raises:
        ValueError: a field is out of its range, or `accumulate` does not divide `batch_size`.
    """

    steps: int
    """Optimizer steps."""
    batch_size: int
    """Sequences a step, over all devices together."""
    accumulate: int = 1
    """Parts a batch is computed in, one after the other, to save memory; the result is the same."""
    log_every: int = 50
    """Steps between lines in metrics.jsonl; a line has the mean over these steps."""
    evaluate_every: int = 0
    """Steps between evaluations during training; 0: only at the end."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is one at the end too."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    evaluation_batch_size: int = 64
    """Sequences in a batch of evaluation, over all devices together."""

    def __post_init__(self) -> None:
        """Checks the ranges."""
        limits = {item.name: checks.at_least(1) for item in dataclasses.fields(self)}
        checks.fields(self, "train.", **limits | {"evaluate_every": checks.at_least(0)})
        divides = self.batch_size % self.accumulate == 0
        wanted = f"a divisor of train.batch_size = {self.batch_size}"
        checks.require("train.accumulate", self.accumulate, divides, wanted)


@dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out. Today a run spreads over `data`; the other axes are reserved.

    Raises:
        ValueError: an axis is neither -1 nor above 0.
        NotImplementedError: a reserved axis is not 1.
    """

    data: int = -1
    """Devices the batch is spread over; -1: all there are."""
    fsdp: int = 1
    """Reserved for sharded parameters; 1 today."""
    tensor: int = 1
    """Reserved for tensor parallelism; 1 today."""
    context: int = 1
    """Reserved for parallelism along the sequence; 1 today."""

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            checks.integer(f"mesh.{item.name}", value, low=-1)
            checks.require(f"mesh.{item.name}", value, value != 0, "-1 or at least 1")
            if item.name != "data" and value != 1:
                raise NotImplementedError(
                    f"mesh.{item.name}={value} is not possible yet; use mesh.{item.name}=1 and "
                    "mesh.data"
                )


@dataclass(frozen=True)
class Config:
    """Everything that decides a run.

    Raises:
        ValueError: a name that is no folder name, or a seed below 0.
    """

    name: str
    """Name of the run, and of its folder."""
    task: Task
    """What is trained and how it is scored."""
    model: TransformerConfig
    """Sizes and parts of the transformer."""
    encoding: PositionEncoding | None
    """The position encoding; None for none at all."""
    train: TrainConfig
    """How long to train, on how much."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How parameters are changed."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices are laid out."""
    seed: int = 0
    """Seed of the initial parameters, the training data and dropout."""
    runs: str = "runs"
    """Folder that holds the folders of runs."""

    def __post_init__(self) -> None:
        """Checks the name and the seed."""
        checks.fields(self, "", seed=checks.between(0, 2**32 - 1))
        is_one = self.name == self.name.strip() and not set(self.name) & set("/\\\0")
        is_folder = is_one and self.name not in ("", ".", "..")
        checks.require("name", self.name, is_folder, "the name of a folder, without slashes")


def as_json(value: Any) -> Any:
    """A config, or a part of one, as JSON values; tasks and encodings have the name of their class.

    >>> as_json(MeshConfig(data=8))
    {'data': 8, 'fsdp': 1, 'tensor': 1, 'context': 1}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [as_json(item) for item in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return getattr(value, "__name__", str(value))
    module = hasattr(value, "parent")  # A Flax module has two fields of Flax's own.
    fields = {
        item.name: as_json(getattr(value, item.name))
        for item in dataclasses.fields(value)
        if item.init and not (module and item.name in ("parent", "name"))
    }
    if isinstance(value, Config):
        fields["task"] = {"name": type(value.task).__name__, **fields["task"]}
    return {"name": type(value).__name__, **fields} if module else fields


def differences(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Lines "field: now x, before y" for fields of JSON configs that may not differ on resume."""
    new, old = _flatten(now), _flatten(before)
    lines = []
    for key in sorted(new.keys() | old.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in FREE_ON_RESUME)
        if not free and new.get(key, "absent") != old.get(key, "absent"):
            lines.append(
                f"{key}: now {new.get(key, 'absent')!r}, before {old.get(key, 'absent')!r}"
            )
    return lines


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}.{key}" if prefix else key))
    return flat
