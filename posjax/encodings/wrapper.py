"""A base for encodings that change what another encoding sees."""

import functools
import inspect

from posjax.encodings.base import PositionEncoding, Side
from posjax.encodings.stream import StreamEncoding, stream_of
from posjax.types import PyTree

__all__ = ["Wrapper"]


def _property(name: str) -> property:
    """A property with the value that the encoding inside has."""
    return property(lambda self: getattr(self.encoding, name), doc="As the encoding inside.")


def _hook(name: str):
    """A method that calls the same one of the encoding inside, with `inner_indices` of indices."""
    base = getattr(StreamEncoding, name)
    signature = inspect.signature(base)

    # Linen marks methods that it has wrapped in their __dict__, which must not be copied.
    @functools.wraps(base, updated=())
    def call(self, *args, **settings):
        bound = signature.bind(self, *args, **settings)
        for argument, value in bound.arguments.items():
            if isinstance(value, Side):
                value = value._replace(indices=self.inner_indices(value.indices))
            elif argument == "indices":
                value = self.inner_indices(value)
            bound.arguments[argument] = value
        inside = self.encoding if hasattr(PositionEncoding, name) else stream_of(self.encoding)
        return getattr(inside, name)(*bound.args[1:], **bound.kwargs)

    return call


class Wrapper(StreamEncoding):
    """Hands everything on to `encoding`; subclasses override what they change.

    Args:
        encoding: the encoding inside.
    """

    encoding: PositionEncoding

    is_causal_only = _property("is_causal_only")
    reads_ahead = _property("reads_ahead")
    beyond = _property("beyond")
    decodes = _property("decodes")

    def layer(self, index, layers):
        """The same around the encoding's own form for the layer."""
        return self.clone(parent=None, encoding=self.encoding.layer(index, layers))

    def inner_indices(self, indices: PyTree) -> PyTree:
        """The indices of the encoding inside, for a subclass that keeps more beside them."""
        return indices

    positions = _hook("positions")
    embed = _hook("embed")
    shared = _hook("shared")
    cache = _hook("cache")
    rotate = _hook("rotate")
    bias = _hook("bias")
    init_state = _hook("init_state")
    stream_inputs = _hook("stream_inputs")
    update_stream = _hook("update_stream")
    extra_values = _hook("extra_values")
    update_state = _hook("update_state")
