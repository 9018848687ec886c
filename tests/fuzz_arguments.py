"""Wrong values for every public argument: what is refused clearly, and what is taken in silence.

Callables are found by inspection (`__all__` of the public modules). Each is called once with right
arguments, and then with one argument at a time replaced by a wrong value. The answer is

    clear     refused, with a message that names the argument
    unclear   refused by some other error
    silent    taken, although it is wrong
    right     taken, and right by a rule (`REVIEWED`, or NaN that comes out as NaN)
    hang      no answer in time

    python -m tests.fuzz_arguments --only padded
"""

import argparse
import collections
import collections.abc
import contextlib
import dataclasses
import importlib
import inspect
import io
import math
import pathlib
import pkgutil
import random
import re
import resource
import signal
import sys
import tempfile
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import posjax
from posjax import encodings
from posjax.biases.base import Bias
from posjax.models import TransformerConfig
from tests.cases import linear
from tests.training.tiny import TASK, tiny

SECONDS = 5
MEMORY = 6 * 2**30
NAN = float("nan")
SKIPPED_MODULES = re.compile(
    r"posjax\.(kernels|axes|checks|dropout|forms|implementations|masks|precision|problem|types"
    r"|varying|version)\b"
)

# Sizes of the axes by letter; other names have 3.
SIZES = {"B": 2, "T": 4, "S": 4, "U": 4, "N": 2, "K": 2, "M": 2, "H": 8, "E": 8, "D": 8, "P": 5}
SIZES |= {"m": 4, "n": 4, "offsets": 7, "half": 2, "numbers": 8, "k": 4, "places": 4, "pairs": 2}

# Callables that are not called, and why.
SKIPPED = {
    "main": "reads a command line",
    "fit": "trains a model; its config has checks of its own",
    "compare_encodings": "trains models",
    "explain": "takes whatever attention takes",
    "Side": "a record that encodings make",
    "Sizes": "a record that models make",
    "Context": "a record that models make",
    "LayerState": "a record that models make",
    "Remembered": "a record that models make",
    "Cache": "a record that models make",
    "Switches": "a record that `switching_positions` makes",
    "TextSegments": "a record that `text_segments` makes",
    "Turn": "a record that `turn_at` makes",
    "Tile": "a record that implementations make",
    "Picture": "a record that `picture` makes",
    "Entry": "a record of a table",
    "Row": "a record of a table",
    "Split": "a record that tasks make",
    "Corpus": "a record that `load_corpus` makes",
    "Evaluation": "a record that `evaluate` makes",
    "TrainState": "a record that `initial_state` makes",
    "Window": "a record of the training clock",
    "Interrupted": "an exception",
    "LengthError": "an exception",
    "RunError": "an exception",
    "CheckpointError": "an exception",
    "NonFiniteLossError": "an exception",
}
SKIPPED_TRAINING = re.compile(
    r"posjax\.training\.(?!config|optimizer|mesh)|posjax\.models\.layers|posjax\.table"
)

