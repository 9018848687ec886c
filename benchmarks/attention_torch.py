"""PyTorch's contenders: the formula of the paper's Appendix B on [T, T] matrices, FlexAttention."""

import functools
import importlib.util
import shutil
from collections.abc import Callable

__all__ = ["missing", "passes"]


def missing(name: str, problem) -> str | None:
    """Why it cannot run here."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if name == "flex" and not torch.cuda.is_available():
        return "FlexAttention has gradients on GPUs only, and torch finds none"
    if name == "compiled" and not (torch.cuda.is_available() or shutil.which("c++")):
        return "torch.compile on a CPU needs a C++ compiler"
    return None


def passes(name: str, steps: tuple[str, str], problem, arrays: dict, logits: dict) -> dict:
    """What `attention_contenders.Passes` holds.

    Args:
        name: "eager", "compiled" or "flex".
        logits: of each value of a gate.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, problem.dtype)
    inputs = [
        torch.tensor(arrays[n], dtype=dtype, device=device).transpose(1, 2).contiguous()
        for n in ("query", "key", "value")
    ]
    if name == "flex":
        attend = _flex(problem, device)
    else:
        inputs.append(torch.tensor(arrays["table"], dtype=dtype, device=device))
        attend = _listing(problem, device)
    if name == "compiled":
        torch._dynamo.config.recompile_limit = 100  # one for each shape
        attend = torch.compile(attend, dynamic=False)
    trained = list(inputs)
    for x in trained:
        x.requires_grad_()

    # FlexAttention has no gates.
    offsets = {
        gate: [] if name == "flex" else [torch.tensor(logit, dtype=dtype, device=device)]
        for gate, logit in logits.items()
    }

    def forward(gate):
        with torch.no_grad():
            return attend(*inputs, *offsets[gate]).transpose(1, 2)

    def backward(gate):
        output = attend(*inputs, *offsets[gate])
        return torch.autograd.grad(output.float().square().sum(), trained)

    launch = {
        (step, gate): functools.partial(run, gate)
        for step, run in zip(steps, (forward, backward), strict=True)
        for gate in logits
    }
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return {"launch": launch, "wait": lambda result: wait(), "numbers": _numbers}


def _numbers(result):
    """The output, or gradients by name as JAX has them."""
    number = lambda x: x.detach().float().cpu().numpy()  # noqa: E731
    if not isinstance(result, tuple):
        return number(result)
    names = ("query", "key", "value", "table")
    found = [x.transpose(1, 2) if x.ndim == 4 else x for x in result]
    return {n: number(x) for n, x in zip(names, found, strict=False)}


def _listing(problem, device: str) -> Callable:
    """Appendix B with a bias of the gates; counts are in the inputs' type, as there."""
    import torch

    length, groups = problem.length, problem.heads // problem.kv_heads
    future = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)

    def attend(q, k, v, table, bias):
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        logits = q @ keys.transpose(-1, -2) * problem.head_size**-0.5
        logits = logits.masked_fill(future, float("-inf"))
        gates = torch.sigmoid(logits + bias)
        count = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=problem.positions - 1)
        lower, upper = count.floor().long(), count.ceil().long()
        z = q @ table.T
        fraction = count - lower
        logits = logits + z.gather(-1, upper) * fraction + z.gather(-1, lower) * (1 - fraction)
        return logits.softmax(-1) @ values

    return attend


def _flex(problem, device: str) -> Callable:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    causal = lambda batch, head, query, key: query >= key  # noqa: E731
    mask = create_block_mask(causal, None, None, problem.length, problem.length, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = problem.heads != problem.kv_heads
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=grouped)
