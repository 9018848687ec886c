"""The tables of docs/implementations.md: what each implementation takes, found by asking it."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from posjax import (
    BiasSum,
    ClippedTableBias,
    ContextualBias,
    ForgettingBias,
    GroupedBias,
    MultiplierBias,
    ProductBias,
    RelativeBias,
    ScaledBias,
    SinusoidBias,
    StickBreakingBias,
)
from posjax.implementations import IMPLEMENTATIONS, Implementation
from posjax.kernels.derivatives import NO_FORWARD_MODE, NO_SECOND_DERIVATIVE, NO_SECOND_REVERSE
from posjax.problem import Problem
from posjax.types import Array, Float, Int

__all__ = [
    "CALLS",
    "COLUMNS",
    "TRANSFORMATIONS",
    "Call",
    "calls_in_markdown",
    "refusal",
    "transformations_in_markdown",
    "unsupported",
]

# Implementations, the one that does everything first.
COLUMNS = tuple(way.name for way in reversed(IMPLEMENTATIONS))

_BATCH, _LENGTH, _HEADS, _SIZE, _POSITIONS = 2, 16, 4, 64, 8


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of one call of attention: a line of the first table.

    Args:
        settings: makes those beyond query, key and value.
        batch: the axes before [length, heads, size].
        traced: names of `settings` that are not known when the call is compiled.
    """

    settings: Callable[[], dict[str, Any]] = dict
    batch: tuple[int, ...] = (_BATCH,)
    queries: int = _LENGTH
    keys: int = _LENGTH
    kv_heads: int = _HEADS
    value_size: int = _SIZE
    dtype: str = "bfloat16"
    traced: tuple[str, ...] = ()

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        """Query, key and value."""
        shapes = (
            (self.queries, _HEADS, _SIZE),
            (self.keys, self.kv_heads, _SIZE),
            (self.keys, self.kv_heads, self.value_size),
        )
        return [jax.ShapeDtypeStruct((*self.batch, *shape), self.dtype) for shape in shapes]


def _linear(
    params: Float[Array, "N"], query: Int[Array, "#B T"], key: Int[Array, "#B S"]
) -> Float[Array, "#B N T S"]:
    distance = query[:, None, :, None] - key[:, None, None, :]
    return -params[None, :, None, None] * jnp.abs(distance).astype(jnp.float32)


def _contextual(**settings: Any) -> ContextualBias:
    return ContextualBias(jnp.ones((_POSITIONS, _SIZE)), **settings)


def _relative(**settings: Any) -> RelativeBias:
    return RelativeBias(_linear, jnp.ones(_HEADS), **settings)


def _forgetting() -> ForgettingBias:
    return ForgettingBias(jnp.zeros((_BATCH, _LENGTH, _HEADS)))


def _biased(bias: Callable[[], Any], **settings: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"bias": bias(), "is_causal": True, **settings}


