"""Right values for the arguments of public callables."""

import functools
import importlib
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import posjax
from posjax import encodings
from posjax.models import Transformer, TransformerConfig
from tests.cases import linear
from tests.fuzzing.targets import parameters_of, without_none
from tests.training.tiny import TASK, tiny

# Sizes of the axes by letter; other names have 3.
SIZES = {"B": 2, "T": 4, "S": 4, "U": 4, "N": 2, "K": 2, "M": 2, "H": 8, "E": 8, "D": 8, "P": 5}
SIZES |= {"m": 4, "n": 4, "offsets": 7, "half": 2, "numbers": 8, "k": 4, "places": 4, "pairs": 2}

SMALL = TransformerConfig(layers=1, width=8, heads=2)
MODEL = Transformer(SMALL, vocab_size=5, encoding=encodings.RoPE())
PROMPT = jnp.ones((2, 4), jnp.int32)


@functools.cache
def _variables() -> Any:
    return MODEL.init(jax.random.key(0), PROMPT)


# Values for required arguments by callable, then by name.
ROW = np.tile(np.arange(4, dtype=np.int32), (2, 1))
SAMPLES: dict[str, dict[str, Callable[[], Any]]] = {
    "*": {
        "adjacency": lambda: jnp.ones((4, 4)) - jnp.eye(4),
        "array": lambda: jnp.ones((2, 2, 4, 4)),
        "base": lambda: 100.0,
        "batch": lambda: 2,
        "batch_size": lambda: 4,
        "channels": lambda: 8,
        "config": TransformerConfig,
        "encoding": encodings.RoPE,
        "encodings": lambda: (encodings.RoPE(), encodings.T5()),
        "features": lambda: 4,
        "first": lambda: 1,
        "function": lambda: linear,
        "generator": lambda: np.random.default_rng(0),
        "group": lambda: 2,
        "head_size": lambda: 8,
        "heads": lambda: 2,
        "bias": lambda: posjax.ForgettingBias(-jnp.ones((2, 4, 2))),
        "clip": lambda: (2, 2),
        "ids": lambda: (0, 1),
        "index": lambda: 0,
        "length": lambda: 4,
        "low": lambda: 0.0,
        "high": lambda: 1.0,
        "max_distance": lambda: 4,
        "max_length": lambda: 8,
        "name": lambda: "rope",
        "neutral": lambda: (1,),
        "new": lambda: 6,
        "number": lambda: 42,
        "numbers": lambda: ["12", "34"],
        "old": lambda: 4,
        "order": lambda: (1, 0),
        "parts": lambda: (posjax.StickBreakingBias(),),
        "positions": lambda: jnp.asarray(ROW),
        "probability": lambda: 0.5,
        "rows": lambda: 4,
        "second": lambda: 2,
        "seed": lambda: 0,
        "shape": lambda: (2, 2),
        "shortest": lambda: 1.0,
        "longest": lambda: 10.0,
        "size": lambda: 4,
        "slopes": lambda: (0.5, 0.25),
        "split": lambda: "dense",
        "steps": lambda: 3,
        "symbols": lambda: ("a", "b"),
        "target_length": lambda: 8,
        "task": lambda: TASK,
        "text": lambda: "1+2",
        "trained_length": lambda: 4,
        "vocab_size": lambda: 5,
        "width": lambda: 8,
        "window": lambda: 2,
    },
    "dot_product_attention": {
        name: (lambda: jnp.ones((2, 4, 2, 8))) for name in ("query", "key", "value")
    },
    "generate": {"model": lambda: MODEL, "variables": _variables, "prompt": lambda: PROMPT},
    "init_cache": {"model": lambda: MODEL, "variables": _variables},
    "Transformer": {"config": lambda: SMALL},
    "Transformer.__call__": {"tokens": lambda: PROMPT},
    "Trigram": {
        "counts": lambda: np.zeros((256**2, 256), np.int64),
        "bigrams": lambda: np.full((256, 256), 1 / 256),
    },
    "Trigram.fit": {"data": lambda: np.arange(9, dtype=np.uint8)},
    "ArrayBias": {"array": lambda: jnp.ones((2, 2, 4, 4))},
    "Config": {name: (lambda n=name: getattr(tiny(), n)) for name in ("name", "task", "model")}
    | {name: (lambda n=name: getattr(tiny(), n)) for name in ("encoding", "train")},
    "random_projection": {"key": lambda: jax.random.key(0)},
    "random_subset_positions": {"key": lambda: jax.random.key(0)},
    "skip_positions": {"key": lambda: jax.random.key(0)},
    "sorted_subset": {"key": lambda: jax.random.key(0)},
    "read_product": {"question": lambda: "012*034=", "answer": lambda: "804000"},
    "make_mesh": {"config": lambda: tiny().mesh},
    "make_optimizer": {"config": lambda: tiny().optimizer, "schedule": lambda: lambda step: 0.1},
    "make_schedule": {"config": lambda: tiny().optimizer},
    "check_batch_sizes": {"config": lambda: tiny().train, "mesh": lambda: _mesh()},
    "replicated": {"mesh": lambda: _mesh()},
    "rows": {"mesh": lambda: _mesh()},
    "check_length": {"length": lambda: 3, "table": lambda: 4, "name": lambda: "table"},
    "MultiplierBias": {"multipliers": lambda: jnp.ones((2, 5)), "clip": lambda: (4, 0)},
    "ClippedTableBias": {"query_table": lambda: jnp.ones((5, 8)), "clip": lambda: (4, 0)},
    "ContextualBias": {"table": lambda: jnp.ones((5, 8))},
    "ScaledBias": {"factor": lambda: 0.5},
    "BiasSum": {"parts": lambda: (posjax.ForgettingBias(-jnp.ones((2, 4, 2))),)},
    "RelativeBias": {"params": lambda: jnp.ones(2)},
    "ProductBias": {
        n: (lambda: jnp.ones((2, 4, 2, 8))) for n in ("query_features", "key_features")
    },
    "axial_rotate": {"positions": lambda: jnp.ones((2, 4, 2), jnp.int32)},
    "axial_turn": {"positions": lambda: jnp.ones((2, 4, 2), jnp.int32)},
    "languages": {"second": lambda: (1,), "neutral": lambda: (2,)},
    "to_devices": {"batch": lambda: {"inputs": np.ones((2, 4))}, "mesh": lambda: _mesh()},
    "SinusoidBias": {"kernel": lambda: jnp.ones((6, 2, 8))},
    "GroupedBias": {
        "query_positions": lambda: jnp.asarray(ROW),
        "key_positions": lambda: jnp.asarray(ROW),
    },
    "window_table": {
        "coarse": lambda: jnp.ones((2, 2, 8)),
        "window": lambda: jnp.ones((2, 2, 8)),
        "shape": lambda: (4, 4),
    },
    "BiPE": {"encoding": encodings.RoPE},
    "rotate_blocks": {
        "angles": lambda: jnp.ones((2, 4, 2, 2)),
        "amounts": lambda: jnp.ones((2, 4, 4)),
    },
    "causal_convolution": {
        "kept": lambda: jnp.ones((2, 4, 8)),
        "rows": lambda: jnp.arange(4),
    },
    "grid_convolution": {"kernel": lambda: jnp.ones((3, 3, 8)), "width": lambda: 2},
    "load_corpus": {"path": lambda: (str(pathlib.Path(posjax.__file__).parent / "tasks"),)},
    "multiply_pairs": {"state": lambda: jnp.ones((2, 4, 2, 2, 4))},
    "picture": {"length": lambda: 8},
    "sinusoid_frequencies": {"base": lambda: 100.0},
    "rope_frequencies": {"base": lambda: 100.0},
    "p_rope_frequencies": {"base": lambda: 100.0, "fraction": lambda: 0.5},
    "draw": {"pictures": lambda: [importlib.import_module("posjax.plot").picture("alibi", 8)]},
    "interpolated_positions": {},
    "resize_weights": {},
    "shrink": {"length": lambda: 8, "rows": lambda: 4},
    "spectral_filters": {"filtered": lambda: jnp.ones((4, 2)), "vectors": lambda: jnp.ones((4, 4))},
    "orthonormal": {"x": lambda: jnp.eye(4)},
    "propagate": {"operator": lambda: jnp.eye(4), "features": lambda: jnp.eye(4)},
    "kernelized_attention": {"relative": lambda: jnp.ones((2, 7))},
    "Text": {"path": lambda: (str(pathlib.Path(posjax.__file__).parent / "tasks"),)},
    "as_batch": {n: (lambda: np.ones((2, 4), np.int32)) for n in ("inputs", "targets")}
    | {"scored": lambda: np.ones((2, 4), bool)},
}


