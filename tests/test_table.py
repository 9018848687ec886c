"""The table of all encodings, and its copy in the README."""

import json
from pathlib import Path

import pytest

from posjax import table
from posjax.encodings import registry

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in table.rows()}


def test_the_readme_has_the_table(rows):
    """`python -m posjax.table` prints what belongs between the two marks."""
    text = README.read_text()
    copy = text.split("<!-- table -->")[1].split("<!-- end of table -->")[0]
    assert copy.strip() == table.markdown(list(rows.values()))


def test_has_every_encoding_and_what_is_no_encoding(rows):
    assert set(registry.names()) | set(registry.COMPOSITIONS) <= set(rows)
    others = {name.rpartition(".")[0] for name in rows if name.startswith("posjax.")}
    assert others == {"posjax.graphs", "posjax.kernelized"}
    assert len(rows) >= 45


@pytest.mark.parametrize(
    ("name", "place", "parameters", "beyond"),
    [
        ("nope", "", 0, "extrapolates"),
        ("sinusoidal", "2", 0, "extrapolates"),
        ("learned", "2", 1024 * 256, "raises"),
        ("abacus", "1, 2", 1024 * 256, "raises"),
        ("rope", "3", 0, "extrapolates"),
        ("cope", "4", 4 * 64 * 64, "clips"),
        ("t5", "4", 32 * 4, "clips"),
        ("t5.per_layer", "4", 4 * 32 * 4, "clips"),
        ("pose", "1, 3", 0, "extrapolates"),
        ("abacus+rope", "1, 2, 3", 1024 * 256, "raises"),
    ],
)
def test_rows_known_by_hand(rows, name, place, parameters, beyond):
    row = rows[name]
    assert (row.place, row.parameters, row.beyond) == (place, parameters, beyond)


def test_papers(rows):
    assert rows["rope"].paper == "2104.09864"
    assert rows["rope.yarn"].paper == "2309.00071"
    assert rows["cope.paper"].paper == "2405.18719"
    assert [name for name, row in rows.items() if not row.paper] == ["nope"]


def test_an_implementation_that_refuses_is_not_listed(rows):
    assert rows["cope"].implementations == ("reference", "xla", "tpu", "gpu")
    assert rows["fire"].implementations == ("reference", "xla")


def test_prints_json_too(capsys, monkeypatch, rows):
    monkeypatch.setattr(table, "rows", lambda: list(rows.values()))
    table.main("json")
    printed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in printed] == list(rows)
