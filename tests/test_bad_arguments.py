"""Arguments and settings that are refused, with every word of the message.

Two tables for what is no encoding (those are in tests/encodings/test_bad_settings.py), and a sweep:
every setting of every encoding, scaling, task and config with values of a wrong kind.
"""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax import encodings, frequencies, graphs
from posjax.alignment import attention_entropy
from posjax.encodings import registry
from posjax.encodings.alibi import alibi_slopes
from posjax.encodings.base import PositionEncoding
from posjax.encodings.sinusoidal import sinusoids
from posjax.frequencies import DynamicNTK, Linear, Llama3, LongRoPE, NTKAware, YaRN
from posjax.graphs import RFP, RWSE, SPE, LapPE
from posjax.grids import grid_positions
from posjax.kernelized import KernelizedAttention, kernelized_attention, random_projection
from posjax.models import Transformer, TransformerConfig
from posjax.models.generation import generate
from posjax.positions import (
    interpolated_positions,
    random_subset_positions,
    sequence_positions,
    skip_positions,
    spread_positions,
)
from posjax.tasks import FlipFlop, SelectiveCopy, Text
from posjax.tasks.augment import index_hints, padded, padded_product, random_spaces, remove_hints
from posjax.tasks.data import split_batches, train_dataset
from posjax.training import Config, MeshConfig, OptimizerConfig, TrainConfig
from tests.fuzzing.reviewed import MAY_BE_0, MAY_BE_NEGATIVE
from tests.training.tiny import TASK, tiny

NAN = float("nan")
ROW = jnp.arange(3)[None]
KEY = jax.random.key(0)
GENERATOR = np.random.default_rng(0)

# Arguments that are right; each row of the tables changes some.
RIGHT = {
    Config: {field.name: getattr(tiny(), field.name) for field in dataclasses.fields(Config)},
    TrainConfig: {"steps": 4, "batch_size": 4},
    Transformer: {"config": TransformerConfig(), "vocab_size": 5},
    TransformerConfig: {"width": 32, "heads": 4},
    encodings.Combine: {"encodings": (encodings.RoPE(),)},
    attention_entropy: {"logits": jnp.ones((1, 2))},
    generate: {"model": None, "variables": None, "prompt": ROW, "steps": 1},
    grid_positions: {"positions": ROW},
    interpolated_positions: {"positions": ROW, "trained_length": 1, "target_length": 2},
    kernelized_attention: {
        "query": jnp.ones((2, 7, 4, 8)),
        "key": jnp.ones((2, 7, 2, 8)),
        "value": jnp.ones((2, 7, 2, 6)),
        "relative": jnp.ones((4, 13)),
        "projection": jnp.ones((5, 8)),
    },
    padded_product: {"first": 1, "second": 2},
    random_projection: {"key": KEY, "features": 4, "size": 4},
    random_spaces: {"text": "1", "generator": GENERATOR},
    random_subset_positions: {"key": KEY, "positions": ROW},
    sequence_positions: {"batch": 1, "length": 2},
    sinusoids: {"positions": ROW, "width": 4},
    skip_positions: {"key": KEY, "positions": ROW},
    split_batches: {"task": TASK, "split": "dense", "batch_size": 4},
    spread_positions: {"positions": ROW, "max_length": 8},
    train_dataset: {"task": TASK, "batch_size": 4, "seed": 0},
    TASK.example: {"index": 0},
}

# What names in messages begin with: nothing for functions, and the class for other settings.
SECTIONS = {
    Config: "",
    MeshConfig: "mesh.",
    OptimizerConfig: "optimizer.",
    TrainConfig: "train.",
    TransformerConfig: "model.",
}

DECAY = "at least 0 and below 1"
INTEGERS = "a tuple of one or more integers, each at least 1"
NAMES = "a tuple of strings, none empty"
NUMBERS = "a tuple of one or more finite numbers, each above 0, or None"
LETTERS = "different letters, none of them a digit"
FOLDER = "the name of a folder, without slashes"
SEED = "from 0 to 18446744073709551615"

