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

__all__ = ["ArrayBias", "Bias", "BiasSum", "RelativeBias", "Tile", "as_bias"]


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RelativeBias(Bias):
    """A bias that depends on the positions of query and key alone: ALiBi, T5, KERPLE, FIRE, ...

        bias[n, i, j] = function(params, query position i, key position j)[n]

    Args:
        function: maps (params, query positions [#B, t], key positions [#B, s]) to float32 [#B, N,
            t, s]. It must be hashable by value (a module-level function, or a frozen dataclass with
            `__call__`), so that equal descriptions are compiled once.
        params: arrays of the function; they receive gradients.
        query_positions: positions to use instead of those of the attention call, [B or 1, T]; no
            gradient.
        key_positions: likewise, [B or 1, S].
        distance_only: whether the function depends on the difference of the two positions alone,
            query position - key position. The TPU kernels ask for it.

    >>> def distance(slope, i, j):
    ...     return -slope * (i[:, None, :, None] - j[:, None, None, :])
    >>> bias = RelativeBias(distance, jnp.float32(0.5))
    """

    function: Callable[..., Array] = dataclasses.field(metadata={"static": True})
    params: PyTree = None
    query_positions: Num[Array, "#B T"] | None = None
    key_positions: Num[Array, "#B S"] | None = None
    distance_only: bool = dataclasses.field(default=False, metadata={"static": True})
    axes: ClassVar = {"query_positions": (1, None), "key_positions": (None, 1)}

    def dense(self, query, key, *, scale, allowed, query_positions, key_positions):
        """The function at all pairs of positions."""
        return self._evaluate(query_positions, key_positions)

    def tile(self, rows, tile, carry):
        """The function at the block's positions."""
        return self._evaluate(tile.query_positions, tile.key_positions), None

    def check(self, query, key, is_causal):
        """The function must give [B or 1, N, T, S]; own positions must match T and S."""
        for name, length in (("query_positions", query.shape[1]), ("key_positions", key.shape[1])):
            value = getattr(self, name)
            if value is not None and (value.ndim != 2 or value.shape[1] != length):
                raise ValueError(
                    f"RelativeBias.{name} has shape {value.shape}; it must be [B or 1, {length}]."
                )
        one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        got = jax.eval_shape(self.function, self.params, one, one).shape
        if len(got) != 4 or got[1] not in (1, query.shape[2]):
            raise ValueError(
                f"RelativeBias.function gives {got} for one query and one key; it must give "
                f"[1, N, 1, 1] with N = {query.shape[2]} query heads."
            )

    def can_split_heads(self, parts):
        """The function gives all heads, of which `own_heads` takes some."""
        return True

    def own_heads(self, part, parts):
        """The same function, cut."""
        return dataclasses.replace(
            self, function=_SomeHeads(self.function, parts), params=(self.params, part)
        )

    def _evaluate(self, query_positions: Array, key_positions: Array) -> Array:
        own_query, own_key = self.query_positions, self.key_positions
        query_positions = query_positions if own_query is None else own_query
        key_positions = key_positions if own_key is None else own_key
        return self.function(self.params, query_positions, key_positions).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class _SomeHeads:
    """One of `parts` equal parts of the heads of a function for `RelativeBias`."""

    function: Callable[..., Array]
    parts: int

    def __call__(self, params: PyTree, query_positions: Array, key_positions: Array) -> Array:
        """`params` are those of the function, and the number of the part."""
        inner, part = params
        found = self.function(inner, query_positions, key_positions)
        if found.shape[1] == 1:
            return found
        size = found.shape[1] // self.parts
        return jax.lax.dynamic_slice_in_dim(found, part * size, size, axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BiasSum(Bias):
    """The sum of several descriptions.

    Only parts with a running state are left out once they have finished.
    """

    parts: tuple[Bias, ...]
    axes: ClassVar = {}

    @property
    def runs(self) -> bool:
        """Whether a part has a running state."""
        return any(part.runs for part in self.parts)

    @property
    def ends(self) -> bool:
        """Whether the walk may end where all parts with a running state have finished."""
        return any(part.ends for part in self.parts)

    @property
    def has_values(self) -> bool:
        """Whether a part adds to the weighted values."""
        return any(part.has_values for part in self.parts)

    def dense(self, query, key, **context):
        """The sum of the parts' arrays."""
        return sum(part.dense(query, key, **context) for part in self.parts)

    def rows(self, query):
        """The rows of each part."""
        return tuple(part.rows(query) for part in self.parts)

    def start(self, shape, valid):
        """The running state of each part."""
        return tuple(part.start(shape, valid) for part in self.parts)

    def tile(self, rows, tile, carry):
        """The sum of the parts' blocks."""
        carries = (None,) * len(self.parts) if carry is None else carry
        done = [p.tile(r, tile, c) for p, r, c in zip(self.parts, rows, carries, strict=True)]
        after = None if carry is None else tuple(c for _, c in done)
        return sum(block for block, _ in done), after

    def weigh(self, rows, tile, weights):
        """The sum of what the parts add."""
        pairs = zip(self.parts, rows, strict=True)
        return sum(p.weigh(r, tile, weights) for p, r in pairs if p.has_values)

    def finished(self, carry):
        """Whether every part with a running state is finished."""
        pairs = zip(self.parts, carry, strict=True)
        return jnp.all(jnp.stack([part.finished(c) for part, c in pairs if part.runs]))

    def check(self, query, key, is_causal):
        """Each part checks itself; a part that is no softmax stands alone."""
        alone = [type(part).__name__ for part in self.parts if not part.normalised]
        if alone:
            raise ValueError(
                f"{alone[0]} replaces softmax, so other biases cannot be added to it; use it alone."
            )
        for part in self.parts:
            part.check(query, key, is_causal)

    def pad(self, queries, keys):
        """Each part padded."""
        return BiasSum(tuple(part.pad(queries, keys) for part in self.parts))

    def block(self, *where):
        """Each part's block."""
        return BiasSum(tuple(part.block(*where) for part in self.parts))

    def map_axes(self, on_axes, elsewhere):
        """Each part mapped."""
        return BiasSum(tuple(part.map_axes(on_axes, elsewhere) for part in self.parts))

    def can_split_heads(self, parts):
        """Whether all parts can."""
        return all(part.can_split_heads(parts) for part in self.parts)

    def map_heads(self, function, others):
        """Each part mapped."""
        pairs = zip(self.parts, others.parts, strict=True)
        return BiasSum(tuple(part.map_heads(function, other) for part, other in pairs))

    def own_heads(self, part, parts):
        """Each part's own heads."""
        return BiasSum(tuple(one.own_heads(part, parts) for one in self.parts))

    def add_block(self, part, query_start, key_start):
        """Each part's gradients added."""
        pairs = zip(self.parts, part.parts, strict=True)
        return BiasSum(tuple(total.add_block(new, query_start, key_start) for total, new in pairs))
