"""What a position encoding adds to the logits, described instead of built.

A description is a small pytree. `dense` is its specification: the [B, N, T, S] array it stands for,
for tests and plots. The other methods let an attention kernel compute any block of that array
without ever building it:

    rows  = bias.rows(query_block)                 once per block of queries
    carry = bias.start(...)                        for the key block nearest to the query
    for each block of keys, from the last one visible down to the first:
        block, carry = bias.tile(rows, tile, carry)
        if bias.finished(carry): go on with carry = None

A running state (`carry`) makes Contextual Position Encoding possible: its count of gates grows from
the query leftwards. Gradients need no code here: kernels differentiate `rows` and `tile`, and the
carry's cotangent runs back from left to right. A new description is a new subclass of `Bias`; no
kernel changes.

Inside kernels heads come before lengths: query [B, N, t, H], logits [B, N, t, s].
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from posjax.types import Array, Bool, Float, Int, Num, PyTree

__all__ = ["ArrayBias", "Bias", "Tile", "as_bias"]


class Tile(NamedTuple):
    """What a block of the bias may depend on."""

    query: Num[Array, "B N t H"]
    dots: Float[Array, "B N t s"]  # query . key in float32, unscaled
    allowed: Bool[Array, "#B #N t s"]
    query_positions: Num[Array, "#B t"]
    key_positions: Num[Array, "#B s"]
    scale: float  # of the attention logits


class Bias(abc.ABC):
    """A description of what is added to the scaled logits."""

    # Fields that have a query axis or a key axis: name -> (query axis or None, key axis or None).
    axes: ClassVar[dict[str, tuple[int | None, int | None]]] = {}
    # Whether `tile` hands a running state from one block of keys to the next one on its left.
    runs: ClassVar[bool] = False
    # Whether `weigh` adds to the weighted values.
    has_values: ClassVar[bool] = False
    # Whether weights are a softmax of the logits, or exp(logits) as they stand (stick-breaking).
    normalised: ClassVar[bool] = True
    # Whether keys on the left of where the bias has `finished` have weight 0, so the walk ends.
    ends: ClassVar[bool] = False

    @abc.abstractmethod
    def dense(
        self,
        query: Num[Array, "B T N H"],
        key: Num[Array, "B S K H"],
        *,
        scale: float,
        allowed: Bool[Array, "#B #N T S"],
        query_positions: Num[Array, "#B T"],
        key_positions: Num[Array, "#B S"],
    ) -> Float[Array, "#B #N T S"]:
        """The whole bias as one float32 array: the specification."""

    @abc.abstractmethod
    def tile(
        self, rows: PyTree, tile: Tile, carry: PyTree
    ) -> tuple[Float[Array, "#B #N t s"], PyTree]:
        """One block of the bias, and the running state for the block on its left.

        `carry` is None where the bias has `finished`, and always where it has no running state.
        """

    def rows(self, query: Num[Array, "B N t H"]) -> PyTree:
        """Quantities of each query that all its blocks share."""
        return None

    def weigh(
        self, rows: PyTree, tile: Tile, weights: Float[Array, "B N t s"]
    ) -> Float[Array, "B N t E"]:
        """What is added to sum_j weights_ij value_j; linear in `weights`."""
        raise NotImplementedError(f"{type(self).__name__} adds nothing to values.")

    def start(self, shape: tuple[int, int, int], valid: Bool[Array, "#B t"] | None) -> PyTree:
        """The running state of `shape` [B, N, t] before the first block.

        Rows that are not `valid` never delay `finished`.
        """
        return None

    def finished(self, carry: PyTree) -> Bool[Array, ""]:
        """Whether no block further left needs the running state."""
        return jnp.asarray(False)

    def check(self, query: Array, key: Array, is_causal: bool) -> None:  # noqa: B027
        """Checks that the description fits query [B, T, N, H] and key [B, S, K, H].

        Raises:
            ValueError: it does not; named with the values.
        """

    def pad(self, queries: int, keys: int) -> Self:
        """Zeros appended along the query and the key axis of every field that has one."""

        def pad_field(value: Array, query_axis: int | None, key_axis: int | None) -> Array:
            width = [(0, 0)] * value.ndim
            for axis, amount in ((query_axis, queries), (key_axis, keys)):
                if axis is not None:
                    width[axis] = (0, amount)
            return jnp.pad(value, width)

        return self._with_fields(pad_field)

    def block(self, query_start: Any, query_size: int, key_start: Any, key_size: int) -> Self:
        """The description of one block of queries and keys."""

        def slice_field(value: Array, query_axis: int | None, key_axis: int | None) -> Array:
            parts = ((query_axis, query_start, query_size), (key_axis, key_start, key_size))
            for axis, start, size in parts:
                if axis is not None:
                    value = jax.lax.dynamic_slice_in_dim(value, start, size, axis)
            return value

        return self._with_fields(slice_field)

    def add_block(self, part: Self, query_start: Any, key_start: Any) -> Self:
        """This description (of gradients) with a block's gradients added at their place."""
        total = jax.tree.map(jnp.add, *(_without(x, self.axes) for x in (self, part)))

        def add_field(value: Array, name: str) -> Array:
            addend = getattr(part, name)
            query_axis, key_axis = self.axes[name]
            starts = [0] * value.ndim
            for axis, start in ((query_axis, query_start), (key_axis, key_start)):
                if axis is not None:
                    starts[axis] = start
            old = jax.lax.dynamic_slice(value, starts, addend.shape)
            return jax.lax.dynamic_update_slice(value, old + addend, starts)

        fields = {name: getattr(self, name) for name in self.axes}
        added = {
            name: add_field(value, name) for name, value in fields.items() if value is not None
        }
        return dataclasses.replace(total, **added)

    def map_axes(self, on_axes: Callable[[Array], Any], elsewhere: Callable[[Array], Any]) -> Self:
        """The description with functions applied to its arrays.

        `on_axes` is for the fields in `axes` (they have a batch axis), `elsewhere` for the others.
        """
        mapped = jax.tree.map(elsewhere, _without(self, self.axes))
        values = {name: getattr(self, name) for name in self.axes}
        return dataclasses.replace(
            mapped, **{n: on_axes(v) for n, v in values.items() if v is not None}
        )

    def can_split_heads(self, parts: int) -> bool:
        """Whether `parts` devices can each have the description of their own heads."""
        return parts == 1

    def map_heads(self, function: Callable[[Array, int], Any], others: Self) -> Self:
        """`others`, with `function(array, axis of the heads)` for the fields that have one."""
        return others

    def own_heads(self, part: Int[Array, ""], parts: int) -> Self:
        """What `map_heads` could not split: the description of one of `parts` parts of the heads.

        Called on the device that has the part, for what `can_split_heads`.
        """
        return self

    def _with_fields(self, function: Callable[..., Array]) -> Self:
        """A copy with `function(value, query axis, key axis)` applied to each field in `axes`."""
        values = {name: getattr(self, name) for name in self.axes}
        changed = {n: function(v, *self.axes[n]) for n, v in values.items() if v is not None}
        return dataclasses.replace(self, **changed)