# Class or function, what is changed (the wrong one first), and what must be said of that one.
TABLE = [
    *((cls, {"factor": 0.5}, "at least 1") for cls in (Linear, NTKAware, DynamicNTK, YaRN)),
    *((cls, {"factor": 0.5}, "at least 1") for cls in (LongRoPE, Llama3)),
    *((cls, {"original_length": 0}, "at least 1") for cls in (DynamicNTK, YaRN, Llama3)),
    (LongRoPE, {"original_length": 1}, "at least 2"),
    (YaRN, {"beta_slow": 0.0}, "above 0"),
    (YaRN, {"beta_fast": 0.5}, "at least beta_slow = 1.0"),
    (YaRN, {"ramp": "linear"}, '"dimension" or "rotations"'),
    (YaRN, {"attention_factor": 0.0}, "above 0, or None"),
    (LongRoPE, {"attention_factor": -1.0}, "above 0, or None"),
    (LongRoPE, {"long_factors": ()}, NUMBERS),
    (LongRoPE, {"short_factors": (1.0, 0.0)}, NUMBERS),
    (Llama3, {"low": 0.0}, "above 0"),
    (Llama3, {"high": 0.5}, "at least low = 1.0"),
    (frequencies.rope_frequencies, {"base": NAN, "channels": 4}, "a finite number, above 0"),
    (sequence_positions, {"length": 2.0}, "an integer, at least 0"),
    (random_subset_positions, {"max_length": 0}, "at least 1"),
    (spread_positions, {"max_length": 0}, "at least 1"),
    (spread_positions, {"length": 0}, "at least 1, or None"),
    (skip_positions, {"target_length": 0}, "at least 1"),
    (interpolated_positions, {"trained_length": 0}, "above 0"),
    (grid_positions, {"shape": ()}, INTEGERS),
    (grid_positions, {"shape": (2, 0)}, INTEGERS),
    (grid_positions, {"shape": (-1, 2)}, INTEGERS),
    (attention_entropy, {"temperature": 0.0}, "above 0"),
    (alibi_slopes, {"heads": 0}, "at least 1"),
    (sinusoids, {"width": 3}, "at least 2 and even"),
    (sinusoids, {"layout": "half"}, '"interleaved" or "concatenated"'),
    (kernelized_attention, {"scale": 0.0}, "above 0"),
    (kernelized_attention, {"is_causal": 1}, "True or False"),
    (kernelized_attention, {"implementation": "xla"}, '"fft" or "reference"'),
    (KernelizedAttention, {"max_distance": 0}, "at least 1"),
    (KernelizedAttention, {"features": 0}, "at least 1"),
    (KernelizedAttention, {"scale": NAN}, "a finite number, above 0"),
    (random_projection, {"features": 0}, "at least 1"),
    (random_projection, {"size": 0}, "at least 1"),
    *((cls, {"width": 0}, "at least 1") for cls in (LapPE, RFP, RWSE, SPE)),
    *((cls, {"steps": 0}, "at least 1") for cls in (RFP, RWSE)),
    *((LapPE, {name: 0}, "at least 1") for name in ("eigenvectors", "layers")),
    *((SPE, {name: 0}, "at least 1") for name in ("filters", "psi_layers", "psi_hidden")),
    *((SPE, {name: 0}, "at least 1") for name in ("phi_layers", "phi_hidden")),
    (SPE, {"eigenvectors": 0}, "at least 1, or None"),
    (SPE, {"psi": "transformer"}, '"mlp" or "deepsets"'),
    (RFP, {"features": 0}, "at least 1"),
    (RFP, {"operator": "walk"}, '"adjacency" or "laplacian"'),
    (RFP, {"normalization": "l2"}, '"orthonormal" or "length"'),
    (TransformerConfig, {"layers": 0}, "at least 1"),
    (
        TransformerConfig,
        {"heads": 3},
        "a divisor of model.width = 32, unless model.head_size is given",
    ),
    (TransformerConfig, {"kv_heads": 3}, "a divisor of model.heads = 4"),
    (TransformerConfig, {"kv_heads": 0}, "at least 1, or None"),
    (TransformerConfig, {"head_size": 0}, "at least 1, or None"),
    (TransformerConfig, {"mlp": "SwiGLU"}, '"gelu", "relu", "swiglu" or "geglu"'),
    (TransformerConfig, {"mlp_ratio": 0}, "above 0"),
    (TransformerConfig, {"mlp_ratio": -1}, "above 0"),
    (TransformerConfig, {"mlp_ratio": NAN}, "a finite number, above 0"),
    (
        TransformerConfig,
        {"mlp_ratio": 0.01},
        "enough for a hidden channel with model.width = 32",
    ),
    (TransformerConfig, {"norm": "Pre"}, '"pre" or "post"'),
    (TransformerConfig, {"norm_kind": "LayerNorm"}, '"layer" or "rms"'),
    (TransformerConfig, {"dropout": 1.0}, DECAY),
    (TransformerConfig, {"dtype": "float16"}, '"float32" or "bfloat16"'),
    (TransformerConfig, {"local_window": -1}, "at least 0, or None"),
    (Transformer, {"vocab_size": 0}, "at least 1"),
    (generate, {"steps": 0}, "at least 1"),
    (generate, {"temperature": -1.0}, "at least 0"),
    (generate, {"key": None, "temperature": 1.0}, "a random key, with a temperature above 0"),
    (FlipFlop, {"length": 2}, "at least 4 and even"),
    (FlipFlop, {"length": 15}, "at least 4 and even"),
    (FlipFlop, {"p_ignore": -0.1}, "from 0 to 1"),
    (FlipFlop, {"sparse_p_ignore": 1.1}, "from 0 to 1"),
    (FlipFlop, {"dense_p_ignore": 2}, "from 0 to 1"),
    (FlipFlop, {"loss": "dirty"}, '"clean" or "full"'),
    (FlipFlop, {"examples": 0}, "at least 1"),
    (FlipFlop, {"evaluation_seed": -1}, SEED),
    (SelectiveCopy, {"symbols": 0}, "at least 1"),
    (SelectiveCopy, {"alphabet": 1}, "at least 2"),
    (SelectiveCopy, {"blanks": -1}, "at least 0"),
    (SelectiveCopy, {"dense_blanks": -1}, "at least 0"),
    (SelectiveCopy, {"sparse_blanks": -2}, "at least 0"),
    (SelectiveCopy, {"examples": 0}, "at least 1"),
    *((Text, {"path": path}, NAMES) for path in (("",), ["book.txt"])),
    (Text, {"path": "book.txt"}, "a tuple of strings"),
    (Text, {"suffixes": ".py"}, "a tuple of strings"),
    (Text, {"length": 0}, "at least 2 and even"),
    (Text, {"length": 33}, "at least 2 and even"),
    *((Text, {"validation_fraction": x}, "above 0 and below 1") for x in (0.0, 1.0)),
    (Text, {"validation_bytes": 640}, "at least 641"),
    (train_dataset, {"batch_size": 0}, "at least 1"),
    (train_dataset, {"batch_size": 5, "process_count": 2}, "a multiple of process_count = 2"),
    (train_dataset, {"process_count": 0}, "at least 1"),
    (train_dataset, {"process_index": 1}, "from 0 to 0"),
    (train_dataset, {"seed": -1}, SEED),
    (split_batches, {"batch_size": 0}, "at least 1"),
    (split_batches, {"limit": 0}, "at least 1, or None"),
    (split_batches, {"split": "train"}, '"in_distribution", "dense" or "sparse"'),
    (TASK.example, {"split": "tain"}, '"train", "in_distribution", "dense" or "sparse"'),
    (random_spaces, {"probability": 1.5}, "from 0 to 1"),
    (index_hints, {"alphabet": "aa", "numbers": ["1"], "generator": GENERATOR}, LETTERS),
    (remove_hints, {"alphabet": "a1", "text": "1"}, LETTERS),
    (padded, {"number": 1000, "width": 3}, "from 0 to 999"),
    (padded, {"number": -1, "width": 3}, "from 0 to 999"),
    (padded_product, {"width": 0}, "from 1 to 2150"),
    (padded, {"width": 10**9, "number": 1}, "from 1 to 4300"),
    (OptimizerConfig, {"learning_rate": 0.0}, "above 0"),
    (OptimizerConfig, {"schedule": "exponential"}, '"cosine", "linear" or "constant"'),
    (OptimizerConfig, {"warmup_steps": -1}, "at least 0"),
    (OptimizerConfig, {"final_fraction": 1.5}, "from 0 to 1"),
    (OptimizerConfig, {"weight_decay": -1.0}, "at least 0"),
    (OptimizerConfig, {"b1": 1.0}, DECAY),
    (OptimizerConfig, {"b2": -0.5}, DECAY),
    (OptimizerConfig, {"eps": 0.0}, "above 0"),
    (OptimizerConfig, {"clip_norm": -1.0}, "at least 0"),
    (OptimizerConfig, {"encoding_learning_rate_multiplier": -1.0}, "at least 0"),
    *((TrainConfig, {name: 0}, "at least 1") for name in ("steps", "batch_size", "accumulate")),
    *((TrainConfig, {name: 0}, "at least 1") for name in ("log_every", "checkpoint_every")),
    (TrainConfig, {"steps": 2.5}, "an integer, at least 1"),
    (TrainConfig, {"accumulate": 3}, "a divisor of train.batch_size = 4"),
    (MeshConfig, {"data": 0}, "-1 or at least 1"),
    (Config, {"seed": -1}, "from 0 to 4294967295"),
    (Config, {"seed": 2**32}, "from 0 to 4294967295"),
    *((Config, {"name": name}, FOLDER) for name in ("", "a/b", "..", " a")),
    (Config, {"task": "debug"}, "an instance of Task"),
]