def _mesh():
    return importlib.import_module("posjax.training.mesh").make_mesh(tiny().mesh)


def right_arguments(call: Callable, name: str) -> dict[str, Any]:
    """The required arguments of a callable, and those that have a named sample."""
    return {
        argument: sample(name, argument, annotation)
        for argument, (annotation, default) in parameters_of(call).items()
        if default is inspect.Parameter.empty or argument in SAMPLES.get(name, {})
    }


def sample(name: str, argument: str, annotation: Any) -> Any:
    """A right value."""
    named = SAMPLES.get(name, {}).get(argument)
    if named is not None:
        return named()
    kind, _ = without_none(annotation)
    if hasattr(kind, "dim_str") and not (name != "*" and argument in ("positions", "adjacency")):
        return array_for(kind)
    named = SAMPLES["*"].get(argument)
    if named is None:
        raise LookupError(f"no right value for {argument}: {annotation}")
    return named()


def array_for(kind: Any) -> Any:
    names = [axis.strip("#") for axis in kind.dim_str.split() if not axis.startswith("*")]
    shape = [int(axis) if axis.isdigit() else SIZES.get(axis, 3) for axis in names]
    dtype = _dtype_of(kind)
    return jnp.ones(shape, dtype)


def _dtype_of(kind: Any) -> Any:
    kinds = str(getattr(kind, "dtypes", ""))
    if "float32" in kinds:
        return jnp.float32
    return jnp.int32 if "int32" in kinds else bool