def _without(bias: Bias, names: Any) -> Bias:
    return dataclasses.replace(bias, **dict.fromkeys(names))


def as_bias(bias: "Bias | Array | None") -> Bias | None:
    """A description from what a caller may pass: a description, an array, or None."""
    return bias if bias is None or isinstance(bias, Bias) else ArrayBias(jnp.asarray(bias))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ArrayBias(Bias):
    """A bias that stands in memory as an array."""

    array: Float[Array, "#B #N T S"] | None
    axes: ClassVar = {"array": (2, 3)}

    def dense(self, query, key, *, scale, allowed, query_positions, key_positions):
        """The array itself, in float32."""
        return self.array.astype(jnp.float32)

    def tile(self, rows, tile, carry):
        """The block of the array."""
        return self.array.astype(jnp.float32), None

    def check(self, query, key, is_causal):
        """The array must broadcast to [B, N, T, S], with full T and S."""
        batch, queries, heads, _ = query.shape
        want = (batch, heads, queries, key.shape[1])
        got = self.array.shape
        fits = (
            len(got) == 4
            and got[2:] == want[2:]
            and all(g in (1, w) for g, w in zip(got, want, strict=True))
        )
        if not fits:
            raise ValueError(f"bias has shape {got}; it must be [B or 1, N or 1, T, S] = {want}.")
        if not jnp.issubdtype(self.array.dtype, jnp.floating):
            raise ValueError(
                f"bias has dtype {self.array.dtype}; it must be a floating-point array."
            )