# Likewise, with the whole message where it does not begin with a name and a value of what is given.
SHAPES = [
    ({"query": (2, 7, 8)}, "query has", "[batch, length, heads, head size], no axis 0"),
    ({"key": (2, 0, 2, 8)}, "key has", "[2, 7, heads, 8], no axis 0"),
    ({"value": (2, 6, 2, 8)}, "value has", "[2, 7, 2, head size], no axis 0"),
    ({"relative": (2, 13)}, "relative has", "[4, offsets]"),
    ({"projection": (5, 7)}, "projection has", "[features, 8]"),
]
OTHERS = [
    *(
        (
            kernelized_attention,
            {name: jnp.ones(shape) for name, shape in change.items()},
            f"{words} shape {next(iter(change.values()))}; it must be {wanted}.",
        )
        for change, words, wanted in SHAPES
    ),
    (
        kernelized_attention,
        {"query": jnp.ones((2, 7, 4, 6))},
        "key has shape (2, 7, 2, 8); it must be [2, 7, heads, 6], no axis 0.",
    ),
    (
        kernelized_attention,
        {"query": jnp.ones((2, 7, 4, 8), int)},
        "query has dtype int32; it must be a floating-point type.",
    ),
    (
        kernelized_attention,
        {"key": jnp.ones((2, 7, 2, 8), jnp.bfloat16)},
        "key has dtype bfloat16; it must be float32.",
    ),
    (
        kernelized_attention,
        {"query": jnp.ones((2, 7, 3, 8))},
        "number of key's heads is 2; it must be a divisor of query's heads, 3.",
    ),
    (
        kernelized_attention,
        {"relative": jnp.ones((4, 12))},
        "number of offsets in relative is 12; it must be odd.",
    ),
    (
        generate,
        {"prompt": jnp.zeros((2, 0), jnp.int32)},
        "prompt has shape (2, 0); it must be [batch, length], no axis 0.",
    ),
    (
        generate,
        {"prompt": jnp.ones((1, 2))},
        "prompt has dtype float32; it must be an integer type.",
    ),
    *(
        (
            cls(),
            {"channels": 2, "base": 100.0, "length": jnp.array([8])},
            f"number of channels that {cls.__name__} turns is 2; it must be at least 4.",
        )
        for cls in (NTKAware, DynamicNTK)
    ),
    (
        LongRoPE(long_factors=(1.0, 2.0)),
        {"channels": 8, "base": 100.0, "length": jnp.array([8])},
        "LongRoPE long_factors is (1.0, 2.0); it must be 4 numbers, one for each pair.",
    ),
    (
        train_dataset,
        {"task": Text(path=("nowhere",))},
        "entry of path is 'nowhere'; it must be a file or a folder.",
    ),
    (TASK.example, {"index": -1}, f"index in split 'train' is -1; it must be {SEED}."),
    *(
        (
            index_hints,
            {"numbers": [number], "generator": GENERATOR, "alphabet": "ab"},
            f"one of numbers is {number!r}; it must be {wanted}.",
        )
        for number, wanted in (
            ("1a", "digits only"),
            ("", "digits only"),
            ("123", "at most 2 digits, the letters of alphabet"),
        )
    ),
]


