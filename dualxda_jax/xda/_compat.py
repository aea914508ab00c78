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
    "bodies",
    "carries",
    "decisions",
    "exact_products",
    "inner_jaxpr",
    "name_stack",
    "place",
    "rebind_bodies",
    "rematerialised",
    "rematerialising",
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

_REMAT = frozenset(["remat", "remat2", "checkpoint"])


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


def rematerialising(equations: Sequence[JaxprEqn]) -> JaxprEqn | None:
    """The first of some equations that asks for rematerialisation (jax.checkpoint), or None."""
    return next((e for e in equations if e.primitive.name in _REMAT), None)


def rematerialised(equation: JaxprEqn, fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that keeps for its derivative what a rematerialising equation asks for, and computes the rest anew."""
    return jax.checkpoint(fn, prevent_cse=equation.params["prevent_cse"], policy=equation.params["policy"])


def bodies(equation: JaxprEqn) -> tuple[ClosedJaxpr, ...]:
    """The body of a scan or shard_map, the branches of a cond or switch; empty for any other equation."""
    name, params = equation.primitive.name, equation.params
    if name in ("scan", "shard_map"):
        return (_closed(params["jaxpr"]),)
    return tuple(params["branches"]) if name == "cond" else ()


def _closed(inner: Any) -> ClosedJaxpr:
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())


def _loop(params: dict[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are the same in every round, and how many it carries on."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # jax 0.12 says it by the shape of a tree: (constants, carry, slices).
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def decisions(equation: JaxprEqn) -> int:
    """How many leading operands do not go to the bodies: one, the number of the branch, for a cond."""
    return 1 if equation.primitive.name == "cond" else 0


def carries(equation: JaxprEqn) -> tuple[tuple[int, int], ...]:
    """(place among the outputs, place among the inputs) in the body of a scan of everything that it carries on."""
    if equation.primitive.name != "scan":
        return ()
    first, carried = _loop(equation.params)
    return tuple((i, first + i) for i in range(carried))


def rebind_bodies(
    equation: JaxprEqn,
    functions: Sequence[Callable[..., Sequence[Any]]],
    values: Sequence[Any],
    *,
    unroll: bool = False,
) -> tuple[Any, ...]:
    """A scan, cond or shard_map with other functions in place of its bodies.

    A scan whose body asked for rematerialisation gets it for the whole of the new body.

    Args:
        equation: the scan, cond or shard_map.
        functions: one for each body; it is given what the body is given and gives back what the body gives.
        values: of the equation's operands.
        unroll: run a loop round by round, in the trace: functions are then given the round as well.
    """
    if equation.primitive.name == "cond":
        return tuple(jax.lax.switch(values[0], [lambda *v, f=f: tuple(f(*v)) for f in functions], *values[1:]))
    p = equation.params
    if equation.primitive.name == "shard_map":
        mapped = jax.shard_map(
            lambda *v: tuple(functions[0](*v)),
            mesh=p["mesh"],
            in_specs=tuple(p["in_specs"]),
            out_specs=tuple(p["out_specs"]),
            axis_names=p["newly_manual_axes"] if "newly_manual_axes" in p else p["manual_axes"],
            check_vma=p["check_vma"],
        )
        return tuple(mapped(*values))
    consts, carried = _loop(p)
    first = consts + carried
    fixed, carry, slices = values[:consts], tuple(values[consts:first]), tuple(values[first:])

    def body(carry: tuple[Any, ...], slices: tuple[Any, ...], *round_: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        found = tuple(functions[0](*fixed, *carry, *slices, *round_))
        return found[:carried], found[carried:]

    if not unroll:
        if rematerialising(_closed(p["jaxpr"]).jaxpr.eqns) is not None:
            body = jax.checkpoint(body, prevent_cse=False)
        carry, stacked = jax.lax.scan(body, carry, slices, length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
        return (*carry, *stacked)
    rounds = range(p["length"])
    rows = {}
    for r in reversed(rounds) if p["reverse"] else rounds:
        carry, rows[r] = body(carry, tuple(s[r] for s in slices), r)
    return (*carry, *(jax.numpy.stack(column) for column in zip(*(rows[r] for r in rounds), strict=True)))


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
