"""The tables of docs/encodings.md, made from the code: `python -m posjax.table`.

Every column is found by asking the code: places by tracing which hooks change anything, parameters
by building a model, implementations by asking them, papers from docstrings. `--write` also writes
the tables of docs/implementations.md, which `posjax.support` makes.
"""

import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro

from posjax import graphs, kernelized, support
from posjax.encodings import registry
from posjax.encodings.base import PositionEncoding, Side
from posjax.encodings.stream import stream_of
from posjax.implementations import IMPLEMENTATIONS
from posjax.models import Transformer, TransformerConfig
from posjax.problem import Problem
from posjax.types import Array, Int

__all__ = ["SUPPORT_TABLES", "Entry", "Row", "encodings", "main", "others", "page"]

# Where `--write` puts the tables, in a clone of the repository.
PAGE = Path(__file__).parent.parent / "docs" / "encodings.md"
SUPPORT_PAGE = PAGE.with_name("implementations.md")

# The model whose parameters are counted.
MODEL = TransformerConfig(layers=4, heads=4, width=256, implementation="reference")
_LENGTH = 16


@dataclasses.dataclass(frozen=True)
class Row:
    """A position encoding: one line of the first table.

    Args:
        name: as `posjax.encodings.create` and the command line know it.
        code: the Python expression that makes it.
        place: numbers of the places where it acts.
        beyond: behaviour beyond the trained length.
        paper: arXiv id.
    """

    name: str
    code: str
    place: str
    parameters: int
    beyond: str
    implementations: tuple[str, ...]
    decodes: bool
    paper: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """A function or class that is no argument of attention: one line of the second table.

    Args:
        code: its import path.
        summary: the first sentence of its docstring.
        paper: arXiv id.
    """

    code: str
    summary: str
    paper: str


class _Trace(nn.Module):
    """One pass through the hooks of a layer, to see which of them change anything."""

    encoding: PositionEncoding

    def __call__(self, tokens: Int[Array, "B T"], places: set, implementations: set):
        """Adds to `places` and `implementations` what it finds."""
        encoding, sizes, size = self.encoding, MODEL.sizes, MODEL.size_of_head
        own = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        indices, _ = encoding.positions(tokens, own)
        in_training, _ = encoding.positions(tokens, own, deterministic=False)
        x = jnp.ones((*tokens.shape, MODEL.width))
        embedded = encoding.embed(x, indices)
        stream = stream_of(encoding)
        inputs = stream.stream_inputs(embedded)
        entered = stream.update_stream(embedded, inputs, indices, own[0])
        memory = encoding.cache(entered, sizes, stream.init_state(indices, sizes))
        raw = jnp.ones((*tokens.shape, sizes.heads, size))
        side = Side(raw, indices, memory, raw)
        query, key = encoding.rotate(side, side._replace(x=raw + 0))
        bias = encoding.bias(side._replace(x=query), side._replace(x=key), encoding.shared(sizes))
        changed = {
            "1": any(x is not own for x in jax.tree.leaves((indices, in_training))),
            "2": embedded is not x or entered is not embedded,
            "3": query is not raw,
            "4": bias is not None,
        }
        places |= {place for place, found in changed.items() if found}
        # All implementations take this type, whatever devices are here.
        narrow = (x.astype(jnp.bfloat16) for x in (query, key, raw))
        problem = Problem.of(*narrow, bias, is_causal=True)
        implementations |= {
            way.name for way in IMPLEMENTATIONS if support.unsupported(way, problem) is None
        }


def _encoding_row(name: str, encoding: PositionEncoding | None, paper: str | None = None) -> Row:
    """The row of an encoding, found by asking the code."""
    own = PositionEncoding() if encoding is None else encoding
    places, implementations = set(), set()
    tokens = jnp.zeros((1, _LENGTH), jnp.int32)
    layers = {own.layer(index, MODEL.layers) for index in range(MODEL.layers)}
    for layer in layers:
        jax.eval_shape(
            lambda layer=layer: _Trace(layer).init(
                {"params": jax.random.key(0), "encoding": jax.random.key(1)},
                tokens,
                places,
                implementations,
            )
        )
    model = Transformer(MODEL, vocab_size=256, encoding=encoding)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return Row(
        name,
        code(name),
        ", ".join(sorted(places)),
        _encoding_parameters(variables),
        own.beyond,
        tuple(way.name for way in reversed(IMPLEMENTATIONS) if way.name in implementations),
        own.decodes,
        paper or ("" if encoding is None else _paper(encoding, name)),
    )