def refusal(call, change):
    """What is said to a call with some arguments changed; None where it is taken."""
    right = RIGHT.get(call, {}) if call.__hash__ else {}
    try:
        call(**(right | change))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("call", "change", "wanted"), TABLE)
def test_what_is_refused(call, change, wanted):
    name, value = next(iter(change.items()))
    section = SECTIONS.get(call, f"{call.__name__} " if isinstance(call, type) else "")
    assert refusal(call, change) == f"{section}{name} is {value!r}; it must be {wanted}."


@pytest.mark.parametrize(("call", "change", "message"), OTHERS)
def test_what_does_not_fit(call, change, message):
    assert refusal(call, change) == message


CLASSES = [
    *(set(registry.classes().values()) - {PositionEncoding}),
    *graphs.classes().values(),
    *(getattr(frequencies, name) for name in frequencies.__all__ if name[0].isupper()),
    *(FlipFlop, SelectiveCopy, Text),
    *(Config, MeshConfig, OptimizerConfig, TrainConfig),
    *(KernelizedAttention, Transformer, TransformerConfig),
]
SETTINGS = sorted(
    (
        (cls, field)
        for cls in CLASSES
        if dataclasses.is_dataclass(cls)
        for field in dataclasses.fields(cls)
        if field.init and field.name not in ("parent", "name")
    ),
    key=lambda pair: (pair[0].__name__, pair[1].name),
)

