"""Biases: additions to the logits, described instead of built.

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
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from posjax import checks
from posjax.axes import HEADS, Lettered, added_at, block_of, padded
from posjax.forms import array_of
from posjax.precision import wide
from posjax.types import Array, Bool, Float, Int, Num, PyTree

__all__ = ["ArrayBias", "Bias", "Tile", "as_bias", "check_fields", "check_positions", "parts_of"]


class Tile(NamedTuple):
    """Everything that a block of the bias may depend on."""

    query: Num[Array, "B N t H"]
    dots: Float[Array, "B N t s"]  # query . key in float32, unscaled
    allowed: Bool[Array, "#B #N t s"]
    query_positions: Num[Array, "#B t"]
    key_positions: Num[Array, "#B s"]
    scale: float  # of the attention logits


class Bias(Lettered, abc.ABC):
    """A description of what is added to the scaled logits.

    A dataclass registered as a pytree, whose annotations name the axes of its arrays (see
    `posjax.axes`): from these follow padding, blocks, shardings and parts of the heads.
    """

    # Whether `tile` hands a running state from one block of keys to the next one on its left.
    has_state: ClassVar[bool] = False
    # Whether `weigh` adds to the weighted values.
    has_values: ClassVar[bool] = False
    # Whether weights are a softmax of the logits, or exp(logits) as they are (stick-breaking).
    uses_softmax: ClassVar[bool] = True
    # Whether keys on the left of where the bias has `finished` have weight 0, so the walk ends.
    zero_once_finished: ClassVar[bool] = False

    @property
    def only_dense(self) -> str | None:
        """The reason why `tile` does not exist; None if it does."""
        return next((part.only_dense for part in parts_of(self) if part.only_dense), None)

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
        """The addition to sum_j weights_ij value_j; linear in `weights`."""
        raise NotImplementedError(f"{type(self).__name__} adds nothing to values.")

    def start(self, shape: tuple[int, int, int], valid: Bool[Array, "#B t"] | None) -> PyTree:
        """The running state of `shape` [B, N, t] before the first block.

        Rows that are not `valid` never delay `finished`.
        """
        return None

    def finished(self, carry: PyTree) -> Bool[Array, ""]:
        """Whether no block further left needs the running state."""
        return jnp.asarray(False)

    def check(self, query: Array, key: Array, is_causal: bool) -> None:
        """Checks that the description fits query [B, T, N, H] and key [B, S, K, H].

        Raises:
            ValueError: it does not; named with the values.
        """

    def pad(self, queries: int, keys: int) -> Self:
        """Zeros appended along the query and the key axis of every array that has one."""
        return self.map_arrays(lambda letters, x: padded(letters, x, {"T": queries, "S": keys}))

    def block(self, query_start: Any, query_size: int, key_start: Any, key_size: int) -> Self:
        """The description of one block of queries and keys."""
        where = {"T": (query_start, query_size), "S": (key_start, key_size)}
        return self.map_arrays(lambda letters, x: block_of(letters, x, where))

    def add_block(self, part: Self, query_start: Any, key_start: Any) -> Self:
        """This description (of gradients) with a block's gradients added at their place."""
        starts = {"T": query_start, "S": key_start}
        return self.map_arrays(lambda letters, x, y: added_at(letters, x, y, starts), part)

    def can_split_heads(self, parts: int) -> bool:
        """Whether `parts` devices can each have the description of their own heads."""
        sizes = []
        self.map_arrays(lambda letters, x: sizes.extend(_head_sizes(letters, x)))
        return all(size == 1 or size % parts == 0 for size in sizes)

    def own_heads(self, part: Int[Array, ""], parts: int) -> Self:
        """The description of one of `parts` parts of the heads, if its arrays have been split.

        Called on the device that has the part, after `can_split_heads`.
        """
        return self.map_parts(lambda inner: inner.own_heads(part, parts))


def check_positions(bias: Any, query: Array, key: Array) -> None:
    """Checks the fields query_positions and key_positions, if the description has its own."""
    for name, (batch, length) in (
        ("query_positions", query.shape[:2]),
        ("key_positions", key.shape[:2]),
    ):
        positions = getattr(bias, name)
        if positions is not None:
            sizes = (1, batch) if batch != 1 else 1
            checks.shape(f"{type(bias).__name__}.{name}", positions, (sizes, length))


def check_fields(bias: Any) -> None:
    """Checks that every field of a description has the type of its annotation, also in its parts.

    Shapes are for `Bias.check`; it may rely on this.

    Raises:
        ValueError: a field has not; named with its value.
    """
    checks.instance("bias", bias, Bias, "None, an array or a description (posjax.Bias)")
    for field in dataclasses.fields(bias):
        name = f"{type(bias).__name__}.{field.name}"
        checks.annotated(name, getattr(bias, field.name), field.type)
    for part in parts_of(bias):
        check_fields(part)


def parts_of(bias: Bias) -> list[Bias]:
    """The descriptions that a description is made of; none for most."""
    checks.instance("bias", bias, Bias)
    found = []
    bias.map_parts(lambda part: found.append(part) or part)
    return found


def _head_sizes(letters: str, x: Array) -> list[int]:
    return [size for letter, size in zip(letters, x.shape, strict=False) if letter in HEADS]


def as_bias(bias: "Bias | Array | None") -> Bias | None:
    """A description from what a caller may pass: a description, an array, or None."""
    if bias is None or isinstance(bias, Bias):
        return bias
    array = array_of("bias", bias)
    checks.dtype("bias", array, jnp.floating)
    return ArrayBias(array)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ArrayBias(Bias):
    """A bias that is an array in memory."""

    array: Float[Array, "#B #N #T #S"] | None

    def dense(self, query, key, *, scale, allowed, query_positions, key_positions):
        """The array itself, in float32."""
        return wide(self.array)

    def tile(self, rows, tile, carry):
        """The block of the array."""
        return wide(self.array), None

    def check(self, query, key, is_causal):
        """The array must broadcast to [B, N, T, S]."""
        batch, queries, heads, _ = query.shape
        full = (batch, heads, queries, key.shape[1])
        checks.shape("ArrayBias.array", self.array, tuple((1, size) for size in full))
