"""The attentions that benchmarks/attention.py compares."""

import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import attention_torch
import jax
import jax.numpy as jnp
from attention_problem import Problem, Settings, gate_bias

import posjax.problem
from posjax import ContextualBias, dot_product_attention
from posjax.kernels import gpu

__all__ = ["CONTENDERS", "PASSES", "PLAIN_REFERENCE", "Contender", "Passes", "available"]

PASSES = ("forward", "forward and backward")


class Passes(NamedTuple):
    """How to run one contender on one problem.

    `launch` begins a pass at a gate level and returns what `wait` waits for; `prepare` compiles, in
    any thread, and what a compiler says is raised by `launch`.
    """

    launch: dict[tuple[str, float], Callable[[], Any]]
    wait: Callable[[Any], None]
    numbers: Callable[[Any], Any]
    prepare: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Contender:
    """One attention; `missing` says why it cannot run here, if it cannot.

    `make` takes a problem, its arrays and the values of a gate. `checked_in`: the type in which
    results are compared, if not that of the problem.
    """

    title: str
    make: Callable[[Problem, dict, tuple[float, ...]], Passes]
    missing: Callable[[Problem], str | None] = lambda problem: None
    contextual: bool = False
    checked_in: str | None = None


def _jax(attend: Callable, problem: Problem, arrays: dict, gates: tuple[float, ...]) -> Passes:
    """`attend` takes query, key, value, and a bias."""
    kinds = {name: problem.dtype if name != "table" else "float32" for name in arrays}
    inputs = {name: jnp.asarray(x, kinds[name]) for name, x in arrays.items()}
    logits = {gate: jnp.float32(gate_bias(gate)) for gate in gates}

    def run(inputs, logit):
        described = ContextualBias(inputs["table"], gate_bias=logit)
        return attend(inputs["query"], inputs["key"], inputs["value"], described)

    loss = lambda *x: jnp.sum(run(*x).astype(jnp.float32) ** 2)  # noqa: E731
    functions = dict(zip(PASSES, (jax.jit(run), jax.jit(jax.grad(loss))), strict=True))
    programs = {}

    def prepare():
        for step, function in functions.items():
            try:
                programs[step] = function.lower(inputs, logits[gates[0]]).compile()
            except Exception as error:  # a compiler's; the other pass may run
                programs[step] = error

    def launch(step, gate):
        if isinstance(programs[step], Exception):
            raise programs[step]
        return programs[step](inputs, logits[gate])

    every = itertools.product(PASSES, gates)
    launch = {place: functools.partial(launch, *place) for place in every}
    return Passes(launch, jax.block_until_ready, lambda x: jax.tree.map(_number, x), prepare)


def _number(x: jax.Array):
    return jax.device_get(x.astype(jnp.float32))


def _ours(implementation: str | None, contextual: bool) -> Callable:
    def attend(query, key, value, bias):
        bias = bias if contextual else None
        settings = {"is_causal": True, "implementation": implementation}
        return dot_product_attention(query, key, value, bias, **settings)

    return functools.partial(_jax, attend)


def _cudnn(query, key, value, bias):
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")


def _tokamax(query, key, value, bias):
    import tokamax

    return tokamax.dot_product_attention(query, key, value, is_causal=True)


def _needs_hopper(problem: Problem, contextual: bool) -> str | None:
    """Why our kernels cannot run."""
    if jax.default_backend() != "gpu":
        return f"JAX runs on {jax.default_backend()}, and the kernels need a Hopper GPU"
    shape = (problem.batch, problem.length, problem.heads, problem.head_size)
    query = jax.ShapeDtypeStruct(shape, problem.dtype)
    table = jax.ShapeDtypeStruct((problem.positions, problem.head_size), jnp.float32)
    bias = ContextualBias(table) if contextual else None
    call = posjax.problem.Problem.of(query, query, query, bias, is_causal=True)
    return gpu.refuses(call)


def _needs_cudnn(problem: Problem) -> str | None:
    if jax.default_backend() != "gpu":
        return f"cuDNN needs a GPU, and JAX runs on {jax.default_backend()}"
    if problem.dtype not in ("bfloat16", "float16"):
        return f"cuDNN's attention takes no {problem.dtype}"
    return None


def _needs_tokamax(problem: Problem) -> str | None:
    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed"
    return None if jax.default_backend() == "gpu" else "tokamax's kernels need a GPU or TPU"


def _torch(name: str, title: str, contextual: bool) -> Contender:
    def make(problem, arrays, gates):
        logits = {gate: gate_bias(gate) for gate in gates}
        return Passes(**attention_torch.passes(name, PASSES, problem, arrays, logits))

    missing = functools.partial(attention_torch.missing, name)
    # Its counts are in the inputs' type, where the formula cannot be told from a wrong one.
    checked_in = "float32" if contextual else None
    return Contender(title, make, missing, contextual, checked_in)


_HOPPER = {flag: functools.partial(_needs_hopper, contextual=flag) for flag in (False, True)}
CONTENDERS = {
    "plain": Contender("jax.nn attention, no encoding (dense)", _ours("jax", False)),
    "plain_cudnn": Contender("cuDNN, no encoding", functools.partial(_jax, _cudnn), _needs_cudnn),
    "plain_tokamax": Contender(
        "tokamax, no encoding", functools.partial(_jax, _tokamax), _needs_tokamax
    ),
    "plain_flex": _torch("flex", "PyTorch FlexAttention, no encoding", False),
    "plain_gpu": Contender("posjax GPU kernel, no encoding", _ours("gpu", False), _HOPPER[False]),
    "plain_xla": Contender("posjax blockwise, no encoding", _ours("xla", False)),
    "cope_gpu": Contender("posjax CoPE, GPU kernel", _ours("gpu", True), _HOPPER[True], True),
    "cope_reference": Contender("posjax CoPE, dense", _ours("reference", True), contextual=True),
    "cope_xla": Contender("posjax CoPE, blockwise", _ours("xla", True), contextual=True),
    "cope_torch": _torch("eager", "paper's CoPE, dense PyTorch", True),
    "cope_torch_compiled": _torch("compiled", "paper's CoPE, torch.compile", True),
}


# Not compared: what contenders without an encoding are checked against.
PLAIN_REFERENCE = Contender("posjax, dense, no encoding", _ours("reference", False))


def available(settings: Settings, problem: Problem) -> tuple[list[str], dict[str, str]]:
    """The contenders that were asked for and can run here; why the others cannot."""
    unknown = [name for name in settings.contenders if name not in CONTENDERS]
    if unknown:
        raise SystemExit(f"unknown contender {unknown[0]!r}; known are {', '.join(CONTENDERS)}")
    names = list(settings.contenders or CONTENDERS)
    reasons = {name: CONTENDERS[name].missing(problem) for name in names}
    missing = {name: reason for name, reason in reasons.items() if reason is not None}
    return [name for name in names if name not in missing], missing