# Values that are wrong for a kind of setting, whatever its range.
WRONG = {
    int: [NAN, math.inf, 1.5, 1.0, "1", True, object()],
    float: [NAN, math.inf, -math.inf, "1.0", True, 1j, object()],
    bool: [0, 1, "True", None],
    str: [0, True, None],
    tuple: [1, "12", (NAN,), (True,), (None,), object()],
    typing.Literal: ["abc", "", True, 1.5, object()],
    object: ["abc", 3, True],
}


def kind_of(annotation):
    """The kind of a setting, a key of WRONG, and whether it may be None."""
    parts = typing.get_args(annotation)
    if type(None) in parts:
        (other,) = (part for part in parts if part is not type(None))
        return kind_of(other)[0], True
    origin = typing.get_origin(annotation) or annotation
    return (origin if origin in WRONG else object), False


def refused(cls, field, value):
    """Whether a value is refused; the message must name the setting and say what it must be."""
    message = refusal(cls, {field.name: value})
    assert message is None or (field.name in message and "; it must be " in message)
    return message is not None


@pytest.mark.parametrize(
    ("cls", "field"), SETTINGS, ids=[f"{c.__name__}-{f.name}" for c, f in SETTINGS]
)
def test_every_setting_refuses_what_is_of_a_wrong_kind(cls, field):
    kind, may_be_none = kind_of(field.type)
    wrong = WRONG[kind] + ([] if may_be_none or kind in (bool, str) else [None])
    accepted = [value for value in wrong if not refused(cls, field, value)]
    assert not accepted


@pytest.mark.parametrize("value", [-1, 0])
def test_numbers_have_a_range_or_a_reason(value):
    allowed = MAY_BE_NEGATIVE if value < 0 else MAY_BE_0
    numbers = [(cls, field) for cls, field in SETTINGS if kind_of(field.type)[0] in (int, float)]
    # The other axes of a mesh are not possible yet, which is another error.
    numbers = [pair for pair in numbers if pair[0] is not MeshConfig or pair[1].name == "data"]
    accepted = {field.name for cls, field in numbers if not refused(cls, field, value)}
    assert accepted == set(allowed)
