"""Wrong arguments of `dot_product_attention`: argument -> exception -> words that stand in it."""

import jax.numpy as jnp
import pytest

from posjax import BiasSum, ContextualBias, RelativeBias, ScaledBias, dot_product_attention
from posjax.encodings import RoPE
from tests.cases import linear


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


GOOD = {"query": zeros(2, 6, 4, 8), "key": zeros(2, 5, 2, 8), "value": zeros(2, 5, 2, 8)}
TABLE = zeros(3, 8)

WRONG = {
    "rank of query": (
        {"query": zeros(4, 8)},
        r"query has shape \(4, 8\); it must be \[..., length, heads, head size\]",
    ),
    "batch axes": ({"query": zeros(6, 4, 8)}, r"key has batch size \(2,\), but query has \(\)"),
    "no heads": (
        {"key": zeros(2, 5, 0, 8), "value": zeros(2, 5, 0, 8)},
        "key's number of heads is 0; it must be at least 1",
    ),
    "integer query": ({"query": zeros(2, 6, 4, 8, dtype=jnp.int32)}, "query has dtype int32"),
    "mixed dtypes": (
        {"key": zeros(2, 5, 2, 8, dtype=jnp.bfloat16)},
        "key has dtype bfloat16, but query has float32",
    ),
    "value shape": (
        {"value": zeros(2, 4, 2, 8)},
        r"key has shape \(2, 5, 2, 8\), but value has \(2, 4, 2, 8\)",
    ),
    "batch": ({"query": zeros(3, 6, 4, 8)}, "key has batch size 2, but query has 3"),
    "head size": ({"query": zeros(2, 6, 4, 16)}, "key has head size 8, but query has 16"),
    "heads": ({"query": zeros(2, 6, 3, 8)}, "key has 2 heads, which does not divide query's 3"),
    "mask to be added": ({"mask": zeros(2, 1, 6, 5) - 0.5}, "mask holds -0.5.* is a bias"),
    "mask shape": (
        {"mask": zeros(2, 1, 5, 6, dtype=bool)},
        r"mask has shape \(2, 1, 5, 6\); it must broadcast to \(2, 4, 6, 5\)",
    ),
    "bias shape": (
        {"bias": zeros(5, 6)},
        r"bias has shape \(5, 6\); it must broadcast to \(2, 4, 6, 5\)",
    ),
    "bias dtype": ({"bias": zeros(1, 1, 6, 5, dtype=jnp.int32)}, "bias has dtype int32"),
    "positions shape": (
        {"query_positions": jnp.arange(5)},
        r"query_positions has shape \(5,\); it must be \[6\] or \[1 or 2, 6\]",
    ),
    "positions dtype": ({"key_positions": zeros(5)}, "key_positions has dtype float32"),
    "one segment": ({"query_segment_ids": zeros(2, 6, dtype=jnp.int32)}, "6 queries and 5 keys"),
    "other segment": (
        {"key_segment_ids": zeros(2, 5, dtype=jnp.int32)},
        "without query_segment_ids",
    ),
    "window": ({"local_window_size": (-1, 0)}, r"local_window_size is \(-1, 0\)"),
    "scale": ({"scale": zeros(4)}, r"scale has shape \(4,\)"),
    "an encoding as bias": ({"bias": RoPE()}, "bias is RoPE"),
    "soft cap": ({"logits_soft_cap": 0.0}, "logits_soft_cap is 0.0; it must be above 0"),
    "sinks": ({"sinks": zeros(3)}, r"sinks has shape \(3,\); it must be \[4\]"),
    "lengths": ({"query_seq_lengths": jnp.array([1, 7])}, "query_seq_lengths is .* from 0 to 6"),
    "dropout rate": ({"dropout_rate": 1.5}, "dropout_rate is 1.5; it must be from 0 to 1"),
    "dropout without a key": (
        {"dropout_rate": 0.5},
        "dropout_rng is None; it must be a random key",
    ),
    "flag": ({"is_causal": "False"}, "is_causal is 'False'; it must be True or False"),
    "dtype": ({"dtype": "int8"}, "dtype is 'int8'"),
    "precision": ({"precision": "best"}, "precision is 'best'"),
    "implementation": ({"implementation": "flash"}, "implementation is 'flash'"),
    "P < 2": (
        {"bias": ContextualBias(zeros(1, 8)), "is_causal": True},
        "table has 1 positions; P must be at least 2",
    ),
    "table size": (
        {"bias": ContextualBias(zeros(3, 4)), "is_causal": True},
        r"table has shape \(3, 4\)",
    ),
    "table heads": (
        {"bias": ContextualBias(zeros(3, 3, 8)), "is_causal": True},
        r"table has shape \(3, 3, 8\)",
    ),
    "gate key": (
        {"bias": ContextualBias(TABLE, zeros(2, 6, 2, 8)), "is_causal": True},
        r"gate_key has shape \(2, 6, 2, 8\)",
    ),
    "gate bias": (
        {"bias": ContextualBias(TABLE, None, zeros(3)), "is_causal": True},
        r"gate_bias has shape \(3,\); it must be \[\] or \[4\]",
    ),
    "direction": (
        {"bias": ContextualBias(TABLE, direction="left"), "is_causal": True},
        "direction is 'left'",
    ),
    "a text for an array": (
        {"bias": ContextualBias(TABLE, gate_bias="-2"), "is_causal": True},
        "ContextualBias.gate_bias is '-2'; it must be an array",
    ),
    "an integer for a flag": (
        {"bias": RelativeBias(linear, jnp.ones(4), distance_only=0)},
        "RelativeBias.distance_only is 0; it must be True or False",
    ),
    "no function": ({"bias": RelativeBias("alibi")}, "RelativeBias.function is 'alibi'"),
    "other parameters": ({"bias": RelativeBias(linear, "4")}, "RelativeBias.params is '4'"),
    "no parts": ({"bias": BiasSum(())}, r"BiasSum.parts is \(\); it must be a tuple"),
    "a list of parts": ({"bias": BiasSum([3])}, r"BiasSum.parts is \[3\]; it must be a tuple"),
    "a part of a part": (
        {"bias": BiasSum((ScaledBias(3, 1.0),))},
        "ScaledBias.bias is 3; it must be an instance of Bias",
    ),
    "a key for dropout": ({"dropout_rng": 3}, "dropout_rng is 3; it must be a random key"),
    "a module": ({"module": 3}, "module is 3; it must be a Flax module"),
    "bidirectional": (
        {"bias": ContextualBias(TABLE)},
        'needs is_causal=True.*direction="backward"',
    ),
    "relative heads": (
        {"bias": RelativeBias(linear, jnp.ones(3))},
        "must give .* N = 4 query heads",
    ),
    "relative positions": (
        {"bias": RelativeBias(linear, jnp.ones(4), jnp.arange(5)[None])},
        r"RelativeBias.query_positions has shape \(1, 5\); it must be \[1 or 2, 6\]",
    ),
}


@pytest.mark.parametrize("arguments, words", WRONG.values(), ids=WRONG)
def test_wrong_argument(arguments, words):
    with pytest.raises(ValueError, match=words):
        dot_product_attention(**(GOOD | arguments))
