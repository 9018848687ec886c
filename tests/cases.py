"""Attention problems that the tests of all implementations share."""

import dataclasses

import jax
import jax.numpy as jnp

from posjax import (
    BiasSum,
    ContextualBias,
    ForgettingBias,
    RelativeBias,
    StickBreakingBias,
    dot_product_attention,
)

__all__ = [
    "BIASES",
    "Case",
    "arrays",
    "dense_narrow",
    "problem",
    "run",
    "run_with_gradients",
    "with_gradients",
]


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: sizes, kind of bias and restrictions."""

    bias: str = "none"
    batch: int = 2
    queries: int = 33
    keys: int = 33
    heads: int = 4
    kv_heads: int = 2
    size: int = 8
    positions: int = 6
    causal: bool = True
    window: tuple[int, int] | None = None
    segments: bool = False
    offset: bool = False
    mask: bool = False
    dtype: str = "float32"

    @property
    def settings(self) -> dict:
        """The keyword arguments of the attention call."""
        settings = {"is_causal": self.causal, "local_window_size": self.window}
        if self.segments:
            settings["query_segment_ids"] = _segments(self.queries, self.batch)
            settings["key_segment_ids"] = _segments(self.keys, self.batch)
        if self.offset:
            settings["query_positions"] = jnp.arange(self.queries) + self.keys - self.queries
        if self.mask:
            shape = (self.batch, 1, self.queries, self.keys)
            # Query 0 sees nothing; every other pair is allowed with probability 0.7.
            mask = jax.random.bernoulli(jax.random.key(9), 0.7, shape)
            settings["mask"] = mask.at[:, :, 0].set(False)
        return settings


def _segments(length: int, batch: int):
    """Segments of 7 tokens; the second row of a batch is shifted."""
    rows = jnp.arange(length)[None, :] + jnp.arange(batch)[:, None] * 3
    return rows // 7


def linear(slopes, query_positions, key_positions):
    """-slope times the distance."""
    distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
    return -slopes[None, :, None, None] * jnp.abs(distance).astype(jnp.float32)


def _contextual(params, case, **settings):
    direction = None if case.causal else "backward"
    return ContextualBias(**params, direction=direction, **settings)


# kind -> (case, key) -> trained arrays, and (arrays, case) -> description
BIASES = {
    "none": (lambda case, key: {}, lambda params, case: None),
    "array": (
        lambda case, key: {"a": jax.random.normal(key, (1, case.heads, case.queries, case.keys))},
        lambda params, case: params["a"],
    ),
    "relative": (
        lambda case, key: {"slopes": jnp.linspace(0.1, 0.5, case.heads)},
        lambda params, case: RelativeBias(linear, params["slopes"], distance_only=True),
    ),
    "cope": (
        lambda case, key: {
            "table": jax.random.normal(key, (case.positions, case.size)),
            "gate_bias": jnp.float32(-0.5),
        },
        _contextual,
    ),
    "cope per head": (
        lambda case, key: {
            "table": jax.random.normal(key, (case.heads, case.positions, case.size)),
            "gate_key": jax.random.normal(key, (case.batch, case.keys, case.kv_heads, case.size)),
            "gate_bias": jnp.linspace(-1.0, 1.0, case.heads),
        },
        lambda params, case: _contextual(params, case, bias_scale=0.3, gate_scale=0.7),
    ),
    "forgetting": (
        lambda case, key: {"a": jax.random.normal(key, (case.batch, case.keys, case.heads))},
        lambda params, case: ForgettingBias(jax.nn.log_sigmoid(params["a"])),
    ),
    "stick-breaking": (lambda case, key: {}, lambda params, case: StickBreakingBias()),
    "forgetting + cope": (
        lambda case, key: {
            "table": jax.random.normal(key, (case.positions, case.size)),
            "a": jax.random.normal(key, (case.batch, case.keys, case.heads)),
        },
        lambda params, case: BiasSum(
            (
                ForgettingBias(jax.nn.log_sigmoid(params["a"])),
                _contextual({"table": params["table"]}, case),
            )
        ),
    ),
    "cope + relative": (
        lambda case, key: {
            "table": jax.random.normal(key, (case.positions, case.size)),
            "slopes": jnp.linspace(0.1, 0.5, case.heads),
        },
        lambda params, case: BiasSum(
            (
                _contextual({"table": params["table"]}, case),
                RelativeBias(linear, params["slopes"], distance_only=True),
            )
        ),
    ),
}


def arrays(case: Case, seed: int = 0) -> tuple[dict, dict]:
    """Query, key and value, and the trained arrays of the bias."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = {
        "query": (case.batch, case.queries, case.heads, case.size),
        "key": (case.batch, case.keys, case.kv_heads, case.size),
        "value": (case.batch, case.keys, case.kv_heads, case.size),
    }
    made = {
        n: jax.random.normal(k, s).astype(case.dtype)
        for k, (n, s) in zip(keys, shapes.items(), strict=False)
    }
    return made, BIASES[case.bias][0](case, keys[3])


