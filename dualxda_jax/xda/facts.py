"""What can be read off a graph before any value is known: signs, zeros, order of layers."""

from collections.abc import Callable, Sequence

import numpy as np

from dualxda_jax.xda import reach
from dualxda_jax.xda.folding import Block
from dualxda_jax.xda.graph import Atom, Constant, Equation, Graph, Value

# Entries are moved, copied or selected, never mixed: the plain gradient suits c and relevance alike.
# fmt: off
ROUTES = frozenset([
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "slice", "pad", "concatenate", "rev",
    "gather", "dynamic_slice", "dynamic_update_slice", "convert_element_type", "copy", "copy_p", "split",
    "reduce_precision", "optimization_barrier", "sharding_constraint", "select_n", "reduce_max", "reduce_min",
    "reduce_window_max", "reduce_window_min", "sort", "top_k", "real", "pvary", "pcast", "reshard", "name",
    "all_gather", "all_gather_invariant", "all_to_all", "ppermute", "pbroadcast", "stack", "unstack", "tile",
    "device_put", "layout_constraint", "cummax", "cummin", "scatter",
])
# fmt: on
SUMS = frozenset(["reduce_sum", "reduce_window_sum", "cumsum", "scatter-add", "scatter_add"])


def is_zero(graph: Graph, atom: Atom) -> bool:
    """Whether it is the number 0."""
    while isinstance(atom, Value) and (atom in graph.producer or atom in graph.origin):
        if atom in graph.producer:
            equation = graph.producer[atom]
            if equation.name not in ("broadcast_in_dim", "convert_element_type"):
                return False
            atom = equation.inputs[0]
        else:
            atom = graph.origin[atom]
    return isinstance(atom, Constant) and np.ndim(atom.value) == 0 and float(atom.value) == 0.0


def weights_path(graph: Graph, atom: Atom) -> str:
    """The path in the tree of parameters from which weights were computed; the first one, if there are several."""
    if not isinstance(atom, Value):
        return ""
    if atom in graph.origin:
        return weights_path(graph, graph.origin[atom])
    if atom.path or atom not in graph.producer:
        return atom.path
    return next(filter(None, (weights_path(graph, a) for a in graph.producer[atom].inputs)), "")


def count(graph: Graph, equation: Equation) -> float:
    """By what number a sum is divided next: a mean is stabilised as a mean, not as a sum."""
    users = graph.users.get(equation.outputs[0], ())
    if len(users) == 1 and users[0].name in ("div", "mul"):
        other = [a for a in users[0].inputs if a is not equation.outputs[0]]
        if len(other) == 1 and isinstance(other[0], Constant) and np.ndim(other[0].value) == 0:
            number = abs(float(other[0].value))
            if number > 0 and (users[0].name == "mul" or users[0].inputs[1] is other[0]):
                return number if users[0].name == "div" else 1 / number
    return 1.0


def behind_linear(graph: Graph, found: dict[Equation, Block]) -> set[Atom]:
    """The values that are computed from a linear block of the data."""

    def through(equation: Equation, behind: set[Atom]) -> Sequence[Atom]:
        after = any(a in behind for a in equation.inputs if graph.is_live(a))
        return equation.outputs if equation in found or after else ()

    behind: set[Atom] = set()
    reach.forward(graph.equations, behind, through)
    return behind


def nonnegative(graph: Graph) -> frozenset[Atom]:
    """Values that cannot be negative, by construction."""
    known: set[Atom] = set()
    _add_nonnegative(graph.equations, known)
    return frozenset(known)


def _holds(atom: Atom, known: set[Atom]) -> bool:
    if isinstance(atom, Constant):
        return np.ndim(atom.value) == 0 and float(atom.value) >= 0
    return atom in known


def _add_nonnegative(equations: Sequence[Equation], known: set[Atom]) -> None:
    def sure(atom: Atom) -> bool:
        return _holds(atom, known)

    for equation in equations:
        name, inputs = equation.name, equation.inputs
        if equation.bodies:
            _add_nonnegative_bodies(equation, known, sure)
            continue
        if name in ("logistic", "exp", "abs", "square"):
            positive = True
        elif name == "max":
            positive = any(sure(a) for a in inputs)
        elif name in ("gather", "dynamic_slice"):
            positive = sure(inputs[0])
        elif name == "select_n":
            positive = all(sure(a) for a in inputs[1:])
        elif name in ROUTES or name in SUMS or name in ("add", "mul", "div", "min", "add_any"):
            positive = all(sure(a) for a in inputs)
        else:
            positive = False
        if positive:
            known.update(equation.outputs)


def _add_nonnegative_bodies(equation: Equation, known: set[Atom], sure: Callable[[Atom], bool]) -> None:
    for_sure = [sure(a) for a in equation.operands]
    inner: list[set[Atom]] = []
    for body in equation.bodies:
        given: set[Atom] = {v for v, s in zip(body.inputs, for_sure, strict=True) if s}
        while True:
            after = set(given)
            _add_nonnegative(body.equations, after)
            # What a round makes negative may not be counted on in the next.
            broken = {into for out, into in equation.feedback if into in given and not _holds(out, after)}
            if not broken:
                break
            given -= broken
        inner.append(after)
        known.update(after)
    carried = {id(out): into for out, into in equation.feedback}
    for i, value in enumerate(equation.outputs):
        outs = [(body.outputs[i], after) for body, after in zip(equation.bodies, inner, strict=True)]
        if all(_holds(out, after) and carried.get(id(out), out) in after for out, after in outs):
            known.add(value)
