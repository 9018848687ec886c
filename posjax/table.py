"""The table of all position encodings, made from the code: `python -m posjax.table`.

Every column is found by asking the code: places by tracing which hooks change anything, parameters
by building a model, implementations by trying them, papers from docstrings.
"""

import dataclasses
import inspect
import json
import re
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro

from posjax import graphs, kernelized
from posjax.attention import dot_product_attention
from posjax.encodings import registry
from posjax.encodings.base import PositionEncoding, Side
from posjax.encodings.stream import stream_of
from posjax.models import Transformer, TransformerConfig
from posjax.types import Array, Int

__all__ = ["Row", "main", "markdown", "rows"]

# The model whose parameters are counted.
MODEL = TransformerConfig(layers=4, heads=4, width=256, implementation="reference")
_IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")
_LENGTH = 16


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    place: str
    parameters: int | None
    beyond: str
    implementations: tuple[str, ...]
    decodes: bool | None
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
        for name in _IMPLEMENTATIONS:
            # Kernels for GPUs take narrow numbers only.
            narrow = [x.astype(jnp.bfloat16) if name == "gpu" else x for x in (query, key, raw)]
            try:
                dot_product_attention(*narrow, bias, is_causal=True, implementation=name)
                implementations.add(name)
            except NotImplementedError:
                pass


def _encoding_row(name: str, encoding: PositionEncoding | None, paper: str | None = None) -> Row:
    """What the code says about an encoding."""
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
        ", ".join(sorted(places)),
        _encoding_parameters(variables),
        own.beyond,
        tuple(i for i in _IMPLEMENTATIONS if i in implementations),
        own.decodes,
        paper or ("" if encoding is None else _paper(encoding, name)),
    )


def _encoding_parameters(variables) -> int:
    """How many parameters stand under "encoding"."""
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


def rows() -> list[Row]:
    """All encodings, compositions, linear-time attention and graph encodings."""
    table = [_encoding_row(name, registry.create(name)) for name in registry.names()]
    table += [
        _encoding_row(n, registry.create(n), paper) for n, paper in registry.COMPOSITIONS.items()
    ]
    function = kernelized.kernelized_attention
    label = f"posjax.kernelized.{function.__name__}"
    table.append(Row(label, "attention", None, "clips", (), None, _paper(function)))
    for name, cls in graphs.classes().items():
        table.append(Row(f"posjax.graphs.{name}", "graph", None, "any size", (), None, _paper(cls)))
    return table


def markdown(table: list[Row]) -> str:
    """The table in Markdown."""
    model = f"{MODEL.layers} layers, {MODEL.heads} heads of {MODEL.size_of_head}"
    head = (
        f"| name | place | parameters ({model}) | beyond training | fused paths | decodes | paper |"
    )
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row in table:
        cells = (
            f"`{row.name}`",
            row.place,
            "" if row.parameters is None else f"{row.parameters:,}",
            row.beyond,
            ", ".join(row.implementations),
            {True: "yes", False: "no", None: ""}[row.decodes],
            f"[{row.paper}](https://arxiv.org/abs/{row.paper})" if row.paper else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    format: Annotated[
        Literal["markdown", "json"], tyro.conf.arg(help="How the table is written.")
    ] = "markdown",
) -> None:
    """Prints the table of all position encodings."""
    table = rows()
    if format == "json":
        print(json.dumps([dataclasses.asdict(row) for row in table], indent=1))
    else:
        print(markdown(table))


if __name__ == "__main__":
    tyro.cli(main, prog="python -m posjax.table")