def _encoding_parameters(variables) -> int:
    """Number of parameters below "encoding"."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return sum(x.size for path, x in leaves if "encoding" in [key.key for key in path])


def _paper(thing: object, name: str = "") -> str:
    """The first arXiv id of a docstring; that of a variant comes before that of its class."""
    variant = getattr(thing, name.partition(".")[2], None) if "." in name else None
    for documented in (variant, thing):
        found = re.search(r"arXiv:(\d{4}\.\d{4,5})", inspect.getdoc(documented) or "")
        if found:
            return found[1]
    return ""


def code(name: str) -> str:
    """The Python expression that makes the encoding `name`, after `import posjax`.

    >>> code("rope.yarn"), code("abacus+fire")
    ('posjax.RoPE.yarn()', 'posjax.Combine((posjax.Abacus(), posjax.FIRE()))')
    """
    parts = name.split("+")
    if len(parts) > 1:
        return f"posjax.Combine(({', '.join(code(part) for part in parts)}))"
    encoding, (_, point, variant) = registry.create(name), name.partition(".")
    return "None" if encoding is None else f"posjax.{type(encoding).__name__}{point}{variant}()"


def encodings() -> list[Row]:
    """All encodings, then the combinations that papers use."""
    table = [_encoding_row(name, registry.create(name)) for name in registry.names()]
    return table + [
        _encoding_row(n, registry.create(n), paper) for n, paper in registry.COMPOSITIONS.items()
    ]


def others() -> list[Entry]:
    """Linear-time attention and encodings of graphs."""
    function = kernelized.kernelized_attention
    things = {f"posjax.kernelized.{function.__name__}": function}
    things |= {f"posjax.graphs.{name}": cls for name, cls in graphs.classes().items()}
    return [Entry(path, _summary(thing), _paper(thing)) for path, thing in things.items()]


def _summary(thing: object) -> str:
    first, *_ = (inspect.getdoc(thing) or "").split("\n\n")
    return " ".join(first.split())


def _encodings_in_markdown() -> str:
    model = f"{MODEL.layers} layers, {MODEL.heads} heads of {MODEL.size_of_head}"
    head = (
        "name", "in Python", "place", f"parameters ({model})", "beyond training",
        "implementations", "decodes", "paper",
    )  # fmt: skip
    rows = [
        (
            f"`{row.name}`",
            f"`{row.code}`",
            row.place,
            f"{row.parameters:,}",
            row.beyond,
            ", ".join(row.implementations),
            "yes" if row.decodes else "no",
            _link(row.paper),
        )
        for row in encodings()
    ]
    return _markdown(head, rows)


def _others_in_markdown() -> str:
    rows = [(f"`{entry.code}`", entry.summary, _link(entry.paper)) for entry in others()]
    return _markdown(("in Python", "summary", "paper"), rows)


def _link(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper else ""


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    first, *lines = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([first, "|---" * len(head) + "|", *lines])


# Each table is between <!-- NAME --> and <!-- /NAME --> on the page.
_TABLES: dict[str, Callable[[], str]] = {
    "encodings": _encodings_in_markdown,
    "others": _others_in_markdown,
}
SUPPORT_TABLES: dict[str, Callable[[], str]] = {
    "arguments": support.calls_in_markdown,
    "transformations": support.transformations_in_markdown,
}


def page(text: str, tables: dict[str, Callable[[], str]] = _TABLES) -> str:
    """The page `text` with new tables between its marks.

    Args:
        tables: name of the marks -> what makes the table.

    Raises:
        ValueError: a page without the marks of a table.
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"the page has no marks {begin.strip()} and {end.strip()}.")
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}{table()}{end}{rest.split(end, 1)[1]}"
    return text


def main(
    format: Annotated[
        Literal["markdown", "json"], tyro.conf.arg(help="Of what is printed.")
    ] = "markdown",
    write: Annotated[
        tyro.conf.FlagCreatePairsOff[bool],
        tyro.conf.arg(help="Write the tables to the pages in docs; print nothing else."),
    ] = False,
) -> None:
    """Prints the tables of all position encodings, or writes them to docs/encodings.md.

    What each implementation of attention takes is written to docs/implementations.md, too.
    """
    if write:
        if not PAGE.exists():
            raise SystemExit(f"there is no {PAGE}; --write is for a clone of the repository.")
        for path, tables in ((PAGE, _TABLES), (SUPPORT_PAGE, SUPPORT_TABLES)):
            path.write_text(page(path.read_text(), tables))
            print(path)
    elif format == "json":
        tables = {"encodings": encodings(), "others": others()}
        print(json.dumps(tables, default=dataclasses.asdict, indent=1))
    else:
        print("\n\n".join(table() for table in _TABLES.values()))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m posjax.table")
