"""A run says which implementation computes attention."""

import dataclasses

import pytest
from rich.console import Console

from posjax.training import fit
from tests.training.tiny import tiny


def with_model(**fields):
    return dataclasses.replace(tiny(), model=dataclasses.replace(tiny().model, **fields))


@pytest.mark.parametrize(
    "fields, name", [({}, "xla"), ({"implementation": "reference"}, "reference")]
)
@pytest.mark.parametrize("layers", [1, 2])
def test_the_first_line_names_it(fields, name, layers, tmp_path):
    config = with_model(layers=layers, scan_layers=layers == 2, remat=True, **fields)
    with (tmp_path / "out.txt").open("w") as file:
        fit(config, tmp_path / "run", console=Console(file=file, width=100))
    first = (tmp_path / "out.txt").read_text().splitlines()[0]
    assert first == f"attention: {name} in all {layers} layers"


def test_an_implementation_for_other_devices_is_refused_before_there_is_a_folder(tmp_path):
    words = r"model.implementation is .tpu.: .* need TPUs, and the devices are cpus; use .*xla"
    with pytest.raises(ValueError, match=words):
        fit(with_model(implementation="tpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
