"""Pictures of position encodings: `python -m posjax.plot NAME...`.

Every token gets the same content, so only the encoding makes tokens differ. One
row of panels for each encoding:

| panel     | shows                                                                              |
|-----------|------------------------------------------------------------------------------------|
| heat map  | place 2: products of addends of the embeddings, for every pair of tokens     |
|           | places 3, 4: logits of the first head with the encoding, for every query and key   |
| curves    | the last row of that against the distance, for every head                          |
| counts    | CoPE only: gates summed from the last query leftwards, along a text                |
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from posjax import checks
from posjax.biases.contextual import ContextualBias
from posjax.encodings import registry
from posjax.encodings.base import PositionEncoding, Side, Sizes
from posjax.encodings.stream import stream_of
from posjax.types import Array, Float, Int

__all__ = ["Picture", "draw", "main", "picture"]

_TEXT = "The cat sat. It saw 12 birds, then 345 more.\nNone of them moved."


@dataclasses.dataclass(frozen=True)
class Picture:
    """Scores and counts of an encoding for tokens of equal content.

    Args:
        scores: [N, T, T]: logits, or products of what is added to embeddings (one "head"); NaN
            for keys after the query.
        counts: CoPE's counts of the last query on the text, [N, T]; None for other encodings.
    """

    name: str
    scores: Float[np.ndarray, "N T T"]
    counts: Float[np.ndarray, "N T"] | None


class _Probe(nn.Module):
    """The hooks of one layer, with contents as queries, keys and values."""

    encoding: PositionEncoding
    sizes: Sizes
    width: int

    @nn.compact
    def __call__(self, tokens: Int[Array, "1 T"], content: Float[Array, "1 T D"]):
        encoding, sizes, length = self.encoding, self.sizes, tokens.shape[1]
        rows = jnp.arange(length, dtype=jnp.int32)
        indices, _ = encoding.positions(tokens, rows[None])
        embedded = encoding.embed(content, indices)
        of_stream = stream_of(encoding)
        inputs = of_stream.stream_inputs(embedded)
        stream = of_stream.update_stream(embedded, inputs, indices, rows)
        memory = encoding.cache(content, sizes, of_stream.init_state(indices, sizes))
        heads = (*content.shape[:2], sizes.heads, sizes.head_size)
        plain = content.reshape(heads)
        side = Side(plain, indices, memory, plain)
        query, key = encoding.rotate(side, side)
        bias = encoding.bias(side._replace(x=query), side._replace(x=key), encoding.shared(sizes))
        scale = sizes.head_size**-0.5
        logits = scale * jnp.einsum("btnh,bsnh->bnts", query, key)
        counts = None
        if bias is not None:
            allowed = jnp.tril(jnp.ones((1, 1, length, length), bool))
            context = {
                "allowed": allowed,
                "query_positions": rows[None],
                "key_positions": rows[None],
            }
            logits += bias.dense(query, key, scale=scale, **context)
            if isinstance(bias, ContextualBias):
                counts = bias.counts(query, key, scale=scale, allowed=allowed)[0, :, -1]
        added = stream - content
        return logits[0], jnp.einsum("btd,bsd->bts", added, added), counts


@checks.arguments(length=checks.size(reasonable=2**13), heads=checks.size(reasonable=2**10))
def picture(
    name: str, length: int = 64, heads: int = 4, text: str = _TEXT, seed: int = 0
) -> Picture:
    """Scores and counts of the encoding `name`, with freshly initialised parameters.

    Args:
        name: one that `posjax.encodings.create` knows.
        length: tokens of equal content for the scores.
        text: its bytes are the tokens along which CoPE counts; contents are random, equal for equal
            bytes.
        seed: of parameters and contents.

    >>> [round(x, 3) for x in picture("alibi", length=3, heads=1).scores[0, 2].tolist()]
    [0.992, 0.996, 1.0]
    """
    encoding = registry.create(name) or PositionEncoding()
    sizes, size = Sizes(heads, heads, 16), 16
    # The second layer of two: some encodings leave the first one as it is.
    probe = _Probe(encoding.layer(1, 2), sizes, heads * size)
    same = jnp.full((1, length, heads * size), size**-0.25, jnp.float32)
    digits = jnp.full((1, length), ord("1"), jnp.int32)
    variables = probe.init(jax.random.key(seed), digits, same)
    logits, products, _ = probe.apply(variables, digits, same)
    scores = products if jnp.any(products) else logits
    seen = np.tri(length, dtype=bool)
    tokens = jnp.asarray(list(text.encode()), jnp.int32)[None]
    table = jax.random.normal(jax.random.key(seed), (256, heads * size))
    _, _, counts = probe.apply(variables, tokens, table[tokens])
    return Picture(
        name,
        np.where(seen, np.asarray(scores), np.nan),
        None if counts is None else np.asarray(counts),
    )


@checks.arguments()
def draw(pictures: list[Picture], text: str = _TEXT) -> Figure:
    """A figure with one row of panels for each picture."""
    holds = isinstance(pictures, Sequence) and all(isinstance(p, Picture) for p in pictures)
    wanted = "a list of one or more of what `picture` returns"
    checks.require("pictures", pictures, holds and len(pictures) > 0, wanted)
    columns = 2 + any(p.counts is not None for p in pictures)
    figure = Figure(figsize=(4 * columns, 3 * len(pictures)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(pictures), columns, squeeze=False)
    for row, shown in zip(panels, pictures, strict=True):
        _heat_map(figure, row[0], shown)
        _curves(row[1], shown)
        if columns > 2:
            _counts(row[2], shown, text)
    return figure


def _heat_map(figure: Figure, panel, shown: Picture) -> None:
    image = panel.imshow(shown.scores[0], cmap="viridis")
    figure.colorbar(image, ax=panel)
    panel.set(title=shown.name, xlabel="key", ylabel="query")


def _curves(panel, shown: Picture) -> None:
    for head, rows in enumerate(shown.scores):
        panel.plot(rows[-1][::-1], label=f"head {head}")
    panel.set(title="last query", xlabel="distance", ylabel="score")
    if len(shown.scores) > 1:
        panel.legend(fontsize="small")


def _counts(panel, shown: Picture, text: str) -> None:
    if shown.counts is None:
        panel.set_axis_off()
        return
    for head, count in enumerate(shown.counts):
        panel.plot(count, label=f"head {head}")
    letters = [chr(byte) if 32 < byte < 127 else " " for byte in text.encode()]
    panel.set_xticks(range(len(letters)), letters, fontsize=5)
    panel.set(title="count from the last token", xlabel="text", ylabel="position")


def main(
    names: tyro.conf.Positional[tuple[str, ...]],
    out: Annotated[
        Path | None, tyro.conf.arg(help="PNG to write; NAME_NAME.png by default.")
    ] = None,
    length: Annotated[int, tyro.conf.arg(help="Number of tokens.")] = 64,
    heads: Annotated[int, tyro.conf.arg(help="Number of heads.")] = 4,
    text: Annotated[str, tyro.conf.arg(help="Text along which CoPE counts.")] = _TEXT,
    seed: Annotated[int, tyro.conf.arg(help="Of parameters and contents.")] = 0,
) -> None:
    """Draws position encodings to a PNG: scores by query, key and head; CoPE's counts."""
    if not names or length < 2 or heads < 1 or not text:
        raise SystemExit(
            "plot needs a name, a length of at least 2, a head and a text; "
            f"got {names=} {length=} {heads=} {text=}."
        )
    try:
        pictures = [picture(name, length, heads, text, seed) for name in names]
    except ValueError as error:
        raise SystemExit(str(error)) from None
    path = out or Path(f"{re.sub(r'[^a-z0-9_.+-]', '_', '_'.join(names))}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(pictures, text).savefig(path, dpi=150)
    print(path)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m posjax.plot")
