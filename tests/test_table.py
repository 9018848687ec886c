"""The tables of all encodings, and docs/encodings.md, which has a copy of them."""

import json

import pytest

import posjax
from posjax import graphs, table
from posjax.encodings import registry


@pytest.fixture(scope="module")
def rows():
    return {row.name: row for row in table.encodings()}


@pytest.fixture
def quick(monkeypatch, rows):
    """The rows as they are: finding them takes a minute."""
    monkeypatch.setattr(table, "encodings", lambda: list(rows.values()))


@pytest.mark.usefixtures("quick")
def test_the_page_has_the_tables():
    """If this fails: `python -m posjax.table --write`."""
    for path, tables in (
        (table.PAGE, {}),
        (table.SUPPORT_PAGE, {"tables": table.SUPPORT_TABLES}),
    ):
        text = path.read_text()
        assert table.page(text, **tables) == text


@pytest.mark.usefixtures("quick")
def test_writes_the_page(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    marks = [f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in ("encodings", "others")]
    page.write_text(f"before\n{'between'.join(marks)}after\n")
    monkeypatch.setattr(table, "PAGE", page)
    support_page = tmp_path / "implementations.md"
    support_page.write_text("<!-- arguments -->\nold\n<!-- /arguments -->\n")
    monkeypatch.setattr(table, "SUPPORT_PAGE", support_page)
    monkeypatch.setattr(table, "SUPPORT_TABLES", {"arguments": lambda: "new"})
    table.main(write=True)
    assert support_page.read_text() == "<!-- arguments -->\nnew\n<!-- /arguments -->\n"
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before\n<!-- encodings -->\n| name | in Python |")
    assert "<!-- /encodings -->\nbetween<!-- others -->\n| in Python |" in text
    assert text.endswith("|\n<!-- /others -->\nafter\n")
    assert capsys.readouterr().out == f"{page}\n{support_page}\n"


def test_a_page_without_marks_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no marks <!-- encodings -->"):
        table.page("text")
    monkeypatch.setattr(table, "PAGE", tmp_path / "page.md")
    with pytest.raises(SystemExit, match="clone of the repository"):
        table.main(write=True)


def test_has_every_encoding_and_other_method(rows):
    assert set(registry.names()) | set(registry.COMPOSITIONS) == set(rows)
    paths = {f"posjax.graphs.{name}" for name in graphs.classes()}
    others = table.others()
    assert {entry.code for entry in others} == paths | {"posjax.kernelized.kernelized_attention"}
    assert all(entry.summary.endswith(".") and entry.paper for entry in others)
    assert len(rows) + len(others) >= 45


def test_the_code_makes_the_encoding(rows):
    for name, row in rows.items():
        made = eval(row.code, {"posjax": posjax})
        assert made == registry.create(name)
        assert type(made) is type(registry.create(name))


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
    assert rows["cope"].implementations == ("reference", "xla", "gpu", "tpu")
    assert rows["fire"].implementations == ("reference", "xla")


@pytest.mark.usefixtures("quick")
def test_prints_markdown_and_json(capsys, rows):
    table.main()
    assert capsys.readouterr().out.count("| in Python |") == 2
    table.main("json")
    printed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in printed["encodings"]] == list(rows)
    assert {"code", "summary", "paper"} == set(printed["others"][0])
