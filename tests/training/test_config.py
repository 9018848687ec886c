import dataclasses
import json

import pytest

from posjax.encodings import CoPE, registry
from posjax.training import Config, MeshConfig, OptimizerConfig, TrainConfig
from posjax.training.config import as_json, differences
from tests.training.tiny import TASK, tiny

GOOD = {"steps": 10, "batch_size": 4}


@pytest.mark.parametrize("axis", ["fsdp", "tensor", "context"])
def test_reserved_axes_are_refused(axis):
    with pytest.raises(NotImplementedError, match=f"mesh.{axis}=2 is not possible yet"):
        MeshConfig(**{axis: 2})


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