# Values for required arguments by callable, then by name.
ROW = np.tile(np.arange(4, dtype=np.int32), (2, 1))
SAMPLES: dict[str, dict[str, Callable[[], Any]]] = {
    "*": {
        "adjacency": lambda: jnp.ones((4, 4)) - jnp.eye(4),
        "array": lambda: jnp.ones((2, 2, 4, 4)),
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
        "ids": lambda: (1, 2),
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

# What is taken, and why that is right: (callable, argument, kind of value), with "*" for any.
REVIEWED = {
    ("*", "*", "huge"): "a large setting; time and memory are what counts",
    ("*", "*", "huge inside"): "a large setting; time and memory are what counts",
    ("*", "gate_bias", "0"): "any number is a bias",
    ("Abacus", "digits", "0 inside"): "a token id",
    ("BiPE", "separators", "0 inside"): "a token id",
    ("CONFLATOR", "neutral", "0 inside"): "a token id",
    ("CONFLATOR", "neutral", "empty"): "no neutral token",
    ("CONFLATOR", "second", "empty"): "no second language",
    ("is_one_of", "ids", "0 inside"): "a token id",
    ("is_one_of", "ids", "-1 inside"): "no token has it",
    ("is_one_of", "ids", "empty"): "no token is one of none",
    ("MsPoE", "order", "empty"): "no heads",
    ("MsPoE", "order", "0 inside"): "the order of one head",
    ("ms_poe_ratios", "order", "0 inside"): "the order of one head",
}
_ZERO = {
    "max_offset": "no offset",
    "initial_deviation": "starts at 0",
    "table_deviation": "starts at 0",
    "left_bonus": "no bonus",
    "minimum": "no minimum",
    "fraction": "no pair is turned",
    "draw": "the first draw",
    "skip_layers": "no layer",
    "block": "no block",
    "max_shift": "no shift",
    "dropout": "no dropout",
    "dropout_rate": "no dropout",
    "local_window": "the token itself",
    "local_window_size": "the token itself",
    "p_ignore": "never",
    "sparse_p_ignore": "never",
    "dense_p_ignore": "never",
    "blanks": "none",
    "dense_blanks": "none",
    "sparse_blanks": "none",
    "warmup_steps": "none",
    "final_fraction": "falls to 0",
    "weight_decay": "none",
    "b1": "no momentum",
    "b2": "no average",
    "clip_norm": "no clipping",
    "encoding_learning_rate_multiplier": "frozen",
    "evaluate_every": "only at the end",
    "probability": "no spaces",
    "seed": "a seed",
    "evaluation_seed": "a seed",
    "batch": "an empty batch",
    "length": "no tokens",
    "channels": "no channels",
    "offset": "starts at 0",
    "window": "no neighbours",
    "low": "any number is a limit",
    "high": "any number is a limit",
    "number": "zero is a number",
    "first": "zero is a number",
    "second": "zero is a number",
    "table": "an empty table",
    "temperature": "the most probable token",
    "process_index": "the first process",
    "factor": "any number is a factor",
    "query_factor": "any number is a factor",
    "bias_scale": "any number is a factor",
}
_NEGATIVE = {
    "gate_bias": "any number is a bias",
    "seed": "jax.random.key takes any integer",
    "evaluation_seed": "jax.random.key takes any integer",
    "data": "all devices",
    "offset": "a sequence that begins earlier",
    "low": "any number is a limit",
    "high": "any number is a limit",
    "factor": "any number is a factor",
    "query_factor": "any number is a factor",
    "bias_scale": "any number is a factor",
}
REVIEWED |= {("*", name, "0"): reason for name, reason in _ZERO.items()}
REVIEWED |= {("*", name, "-1"): reason for name, reason in _NEGATIVE.items()}


class Case(NamedTuple):
    """A callable, its right arguments, and the one to replace."""

    name: str
    call: Callable
    argument: str
    kind: str
    value: Any
    baseline: dict[str, Any]


class Finding(NamedTuple):
    """What came of a case."""

    case: Case
    verdict: str
    said: str


class _TooLong(BaseException):
    """The alarm."""


def _mesh():
    return importlib.import_module("posjax.training.mesh").make_mesh(tiny().mesh)


def public_callables() -> dict[str, Callable]:
    """Functions and classes of the public modules by their names."""
    found = {"posjax.attention.dot_product_attention": posjax.dot_product_attention}
    for info in pkgutil.walk_packages(posjax.__path__, "posjax."):
        if SKIPPED_MODULES.match(info.name):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            home = getattr(value, "__module__", None)
            if callable(value) and home == module.__name__:
                found[f"{home}.{name}"] = value
    return found


def _why_skipped(path: str, call: Callable) -> str | None:
    name = path.rpartition(".")[2]
    if name in SKIPPED:
        return SKIPPED[name]
    if SKIPPED_TRAINING.match(path):
        return "inside the loop of training, or the layers of a model"
    if inspect.isabstract(call) or getattr(call, "_is_protocol", False):
        return "abstract"
    return None


def _parameters(call: Callable) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of each argument."""
    try:
        hints = typing.get_type_hints(call.__init__ if inspect.isclass(call) else call)
    except Exception:
        hints = {}
    fields = {f.name: f.type for f in dataclasses.fields(call)} if _is_dataclass(call) else {}
    parameters = inspect.signature(call).parameters.values()
    return {
        p.name: (hints.get(p.name, fields.get(p.name, p.annotation)), p.default)
        for p in parameters
        if p.name not in ("parent",)
        and not (p.name == "name" and _is_linen(call))
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


def _is_dataclass(call: Any) -> bool:
    return inspect.isclass(call) and dataclasses.is_dataclass(call)


def _is_linen(call: Any) -> bool:
    return inspect.isclass(call) and "__init__" in vars(call) and hasattr(call, "scope")


def _without_none(annotation: Any) -> tuple[Any, bool]:
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        others = [part for part in parts if part is not types.NoneType]
        return others[0], len(others) < len(parts)
    return annotation, False


def _is_array(kind: Any) -> bool:
    return kind is jax.Array or hasattr(kind, "dim_str")


def sample(name: str, argument: str, annotation: Any) -> Any:
    """A right value."""
    named = SAMPLES.get(name, {}).get(argument)
    if named is not None:
        return named()
    kind, _ = _without_none(annotation)
    if hasattr(kind, "dim_str") and not (name != "*" and argument in ("positions", "adjacency")):
        return _array(kind)
    named = SAMPLES["*"].get(argument)
    if named is None:
        raise LookupError(f"no right value for {argument}: {annotation}")
    return named()


def _array(kind: Any) -> Any:
    names = [axis.strip("#") for axis in kind.dim_str.split() if not axis.startswith("*")]
    shape = [int(axis) if axis.isdigit() else SIZES.get(axis, 3) for axis in names]
    dtype = _dtype_of(kind)
    return jnp.ones(shape, dtype)


def _dtype_of(kind: Any) -> Any:
    kinds = str(getattr(kind, "dtypes", ""))
    if "float32" in kinds:
        return jnp.float32
    return jnp.int32 if "int32" in kinds else bool


def bad_values(annotation: Any, right: Any, default: Any) -> Iterator[tuple[str, Any]]:
    """Wrong values for an argument, each with its kind."""
    kind, optional = _without_none(annotation)
    yield "object", object()
    if not (optional or default is None or kind is Any):
        yield "none", None
    if _is_array(kind):
        yield from _bad_arrays(kind, right)
        return
    if kind is bool:
        yield from (("text", "False"), ("0", 0), ("1", 1), ("nan", NAN))
        return
    origin = typing.get_origin(kind)
    if kind in (int, float):
        yield from (("text", "abc"), ("nan", NAN), ("inf", math.inf), ("bool", True))
        yield from (("0", 0), ("-1", -1), ("huge", 10**9), ("array", np.ones((2, 3))))
        if kind is int:
            yield "fraction", 1.5
    elif origin is tuple or isinstance(right, tuple | list):
        yield from (("number", 5), ("text", "abc"), ("nan inside", (NAN,)))
        yield from (("bool inside", (True,)), ("none inside", (None,)), ("empty", ()))
        if typing.get_args(kind)[:1] == (int,):
            yield from (("0 inside", (0,)), ("-1 inside", (-1,)), ("huge inside", (10**9,)))
    elif origin is typing.Literal:
        yield from (("text", "abc"), ("bool", True), ("fraction", 1.5), ("nan", NAN))
    elif kind is str:
        yield from (("number", 3), ("bool", True), ("nan", NAN))
    elif origin is collections.abc.Callable or isinstance(kind, type):
        yield from (("text", "abc"), ("number", 3), ("bool", True))


def _bad_arrays(kind: Any, right: Any) -> Iterator[tuple[str, Any]]:
    yield from (("text", "abc"), ("nan", NAN))
    if not hasattr(right, "shape") or not hasattr(kind, "dim_str"):
        return
    axes = kind.dim_str.split()
    if not any(axis.startswith("*") for axis in axes):
        yield "rank + 1", jnp.stack([right] * 3)
        if right.ndim:
            yield "rank - 1", right[0]
    if right.ndim:
        yield "size", jnp.concatenate([right] * 3, axis=-1)[..., :-1]
        yield "first size", jnp.concatenate([right] * 3, axis=0)
    if right.dtype == bool:
        yield from (("floats", right.astype(jnp.float32)), ("integers", right.astype(jnp.int32)))
        return
    yield from (("bools", right.astype(bool)), ("complex", right.astype(jnp.complex64)))
    if jnp.issubdtype(right.dtype, jnp.integer) and "float32" not in str(kind.dtypes):
        yield "floats", right.astype(jnp.float32) + 0.5
    if jnp.issubdtype(right.dtype, jnp.floating):
        yield "nans", jnp.full_like(right, NAN)


def _use(call: Callable, arguments: dict[str, Any]) -> Any:
    """The call, and attention with its result if that is the description of a bias."""
    result = call(**arguments)
    if isinstance(result, Bias):
        x = jnp.ones((2, 4, 2, 8))
        result = posjax.dot_product_attention(
            x, x, x, bias=result, is_causal=True, implementation="reference"
        )
    if isinstance(result, Iterator):
        result = next(result)
    return jax.block_until_ready(result) if _leaves(result) else result


def _leaves(tree: Any) -> list:
    return [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array | np.ndarray)]


def cases(only: str | None = None) -> tuple[list[Case], dict[str, str]]:
    """All cases, and the callables without any, with the reason."""
    found, left_out = [], {}
    for path, call in public_callables().items():
        if only is not None and only != path.rpartition(".")[2]:
            continue
        reason = _why_skipped(path, call)
        if reason is None:
            try:
                found += _cases_of(path, call)
            except (Exception, _TooLong) as error:
                reason = f"no working call: {type(error).__name__}: {error}".splitlines()[0][:150]
        if reason is not None:
            left_out[path] = reason
    return found, left_out


def _cases_of(path: str, call: Callable) -> list[Case]:
    name = path.rpartition(".")[2]
    parameters = _parameters(call)
    named = SAMPLES.get(name, {})
    required = {
        argument: sample(name, argument, annotation)
        for argument, (annotation, default) in parameters.items()
        if default is inspect.Parameter.empty or argument in named
    }
    with _quiet(6 * SECONDS):
        _use(call, required)
    found = []
    for argument, (annotation, default) in parameters.items():
        right = required.get(argument, default)
        kind, _ = _without_none(annotation)
        if right is None and hasattr(kind, "dim_str"):
            right = _array(kind)
        for value_kind, value in bad_values(annotation, right, default):
            if value_kind in ("size", "first size") and not _shared(parameters, kind, value_kind):
                continue
            found.append(Case(name, call, argument, value_kind, value, required))
    return found


def _shared(parameters: dict[str, tuple[Any, Any]], kind: Any, which: str) -> bool:
    """Whether another axis has the letter of the first or last axis, so that its size is known."""
    axes = [
        axis.strip("#")
        for annotation, default in parameters.values()
        if default is inspect.Parameter.empty
        for axis in getattr(_without_none(annotation)[0], "dim_str", "").split()
    ]
    own = kind.dim_str.split()[0 if which == "first size" else -1].strip("#")
    return not own.startswith("*") and axes.count(own) > 1


@contextlib.contextmanager
def _quiet(seconds: float = SECONDS) -> Iterator[None]:
    """No output, no warnings, and an alarm."""

    def ring(*_):
        raise _TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(case: Case) -> Finding:
    """Tries a case."""
    arguments = case.baseline | {case.argument: case.value}
    try:
        with _quiet():
            result = _use(case.call, arguments)
    except _TooLong:
        return Finding(case, "hang", f"more than {SECONDS} s")
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        kinds = isinstance(error, ValueError | TypeError | NotImplementedError)
        names = re.search(rf"\b{re.escape(case.argument)}\b", str(error))
        partner = any(re.search(rf"\b{name} (is|has)\b", str(error)) for name in arguments)
        names = names or ("; it must be " in said and partner)
        by_us = kinds and names and not re.search(r"unexpected keyword|has no attribute", said)
        return Finding(case, "clear" if by_us else "unclear", said)
    reason = _reviewed(case)
    if reason is None and case.kind in ("nans", "nan") and _has_nan(result):
        reason = "NaN comes out"
    return Finding(case, "silent" if reason is None else "right", reason or "")


def _reviewed(case: Case) -> str | None:
    for name in (case.name, "*"):
        for argument in (case.argument, "*"):
            reason = REVIEWED.get((name, argument, case.kind))
            if reason is not None:
                return reason
    return None


def _has_nan(result: Any) -> bool:
    floats = [x for x in _leaves(result) if jnp.issubdtype(x.dtype, jnp.floating)]
    return any(bool(jnp.isnan(x).any()) for x in floats)


def run(chosen: list[Case], show: Callable[[Finding], None] = lambda _: None) -> list[Finding]:
    """Tries cases one after the other, with limits of time and memory."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory_in_use() + MEMORY, limits[1]))
    try:
        findings = []
        for case in chosen:
            findings.append(judge(case))
            show(findings[-1])
        return findings
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _memory_in_use() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def counts(findings: list[Finding]) -> dict[str, int]:
    """How many of each verdict."""
    found = collections.Counter(finding.verdict for finding in findings)
    return {name: found[name] for name in ("clear", "right", "unclear", "silent", "hang")}


def main(words: list[str] | None = None) -> int:
    """The command line; 1 where anything is silent or hangs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="one callable")
    parser.add_argument("--sample", type=int, metavar="N", help="so many cases, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        chosen, left_out = cases(options.only)
        if options.sample is not None:
            chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))

        def show(finding: Finding) -> None:
            if finding.verdict in ("unclear", "silent", "hang"):
                case = finding.case
                said = " ".join(finding.said.split())[:110]
                print(f"{finding.verdict:8}{case.name}({case.argument}: {case.kind})  {said}")

        findings = run(chosen, show)
    for path, reason in left_out.items():
        print(f"left out {path}: {reason}")
    arguments = {(case.name, case.argument) for case in chosen}
    print(f"{len(chosen)} values, {len(arguments)} arguments, {counts(findings)}")
    found = counts(findings)
    return int(found["silent"] + found["hang"] > 0)


if __name__ == "__main__":
    sys.exit(main())