def _rows() -> Int[Array, "B T"]:
    return jnp.broadcast_to(jnp.arange(_LENGTH, dtype=jnp.int32) // 5, (_BATCH, _LENGTH))


def _lengths() -> Int[Array, "B"]:
    return jnp.full((_BATCH,), _LENGTH - 3, jnp.int32)


def _grouped() -> GroupedBias:
    query, key = (jnp.ones((_BATCH, _LENGTH, _HEADS, _SIZE)) for _ in range(2))
    places = jnp.arange(_LENGTH, dtype=jnp.int32)[None]
    return GroupedBias(query, key, places, places, window=4)


CALLS = {
    "no bias; `is_causal` or not": Call(),
    "grouped heads (`K` divides `N`)": Call(kv_heads=2),
    "several batch axes": Call(batch=(2, 3)),
    "no batch axis": Call(batch=()),
    "an empty batch": Call(batch=(0,)),
    "values with their own head size": Call(value_size=32),
    "bfloat16": Call(),
    "float16": Call(dtype="float16"),
    "float32": Call(dtype="float32"),
    "float64": Call(dtype="float64"),
    "`is_causal` with T != S": Call(lambda: {"is_causal": True}, keys=_LENGTH + 5),
    "`mask`, any form that broadcasts": Call(lambda: {"mask": jnp.ones((_LENGTH, 1), bool)}),
    "`query_positions`, `key_positions`": Call(
        lambda: {"query_positions": jnp.arange(_LENGTH) + 3, "is_causal": True}
    ),
    "segment ids": Call(lambda: {"query_segment_ids": _rows()}),
    "`query_seq_lengths`, `key_value_seq_lengths`": Call(
        lambda: {"query_seq_lengths": _lengths(), "key_value_seq_lengths": _lengths()}
    ),
    "`local_window_size`": Call(lambda: {"local_window_size": (3, 2)}),
    "`local_window_size` with `is_causal`": Call(
        lambda: {"local_window_size": (3, 0), "is_causal": True}
    ),
    "`scale`, known": Call(lambda: {"scale": 0.3}),
    "`scale`, traced": Call(lambda: {"scale": jnp.float32(0.3)}, traced=("scale",)),
    "`logits_soft_cap`": Call(lambda: {"logits_soft_cap": 30.0}),
    "`sinks`": Call(lambda: {"sinks": jnp.ones(_HEADS)}),
    "`return_residual`": Call(lambda: {"return_residual": True}),
    "dropout": Call(lambda: {"dropout_rng": jax.random.key(0), "dropout_rate": 0.5}),
    "weights for a `module`": Call(lambda: {"module": nn.Module()}),
    "`bias`, an array of any form that broadcasts": Call(
        lambda: {"bias": jnp.zeros((_HEADS, 1, _LENGTH))}
    ),
    "`ContextualBias`": Call(_biased(_contextual)),
    '`ContextualBias` with `direction="forward"`': Call(
        lambda: {"bias": _contextual(direction="forward")}
    ),
    "`RelativeBias` with `distance_only`": Call(_biased(lambda: _relative(distance_only=True))),
    "`RelativeBias` of positions": Call(_biased(_relative)),
    "`BiasSum` of one contextual and relative ones of the distance": Call(
        _biased(lambda: BiasSum((_contextual(), _relative(distance_only=True))))
    ),
    "`ForgettingBias`": Call(_biased(_forgetting)),
    "`StickBreakingBias`": Call(_biased(StickBreakingBias)),
    "`ClippedTableBias`": Call(
        _biased(lambda: ClippedTableBias(jnp.ones((3, _SIZE)), clip=(2, 0)))
    ),
    "`MultiplierBias`": Call(
        _biased(lambda: MultiplierBias(jnp.ones((_HEADS, 3)), clip=(2, 0)))
    ),
    "`ProductBias`": Call(
        _biased(lambda: ProductBias(*2 * [jnp.ones((_BATCH, _LENGTH, _HEADS, 4))]))
    ),
    "`SinusoidBias`": Call(
        _biased(lambda: SinusoidBias(jnp.ones((4, _HEADS, _SIZE)), jnp.ones((_HEADS, _SIZE))))
    ),
    "`GroupedBias`": Call(_biased(_grouped)),
    "`ScaledBias`": Call(_biased(lambda: ScaledBias(_contextual(), 0.5))),
}  # fmt: skip

_NOT_TESTED = "not tested: it needs a GPU"
_ONE_DERIVATIVE = "jax.nn has only the first derivative of cuDNN's attention, in reverse mode"
_BY_PALLAS = dict.fromkeys(("tpu", "gpu"), NO_SECOND_DERIVATIVE)

# Transformation -> implementation -> the sentence with which it is refused; others are not.
TRANSFORMATIONS: Mapping[str, Mapping[str, str]] = {
    "`jax.jit`": {},
    "`jax.grad`, `jax.vjp`": {},
    "`jax.jvp`, `jax.jacfwd`": {
        **dict.fromkeys(("xla", "tpu", "gpu"), NO_FORWARD_MODE),
        "cudnn": _ONE_DERIVATIVE,
    },
    "`jax.jvp` of `jax.grad`": {**_BY_PALLAS, "cudnn": _ONE_DERIVATIVE},
    "`jax.grad` of `jax.grad`": {
        "xla": NO_SECOND_REVERSE, **_BY_PALLAS, "cudnn": _ONE_DERIVATIVE,
    },
    "`jax.vmap`": {},
    "`jax.checkpoint`": {},
    "a mesh with Auto axes": {"cudnn": _NOT_TESTED},
    "a mesh with Explicit axes": dict.fromkeys(("cudnn", "gpu"), _NOT_TESTED),
    "`jax.shard_map`, also with `check_vma`": dict.fromkeys(("cudnn", "gpu"), _NOT_TESTED),
    "`jax.vmap` with `spmd_axis_name`": dict.fromkeys(("cudnn", "gpu"), _NOT_TESTED),
    "`jax.pmap`": dict.fromkeys(("cudnn", "gpu"), _NOT_TESTED),
    "`jax.export` with symbolic batch and length": {
        "tpu": "the TPU kernels need sizes that are known when they are compiled",
        "gpu": "the GPU kernels need sizes that are known when they are compiled",
        "cudnn": _NOT_TESTED,
    },
}  # fmt: skip


def refusal(way: Implementation, call: Call) -> str | None:
    """The sentence with which an implementation refuses a call; None if it takes it."""
    found, settings = [], call.settings()
    traced = {name: settings.pop(name) for name in call.traced}

    def ask(traced: dict[str, Any]) -> None:
        found.append(unsupported(way, Problem.of(*call.shapes(), **settings, **traced)))

    jax.eval_shape(ask, traced)
    return found[0]


def unsupported(way: Implementation, problem: Problem) -> str | None:
    """The sentence with which an implementation refuses a problem; None if it takes it.

    It does not depend on the devices that are here: kernels are asked for their own devices, others
    for CPUs.
    """
    module = way.load()
    device = jax.sharding.AbstractDevice("cpu", num_cores=1, platform="cpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        return getattr(module, "unsupported", module.refuses)(problem)


def calls_in_markdown() -> str:
    """The table of arguments."""
    ways = {way.name: way for way in IMPLEMENTATIONS}
    rows = {
        name: {column: refusal(ways[column], call) for column in COLUMNS}
        for name, call in CALLS.items()
    }
    return _markdown("argument", rows)


def transformations_in_markdown() -> str:
    """The table of transformations."""
    return _markdown("transformation", TRANSFORMATIONS)


def _markdown(head: str, rows: Mapping[str, Mapping[str, str | None]]) -> str:
    """A table of "yes" and of numbers of sentences, which follow it."""
    sentences: list[str] = []

    def cell(sentence: str | None) -> str:
        if sentence is None:
            return "yes"
        # One sentence for all kinds of descriptions.
        sentence = re.sub(r"^(\w+Bias|BiasSum)(?= (is not|has no) )", "[its class]", sentence)
        if sentence not in sentences:
            sentences.append(sentence)
        return f"({sentences.index(sentence) + 1})"

    lines = [
        " | ".join((name, *(cell(row.get(column)) for column in COLUMNS)))
        for name, row in rows.items()
    ]
    first = " | ".join((head, *(f'`"{name}"`' for name in COLUMNS)))
    table = [f"| {first} |", "|---" * (len(COLUMNS) + 1) + "|", *(f"| {x} |" for x in lines)]
    numbered = [f"{number}. {text.rstrip('.')}" for number, text in enumerate(sentences, 1)]
    return "\n".join([*table, "", *numbered])
