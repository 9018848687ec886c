"""Encodings that change the residual stream of layers, or carry a state through them."""

from posjax import checks
from posjax.encodings.base import PositionEncoding, Sizes
from posjax.encodings.hooks import guard_base
from posjax.types import Array, Float, Int, PyTree

__all__ = ["StreamEncoding", "stream_of"]


class StreamEncoding(PositionEncoding):
    """An encoding that acts on the residual stream, or on a state that flows beside it.

    All hooks are neutral here; `posjax.encodings.base` has the order in which a model calls them.
    """

    def init_state(self, indices: PyTree, sizes: Sizes) -> PyTree:
        """The state before the first layer: arrays [B, T, ...] or None."""
        return None

    def stream_inputs(self, stream: Float[Array, "B T D"]) -> PyTree:
        """The per-token arrays that `update_stream` reads, [B, T, ...], or None."""
        return None

    def update_stream(
        self,
        stream: Float[Array, "B T D"],
        inputs: PyTree,
        indices: PyTree,
        rows: Int[Array, "T"],
    ) -> Float[Array, "B T D"]:
        """The residual stream as it enters a layer.

        Args:
            inputs: the results of `stream_inputs` for all tokens known so far, [B, S, ...].
            indices: those of the tokens in `stream`.
            rows: places of the tokens of `stream` in `inputs`.
        """
        return stream

    def extra_values(self, memory: PyTree) -> Float[Array, "B S K E"] | None:
        """More values, which the same attention weights average, for `update_state`.

        Args:
            memory: the results of `cache` for all keys.
        """
        return None

    def update_state(
        self, state: PyTree, change: Float[Array, "B T D"], mixed: Float[Array, "B T N E"] | None
    ) -> PyTree:
        """The state for the next layer.

        Args:
            change: the addend of the layer's MLP to the residual stream.
            mixed: averages of `extra_values`; None if there are none.
        """
        return state


guard_base(
    StreamEncoding,
    ("init_state", "stream_inputs", "update_stream", "extra_values", "update_state"),
)


@checks.arguments()
def stream_of(encoding: PositionEncoding) -> StreamEncoding:
    """The encoding itself if it has stream hooks, else one with neutral hooks."""
    return encoding if isinstance(encoding, StreamEncoding) else StreamEncoding(parent=None)