def problem(case: Case) -> tuple[dict, dict]:
    """Inputs and trained arrays, with tables whose slope changes little from row to row.

    A count next to a whole number may be rounded to either side, and takes the slope of that side:
    right either way, but no two computations agree on it.
    """
    inputs, params = arrays(case)
    if "table" in params:
        # Half a wave over the whole table: no kink where a count reaches its end, either.
        wave = jnp.cos(jnp.pi * jnp.linspace(0.0, 1.0, case.positions))
        first = params["table"][..., :1, :]
        wave = wave.reshape(*[1] * (first.ndim - 2), -1, 1)
        params["table"] = case.size**-0.5 * first * wave
    return inputs, params


def run(case: Case, inputs: dict, params: dict, implementation: str, **settings):
    """The attention output."""
    bias = BIASES[case.bias][1](params, case)
    settings = case.settings | settings
    return dot_product_attention(**inputs, bias=bias, implementation=implementation, **settings)


def with_gradients(case: Case, implementation: str):
    """The function of inputs and parameters that is `run_with_gradients`, compiled once."""

    def weighted(inputs, params):
        output = run(case, inputs, params, implementation).astype(jnp.float32)
        weights = jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape)
        return jnp.sum(output * weights), output

    gradient = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))

    def compute(inputs, params):
        (_, output), grads = gradient(inputs, params)
        return output, grads

    return compute


def run_with_gradients(case: Case, inputs: dict, params: dict, implementation: str):
    """The output in float32, and gradients of a weighting of it by every input and parameter."""
    return with_gradients(case, implementation)(inputs, params)


def dense_narrow(case, inputs, params):
    """Dense attention with products in the inputs' type and float32 softmax, gates and counts."""

    def weighted(inputs, params):
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        groups = case.heads // case.kv_heads
        repeated = jnp.repeat(key, groups, axis=2)
        allowed = jnp.tril(jnp.ones((case.queries, case.keys), bool))[None, None]
        logits = (
            jnp.einsum("btnh,bsnh->bnts", query, repeated).astype(jnp.float32) * case.size**-0.5
        )
        bias = BIASES[case.bias][1](params, case)
        if bias is not None:
            index = jnp.arange(case.queries)[None]
            context = {
                "scale": case.size**-0.5,
                "allowed": allowed,
                "query_positions": index,
                "key_positions": index,
            }
            logits += bias.dense(query, key, **context)
        weights = jax.nn.softmax(jnp.where(allowed, logits, -1e30), axis=-1).astype(case.dtype)
        output = jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(value, groups, axis=2)).astype(
            jnp.float32
        )
        factors = jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape)
        return jnp.sum(output * factors), output

    gradient = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))
    (_, output), grads = gradient(inputs, params)
    return output, grads
