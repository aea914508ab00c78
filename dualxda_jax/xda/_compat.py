"""Everything that the walk needs of jax's internals, in one place.

`jax.extend.core` comes without a promise of compatibility; the tests run on the oldest and the newest supported jax.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Var",
    "bind",
    "exact_products",
    "inner_jaxpr",
    "name_stack",
    "place",
    "trace",
]

# A call-like primitive computes what its inner jaxpr computes; the value is the parameter that holds that jaxpr.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}


def trace(fn: Callable[..., Any], *args: Any) -> tuple[ClosedJaxpr, Any]:
    """The jaxpr of fn(*args) and the tree of its outputs."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    return closed, jax.tree.structure(shapes)


def inner_jaxpr(equation: JaxprEqn) -> tuple[Jaxpr, Sequence[Any]] | None:
    """The jaxpr and constants of a call-like equation, or None for any other."""
    key = _CALLS.get(equation.primitive.name)
    if key is None or key not in equation.params:
        return None
    inner = equation.params[key]
    return (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())


def bind(equation: JaxprEqn, values: Sequence[Any]) -> tuple[Any, ...]:
    """Evaluate one equation on values."""
    got = equation.primitive.get_bind_params(equation.params)
    # A pair (functions, parameters) before jax 0.9.2, the parameters alone since.
    functions, params = got if isinstance(got, tuple) else ((), got)
    result = equation.primitive.bind(*functions, *values, **params)
    return tuple(result) if equation.primitive.multiple_results else (result,)


def name_stack(equation: JaxprEqn) -> str:
    """The module path under which an equation was traced, as "CNN/Conv_0"; empty outside of any module."""
    return str(getattr(equation.source_info, "name_stack", ""))


def place(equations: Sequence[JaxprEqn]) -> str:
    """Where in the model an operation comes from: module path and line of source, as far as known.

    Args:
        equations: the call-like equations around it, outermost first, and its own.
    """
    parts = ["/".join(n for n in map(name_stack, equations) if n)]
    try:
        from jax._src import source_info_util

        lines = [source_info_util.summarize(e.source_info) for e in equations]
        # The innermost that is known: a jaxpr taken from a cache has forgotten its lines.
        parts.extend([line for line in lines if line and not line.startswith("<unknown>")][-1:])
    except (ImportError, AttributeError):  # the line is a convenience: a jax that moved it loses it, nothing else
        pass
    return ", ".join(p for p in parts if p) or "unknown place"


def exact_products(equation: JaxprEqn) -> bool:
    """Whether a linear equation is computed in full precision as it stands: GPUs and TPUs round their operands."""
    precision = equation.params.get("precision")
    pair = precision if isinstance(precision, tuple) else (precision, precision)
    return jax.default_backend() == "cpu" or all(p == jax.lax.Precision.HIGHEST for p in pair)
