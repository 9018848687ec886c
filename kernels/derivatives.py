"""Gradients by code of their own, and what else of differentiation works with them.

| derivative                         | by                                                        |
|------------------------------------|-----------------------------------------------------------|
| `grad`, `vjp`                      | a backward pass that recomputes                           |
| `jvp` of `grad` (Hessian products) | forward mode through both passes                          |
| `jvp`, `grad` of `grad`            | refused, with what to use instead                         |

Pallas kernels have no derivative but the first; more is refused there, too.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from posjax.types import Array, PyTree

__all__ = [
    "NO_FORWARD_MODE",
    "NO_SECOND_DERIVATIVE",
    "NO_SECOND_REVERSE",
    "resolved",
    "with_gradients",
]

_INSTEAD = (
    'use implementation="reference", or jax.jvp of jax.grad in "xla" for products with a Hessian.'
)
NO_FORWARD_MODE = (
    "this implementation of attention has no forward-mode derivative (jax.jvp, jax.jacfwd); "
    + _INSTEAD
)
NO_SECOND_REVERSE = (
    "this implementation of attention cannot be differentiated backwards twice (jax.grad of "
    "jax.grad); " + _INSTEAD
)
NO_SECOND_DERIVATIVE = (
    "Pallas kernels of attention have no second derivative; "
    'use implementation="xla" for jax.jvp of jax.grad, or implementation="reference".'
)
_in_forward_mode: contextvars.ContextVar[bool] = contextvars.ContextVar("mode", default=False)


def with_gradients(
    forward: Callable[..., Any], backward: Callable[..., Any], *, is_pallas: bool = False
) -> Callable:
    """A function `attention(static, arrays, fixed)` that is differentiated by `backward`.

    Args:
        forward: maps the same arguments to the result, and to what `backward` needs of it.
        backward: maps (static, arrays, fixed, what it needs, cotangent of the result) to the
            gradients of `arrays`; `fixed` has none.
        is_pallas: whether they call Pallas kernels, which have no second derivative.
    """
    forward, backward = (_not_transposable(x, is_pallas) for x in (forward, backward))

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attention(static: Any, arrays: PyTree, fixed: PyTree) -> PyTree:
        return forward(static, arrays, fixed)[0]

    def attention_fwd(static: Any, arrays: PyTree, fixed: PyTree):
        result, needed = forward(static, arrays, fixed)
        return result, (arrays, fixed, needed)

    def attention_bwd(static: Any, kept: tuple, cotangent: PyTree):
        return backward(static, *kept, cotangent), None

    attention.defvjp(attention_fwd, attention_bwd)

    def guarded(static: Any, arrays: PyTree, fixed: PyTree) -> PyTree:
        return attention(static, jax.tree.map(_without_forward_mode, arrays), fixed)

    return guarded


def resolved(function: Callable[..., Any], *arguments: PyTree) -> Any:
    """`function(*arguments)`; in forward mode with none of its `jax.custom_vjp` left.

    These have no forward-mode derivative. Differentiated backwards at once, they are replaced by
    their forward passes, which are ordinary code.
    """
    if not _in_forward_mode.get():
        return function(*arguments)
    return jax.vjp(function, *arguments)[0]


def _not_transposable(function: Callable[..., Any], is_pallas: bool) -> Callable[..., Any]:
    """`function(static, *trees)`, with a message of ours if it is differentiated backwards."""

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def marked(static: Any, *trees: PyTree) -> PyTree:
        return function(static, *trees)

    @marked.defjvp
    def _(static: Any, primals: tuple, tangents: tuple):
        if is_pallas:
            raise NotImplementedError(NO_SECOND_DERIVATIVE)
        with _forward_mode():
            outputs = jax.jvp(functools.partial(function, static), primals, tangents)
        return outputs[0], jax.tree.map(_without_transpose, outputs[1])

    return marked


@contextlib.contextmanager
def _forward_mode() -> Iterator[None]:
    token = _in_forward_mode.set(True)
    try:
        yield
    finally:
        _in_forward_mode.reset(token)


@jax.custom_jvp
def _without_forward_mode(x: Array) -> Array:
    """`x`, whose tangent may be transposed, but not computed."""
    return x


@_without_forward_mode.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (primal,), (tangent,) = primals, tangents
    # Many tangents of one value: `jax.jacfwd`, refused at once.
    if hasattr(tangent, "batch_dim") and not hasattr(primal, "batch_dim"):
        raise NotImplementedError(NO_FORWARD_MODE)
    return primal, _only_backwards.bind(tangent)


def _without_transpose(tangent: Array) -> Array:
    """`tangent`, which may be computed, but not transposed."""
    return tangent if tangent.dtype == jax.dtypes.float0 else _only_forwards.bind(tangent)


def _raising(message: str) -> Callable[..., Any]:
    def refuse(*arguments: Any, **settings: Any) -> Any:
        raise NotImplementedError(message)

    return refuse


def _identity(name: str, *, evaluated: Callable, lowered: Callable, transposed: Callable) -> Any:
    """A linear primitive that gives what it takes, as far as it is not refused."""
    primitive = Primitive(name)
    primitive.def_impl(evaluated)
    primitive.def_abstract_eval(lambda x: x)
    ad.deflinear2(primitive, transposed)
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, lowered)
    return primitive


_only_backwards = _identity(
    "only_backwards",
    evaluated=_raising(NO_FORWARD_MODE),
    lowered=_raising(NO_FORWARD_MODE),
    transposed=lambda cotangent, _: [cotangent],
)
_only_forwards = _identity(
    "only_forwards",
    evaluated=lambda x: x,
    lowered=lambda _, x: [x],
    transposed=_raising(NO_SECOND_REVERSE),
)
