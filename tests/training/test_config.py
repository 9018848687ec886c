import dataclasses
import json

import pytest

from posjax.encodings import CoPE, registry
from posjax.training import Config, MeshConfig, OptimizerConfig, TrainConfig
from posjax.training.config import as_json, differences
from tests.training.tiny import TASK, tiny

GOOD = {"steps": 10, "batch_size": 4}


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (OptimizerConfig, {"learning_rate": 0.0}, ("optimizer.learning_rate", "above 0", "0.0")),
        (OptimizerConfig, {"learning_rate": float("nan")}, ("learning_rate", "nan")),
        (OptimizerConfig, {"learning_rate": float("inf")}, ("learning_rate", "inf")),
        (OptimizerConfig, {"schedule": "cosin"}, ("optimizer.schedule", "cosine", "'cosin'")),
        (OptimizerConfig, {"warmup_steps": -1}, ("optimizer.warmup_steps", "at least 0", "-1")),
        (OptimizerConfig, {"final_fraction": 1.5}, ("final_fraction", "from 0 to 1", "1.5")),
        (OptimizerConfig, {"weight_decay": -0.1}, ("weight_decay", "-0.1")),
        (OptimizerConfig, {"b1": 1.0}, ("b1", "below 1", "1.0")),
        (OptimizerConfig, {"b2": -0.5}, ("b2", "-0.5")),
        (OptimizerConfig, {"eps": 0.0}, ("eps", "above 0")),
        (OptimizerConfig, {"clip_norm": -1.0}, ("clip_norm", "-1.0")),
        (OptimizerConfig, {"encoding_learning_rate_multiplier": -1.0}, ("multiplier", "-1.0")),
        (TrainConfig, {**GOOD, "steps": 0}, ("train.steps", "at least 1", "0")),
        (TrainConfig, {**GOOD, "batch_size": -3}, ("train.batch_size", "-3")),
        (TrainConfig, {**GOOD, "log_every": 0}, ("train.log_every", "at least 1")),
        (TrainConfig, {**GOOD, "checkpoint_every": 0}, ("train.checkpoint_every", "at least 1")),
        (TrainConfig, {**GOOD, "accumulate": 3}, ("train.accumulate=3", "train.batch_size=4")),
        (TrainConfig, {**GOOD, "steps": 2.5}, ("train.steps", "2.5")),
        (MeshConfig, {"data": 0}, ("mesh.data", "-1 or at least 1", "0")),
    ],
)
def test_bad_fields(kind, fields, words):
    with pytest.raises(ValueError) as error:
        kind(**fields)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("axis", ["fsdp", "tensor", "context"])
def test_reserved_axes_are_refused(axis):
    with pytest.raises(NotImplementedError, match=f"mesh.{axis}=2 is not possible yet"):
        MeshConfig(**{axis: 2})


@pytest.mark.parametrize("name", ["", "a/b", "..", " a"])
def test_a_name_is_a_folder_name(name):
    with pytest.raises(ValueError, match="name must be the name of a folder"):
        tiny(name=name)


def test_seed_below_0():
    with pytest.raises(ValueError, match="seed must be from 0"):
        tiny(seed=-1)


def test_every_field_is_documented():
    from posjax.training.arguments import field_help

    for kind in (Config, OptimizerConfig, TrainConfig, MeshConfig):
        names = {item.name for item in dataclasses.fields(kind)}
        assert names == {name for name, text in field_help(kind).items() if text.endswith(".")}


def test_as_json_has_everything_and_is_json():
    values = as_json(tiny(encoding=CoPE(num_positions=7)))
    assert json.loads(json.dumps(values)) == values
    assert values["task"] == {"name": "SelectiveCopy", **dataclasses.asdict(TASK)}
    assert values["encoding"]["name"] == "CoPE"
    assert values["encoding"]["num_positions"] == 7
    assert "parent" not in values["encoding"]
    assert values["train"]["steps"] == 6
    assert as_json(tiny(encoding=None))["encoding"] is None


def test_as_json_of_a_combination():
    values = as_json(registry.create("abacus+rope"))
    assert values["name"] == "Combine"
    (parts,) = (value for key, value in values.items() if key != "name")
    assert [part["name"] for part in parts] == ["Abacus", "RoPE"]


def test_differences_name_field_and_both_values():
    old = as_json(tiny())
    new = as_json(tiny(train__steps=7, encoding=CoPE(num_positions=5)))
    assert differences(new, old) == [
        "encoding.num_positions: now 5, before 4",
        "train.steps: now 7, before 6",
    ]
    assert differences(as_json(tiny(encoding=None)), old)
    assert differences(old, old) == []


def test_fields_that_may_change_on_resume():
    free = tiny(
        name="other", runs="elsewhere", train__log_every=5, train__checkpoint_every=9,
        train__keep_checkpoints=1, train__evaluate_every=3, mesh__data=8,
    )  # fmt: skip
    assert differences(as_json(free), as_json(tiny())) == []
