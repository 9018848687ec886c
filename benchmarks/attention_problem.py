"""The problems of benchmarks/attention.py: sizes, data, and how much of it counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["SUITES", "Problem", "Settings", "arrays_of", "gate_bias", "problems", "unsaturated"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the problem and what to measure."""

    suite: str = "cpu"
    """Defaults for what is not named: "cpu" or "gpu"."""
    lengths: tuple[int, ...] = (4096,)
    """Sequence lengths T."""
    batch: int = 1
    heads: int = 4
    kv_heads: int = 4
    head_size: int = 64
    shapes: tuple[str, ...] = ()
    """Instead of one kind of heads several: heads/kv_heads/head_size, such as 32/8/128."""
    positions: int = 64
    """P, rows of the table."""
    gate: tuple[float, ...] = (0.5,)
    """Values of a gate at a logit of 0."""
    dtype: str = "float32"
    rounds: int = 5
    """How often each contender runs; the median counts."""
    contenders: tuple[str, ...] = ()
    """Which to run; none means all that can run here."""
    memory: bool = True
    """Measure peak memory too, in a process for each contender."""
    budget: float | None = None
    """Seconds for everything; what is left out is named. Run again, it goes on with the output."""
    base: str = "cope_xla"
    """The contender that ratios are to."""
    output: str | None = None
    """Write everything to this JSON file."""
    docs: str | None = None
    """Measure nothing: put the results of this JSON file into docs/performance.md."""
    memory_of: str | None = None
    """Internal: run one contender once and print its peak memory."""


SUITES = {
    "cpu": {},
    "gpu": {
        "lengths": (8192, 2048, 16384, 32768),
        "shapes": ("16/16/128", "32/32/64", "32/8/128"),
        "gate": (0.5, 0.1, 0.02),
        "dtype": "bfloat16",
        "budget": 500.0,
        "base": "plain_cudnn",
    },
}


def with_suite(settings: Settings) -> Settings:
    """The suite's values for all fields that stand at their defaults."""
    if settings.suite not in SUITES:
        raise SystemExit(f"unknown suite {settings.suite!r}; known are {', '.join(SUITES)}")
    preset = SUITES[settings.suite]
    fields = {field.name: field.default for field in dataclasses.fields(Settings)}
    own = {name for name, default in fields.items() if getattr(settings, name) != default}
    return dataclasses.replace(settings, **{k: v for k, v in preset.items() if k not in own})


@dataclasses.dataclass(frozen=True)
class Problem:
    """One attention: sizes, and what its numbers are."""

    length: int
    batch: int
    heads: int
    kv_heads: int
    head_size: int
    positions: int
    dtype: str

    @property
    def name(self) -> str:
        """For people and for JSON."""
        return f"T {self.length}, N {self.heads}/{self.kv_heads}, H {self.head_size}, {self.dtype}"


def problems(settings: Settings) -> list[Problem]:
    """All lengths of a shape one after another, the first length of every shape first."""
    shapes = settings.shapes or ("/".join(map(str, _heads(settings))),)
    found = []
    for length in settings.lengths:
        for shape in shapes:
            numbers = shape.split("/")
            if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
                raise SystemExit(f"a shape looks like 32/8/128, not {shape!r}")
            sizes = map(int, numbers)
            found.append(
                Problem(length, settings.batch, *sizes, settings.positions, settings.dtype)
            )
    return found


def _heads(settings: Settings) -> tuple[int, int, int]:
    return settings.heads, settings.kv_heads, settings.head_size


def arrays_of(problem: Problem) -> dict[str, np.ndarray]:
    """Query, key, value and table, in float32.

    The table changes little from row to row: a count next to a whole number may take the slope of
    either side, and no two computations agree on it.
    """
    random = np.random.default_rng(0)
    shape = (problem.batch, problem.length, problem.heads, problem.head_size)
    kv_shape = (problem.batch, problem.length, problem.kv_heads, problem.head_size)
    made = {"query": shape, "key": kv_shape, "value": kv_shape, "table": (1, problem.head_size)}
    arrays = {name: random.standard_normal(size, np.float32) for name, size in made.items()}
    wave = np.cos(np.pi * np.linspace(0.0, 1.0, problem.positions, dtype=np.float32))
    arrays["table"] = problem.head_size**-0.5 * arrays["table"] * wave[:, None]
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def gate_bias(gate: float) -> float:
    """The logit of a gate."""
    return float(np.log(gate / (1 - gate)))


def unsaturated(problem: Problem, arrays: dict, gate: float, size: int) -> float:
    """The share of visible blocks (size x size) with a query that has still to count on its right.

    These need gates, counts and look-ups; the others are attention without an encoding.
    """
    padding = ((0, 0), (0, -problem.length % size), (0, 0), (0, 0))
    query, key = (jnp.asarray(np.pad(arrays[name], padding)) for name in ("query", "key"))
    blocks, groups = query.shape[1] // size, problem.heads // problem.kv_heads
    bias, scale = gate_bias(gate), problem.head_size**-0.5

    @jax.jit
    def needed(batch, head, block):
        """Blocks of keys that the queries of a block need; the counts on the right of each."""
        rows = jax.lax.dynamic_slice_in_dim(query[batch, :, head], block * size, size)
        logits = rows @ key[batch, :, head // groups].T * scale + bias
        index = block * size + jnp.arange(size)
        seen = jnp.arange(key.shape[1])[None, :] <= index[:, None]
        gates = jnp.where(seen, jax.nn.sigmoid(logits), 0.0)
        sums = jnp.sum(gates.reshape(size, blocks, size), axis=2)
        right = jnp.flip(jnp.cumsum(jnp.flip(sums, 1), 1), 1) - sums
        counting = (right < problem.positions - 1) & (index < problem.length)[:, None]
        visible = jnp.arange(blocks) <= block
        return jnp.sum(jnp.any(counting, axis=0) & visible)

    def of_head(place):
        batch, head = place // problem.heads, place % problem.heads
        return jnp.sum(jax.lax.map(lambda block: needed(batch, head, block), jnp.arange(blocks)))

    found = jax.jit(lambda: jax.lax.map(of_head, jnp.arange(problem.batch * problem.heads)))()
    whole = problem.batch * problem.heads * blocks * (blocks + 1) // 2
    return float(np.sum(np.asarray(found, np.int64)) / whole)
