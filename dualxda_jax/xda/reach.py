"""What depends on what in a graph, and through which values relevance flows."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from dualxda_jax.xda import graph, refusals, tokens
from dualxda_jax.xda.graph import Atom, Equation, Graph, Value

# No relevance flows through these: they take whole numbers or decisions, or are the statistics by which a
# normalisation divides, which count as constants (Achtibat et al. 2024, AttnLRP, on LayerNorm).
# fmt: off
STOPS = frozenset([
    "stop_gradient", "rsqrt", "sign", "floor", "ceil", "round", "is_finite", "argmax", "argmin", "eq", "ne", "lt",
    "le", "gt", "ge", "and", "or", "not", "xor", "iota",
])
# fmt: on

Through = Callable[[Equation, set[Atom]], Iterable[Atom]]


def build(fn: Callable[..., Any], parameters: Sequence[Any], data: Any) -> Graph:
    """Trace fn(*parameters, data) into a graph.

    Args:
        fn: the function.
        parameters: its leading arguments, pytrees of arrays.
        data: its last argument, one array.

    Raises:
        NoRuleError: random numbers meet the data, samples of the batch meet each other, or data that are whole numbers
            are looked up nowhere.
    """
    traced = graph.trace(fn, parameters, data)
    producer, users = graph.wiring(traced.equations)
    reached: set[Atom] = {traced.inputs[-1]}
    forward(traced.equations, reached, _outputs)
    refusals.random(traced.equations, reached, forward)
    refusals.complex_numbers(traced.equations, reached)
    refusals.batch_statistics(fn, parameters, data, traced, reached)
    sources = tokens.sources(traced, reached, producer)
    carried: set[Atom] = set(sources)
    forward(traced.equations, carried, _carried_on)
    wanted: set[Atom] = {o for o in traced.outputs if isinstance(o, Value)}
    _backward(traced.equations, wanted, producer, reached)
    refusals.nothing_carried(traced, reached, carried)
    return Graph(
        traced.equations,
        traced.inputs,
        sources,
        traced.constants,
        traced.outputs,
        traced.out_tree,
        producer,
        users,
        traced.origin,
        frozenset(reached),
        frozenset(carried & wanted),
    )


def forward(equations: Sequence[Equation], found: set[Atom], through: Through) -> None:
    """Add to `found` what follows from it: through(equation, found) gives what an equation adds."""
    for equation in equations:
        if not equation.bodies:
            found.update(through(equation, found))
            continue
        grown = -1
        while grown < len(found):  # a carry can bring something new into the next round
            grown = len(found)
            for body in equation.bodies:
                found.update(v for a, v in zip(equation.operands, body.inputs, strict=True) if a in found)
                forward(body.equations, found, through)
            found.update(into for out, into in equation.feedback if out in found)
        for body in equation.bodies:
            found.update(v for v, o in zip(equation.outputs, body.outputs, strict=True) if o in found)
        if equation.inputs[0] in found and len(equation.operands) < len(equation.inputs):
            found.update(through(equation, found))  # which branch it is depends on it, and so does everything


def _outputs(equation: Equation, found: set[Atom]) -> Iterable[Atom]:
    return equation.outputs if found.intersection(equation.inputs) else ()


def _carried_on(equation: Equation, found: set[Atom]) -> Iterable[Atom]:
    return _carried(equation) if found.intersection(equation.inputs) else ()


def _carried(equation: Equation) -> tuple[Value, ...]:
    if equation.name in STOPS:
        return ()
    return tuple(v for v in equation.outputs if jnp.issubdtype(v.aval.dtype, jnp.inexact))


def _backward(
    equations: Sequence[Equation], found: set[Atom], producer: dict[Value, Equation], reached: set[Atom]
) -> None:
    for equation in reversed(equations):
        if equation.bodies:
            grown = -1
            while grown < len(found):
                grown = len(found)
                for body in equation.bodies:
                    found.update(o for v, o in zip(equation.outputs, body.outputs, strict=True) if v in found)
                    _backward(body.equations, found, producer, reached)
                found.update(out for out, into in equation.feedback if into in found)
            for body in equation.bodies:
                found.update(a for a, v in zip(equation.operands, body.inputs, strict=True) if v in found)
        elif found.intersection(_carried(equation)):
            inputs = equation.inputs
            if equation.name == "div" and inputs[0] in reached and not is_softmax(equation, producer):
                # A norm or a standard deviation: a statistic, as above.
                inputs = inputs[:1]
            found.update(inputs)


def is_softmax(equation: Equation, producer: dict[Value, Equation]) -> bool:
    """Whether a division is exp(v) / Σ exp(v)."""

    def made_by(atom: Atom, names: Sequence[str]) -> Equation | None:
        found = producer.get(atom) if isinstance(atom, Value) else None
        return found if found is not None and found.name in names else None

    if equation.name != "div" or made_by(equation.inputs[0], ["exp"]) is None:
        return False
    divisor = equation.inputs[1]
    while (shaped := made_by(divisor, ["broadcast_in_dim", "reshape", "convert_element_type"])) is not None:
        divisor = shaped.inputs[0]
    total = made_by(divisor, ["reduce_sum"])
    return total is not None and total.inputs[0] is equation.inputs[0]
