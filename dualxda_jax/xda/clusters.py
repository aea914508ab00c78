"""Elementwise functions that a trace has taken apart.

GELU and SiLU arrive as a handful of equations that read one value several times (x · σ(x)), a sigmoid written out as a
chain of them (1 / (1 + exp(-x))). To relevance they are one function y = f(x), and what arrives at y belongs to x.
"""

import dataclasses

from dualxda_jax.xda.graph import Atom, Constant, Equation, Graph, Value

# fmt: off
_ELEMENTWISE = frozenset([
    "add", "sub", "mul", "div", "neg", "max", "min", "tanh", "logistic", "erf", "erfc", "integer_pow", "square", "abs",
    "copy", "select_n", "expm1", "exp", "exp2", "log1p", "log", "pow", "sqrt", "cbrt", "convert_element_type", "sin",
    "cos", "tan", "sinh", "cosh", "asin", "acos", "atan", "asinh", "acosh", "atanh", "clamp",
    "gt", "ge", "lt", "le", "eq", "ne", "sign", "and", "or", "not", "xor", "is_finite",
])
# What makes a chain a function of its own even if it reads one value once, which scales, shifts and ReLU do not.
_CURVED = frozenset([
    "exp", "exp2", "log", "pow", "cos", "tan", "sinh", "cosh", "asin", "acos", "acosh", "atanh",
])
_SCALES = frozenset(["neg", "mul", "div", "convert_element_type", "copy"])
# What moves entries about, on the way to a sum or from one.
_SHAPES = frozenset([
    "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "convert_element_type", "copy", "slice",
])
# fmt: on


@dataclasses.dataclass(eq=False, frozen=True)
class Cluster:
    """An elementwise function of one value.

    Attributes:
        root: the value.
        equations: in order of execution; the last one computes the result.
        constants: what else they read, free of data and parameters.
    """

    root: Value
    equations: tuple[Equation, ...]
    constants: tuple[Atom, ...]


def clusters(graph: Graph, merged: set[Equation], read: set[Atom]) -> dict[Equation, Cluster]:
    """The clusters of a graph by the equation that computes their result.

    Args:
        graph: the function.
        merged: equations that belong to linear blocks.
        read: what linear blocks read, past the scales and shifts before them.
    """
    root: dict[Value, Value] = {}
    joined: set[Value] = set()
    curved: set[Value] = set()
    for equation in graph.equations:
        source = _root(graph, equation, root, merged)
        if source is None:
            continue
        (output,) = equation.outputs
        root[output] = source
        # A condition carries no relevance, but what it chooses is the function's as much as what is computed.
        varying = [a for a in equation.inputs if not graph.is_fixed(a)]
        if len(varying) > 1 or joined.intersection(varying):
            joined.add(output)
        elif curved.intersection(varying) or (_is_curved(graph, equation) and not _from_sum(graph, source)):
            curved.add(output)
    found = {}
    for value in joined | curved:
        if not graph.is_live(value) or (value in curved and _into_sum(graph, value)):
            continue
        inside = [root.get(u.outputs[0]) is root[value] for u in graph.users.get(value, ())]
        if value in graph.outputs or value in read or not inside or not all(inside):
            cluster = _collect(graph, value, root)
            if value in joined or _is_function(graph, cluster):
                found[cluster.equations[-1]] = cluster
    return found


def _is_function(graph: Graph, cluster: Cluster) -> bool:
    """Whether a chain is more than one exponential, logarithm or reciprocal, which may belong to anything."""
    return sum(e.name not in _SCALES or _is_curved(graph, e) for e in cluster.equations) > 1


def _is_curved(graph: Graph, equation: Equation) -> bool:
    return equation.name in _CURVED or (equation.name == "div" and graph.is_fixed(equation.inputs[0]))


def _is_sum(graph: Graph, equation: Equation) -> bool:
    """Whether it adds up values of the data, as for a norm or the denominator of a softmax."""
    if equation.name == "dot_general":
        return not any(graph.is_fixed(a) for a in equation.inputs)
    return equation.name.startswith(("reduce_", "cum", "psum"))


def _from_sum(graph: Graph, value: Value) -> bool:
    """Whether a value is such a sum: its logarithm or reciprocal normalises, and has no relevance of its own."""
    equation = graph.producer.get(value)
    if equation is None or _is_sum(graph, equation):
        return equation is not None
    varying = [a for a in equation.inputs if isinstance(a, Value) and not graph.is_fixed(a)]
    return equation.name in _SHAPES | _ELEMENTWISE and len(varying) == 1 and _from_sum(graph, varying[0])


def _into_sum(graph: Graph, value: Value) -> bool:
    """Whether a value is added up next: exponentials that are belong to a softmax or logsumexp."""
    users = graph.users.get(value, ())
    return any(_is_sum(graph, u) or (u.name in _SHAPES and _into_sum(graph, u.outputs[0])) for u in users)


def _root(graph: Graph, equation: Equation, root: dict[Value, Value], merged: set[Equation]) -> Value | None:
    """The one value of which an equation's output is an elementwise function, if there is one."""
    if equation in merged or equation.name not in _ELEMENTWISE or equation.outputs[0] not in graph.reached:
        return None
    sources = set()
    for atom in equation.inputs:
        if not graph.is_fixed(atom):
            assert isinstance(atom, Value)
            if atom.aval.shape != equation.outputs[0].aval.shape:
                return None
            sources.add(root.get(atom, atom))
        elif not _is_constant(graph, atom):
            return None
    return sources.pop() if len(sources) == 1 else None


def _is_constant(graph: Graph, atom: Atom) -> bool:
    """Whether it is free of parameters: a number of the function's own."""
    if isinstance(atom, Constant):
        return True
    if atom in graph.origin:
        return _is_constant(graph, graph.origin[atom])
    if atom not in graph.producer:
        return False
    return all(_is_constant(graph, a) for a in graph.producer[atom].inputs)


def _collect(graph: Graph, result: Value, root: dict[Value, Value]) -> Cluster:
    source = root[result]
    wanted, members = {result}, []
    for equation in reversed(graph.equations):
        if wanted.intersection(equation.outputs) and root.get(equation.outputs[0]) is source:
            members.append(equation)
            wanted.update(a for a in equation.inputs if isinstance(a, Value))
    constants = {a: None for e in members for a in e.inputs if graph.is_fixed(a)}
    return Cluster(source, tuple(members[::-1]), tuple(constants))
