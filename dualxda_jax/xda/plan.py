"""Which rule goes to which operation of a graph."""

import dataclasses
import fnmatch
import warnings

import numpy as np

from dualxda_jax.xda import rules, steps
from dualxda_jax.xda.clusters import clusters
from dualxda_jax.xda.composites import Composite
from dualxda_jax.xda.folding import Block, blocks
from dualxda_jax.xda.graph import Atom, Constant, Equation, Graph, NoRuleError, Value, is_softmax
from dualxda_jax.xda.steps import Step

# Entries are moved, copied or selected, never mixed: the plain gradient suits c and relevance alike.
# fmt: off
_ROUTES = frozenset([
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "slice", "pad", "concatenate", "rev",
    "gather", "dynamic_slice", "dynamic_update_slice", "convert_element_type", "copy", "copy_p", "split",
    "reduce_precision", "optimization_barrier", "sharding_constraint", "select_n", "reduce_max", "reduce_min",
    "reduce_window_max", "reduce_window_min", "sort", "top_k", "real", "pvary", "pcast",
])
# fmt: on
# f(t·x) = t·f(x) for t > 0, with at most one operand from the data.
_HOMOGENEOUS = frozenset(["neg", "mul", "div", "abs"])
_SHIFTS = frozenset(["add", "sub", "add_any"])
# fmt: off
_SMOOTH = frozenset([
    "tanh", "logistic", "erf", "expm1", "log1p", "integer_pow", "square", "sqrt", "cbrt", "sin", "atan", "asinh",
])
# fmt: on
_SUMS = frozenset(["reduce_sum", "reduce_window_sum", "cumsum"])


@dataclasses.dataclass(eq=False, frozen=True)
class Plan:
    """A graph with a rule for every operation.

    Attributes:
        graph: the function.
        steps: what to run, in order, after everything that depends on parameters alone.
        relevance: the values at which the cotangent is the relevance itself instead of c.
    """

    graph: Graph
    steps: tuple[Step, ...]
    relevance: frozenset[Value]


def make(graph: Graph, composite: Composite, *, seeded: bool) -> Plan:
    """Assign rules.

    Args:
        graph: the function.
        composite: the rules.
        seeded: relevance arrives at the outputs, and is wanted at the data if the first layer's rule gives it; False
            means a modified gradient from end to end.

    Raises:
        NoRuleError: an operation that relevance cannot pass.
    """
    found = {block.equation: block for block in blocks(graph)}
    merged = {link.equation for block in found.values() for link in block.after}
    functions = clusters(graph, merged) if composite.activation == "pass" else {}
    softmax = _softmax_equations(graph)
    first = _first(graph, found) if composite.first is not None else set()
    nonnegative = _nonnegative(graph)
    made: list[Step] = []
    refused: dict[Equation, NoRuleError] = {}
    for equation in graph.equations:
        if equation in merged or not any(v in graph.reached for v in equation.outputs):
            continue
        if equation in found:
            block = found[equation]
            rule = _rule(graph, composite, block, equation in first)
            if rule is not None:
                made.append(steps.linear(block, rule, nonnegative=block.input in nonnegative))
                continue
            # Without a rule nothing is merged, so the links run as themselves.
            made.append(steps.native(equation))
            made.extend(steps.native(link.equation) for link in block.after)
        elif equation in softmax:
            # A Taylor expansion of softmax is its gradient times its input (Achtibat et al. 2024, proposition 3.1).
            made.append(steps.native(equation))
        elif equation in functions:
            made.append(steps.function(functions[equation]))
        else:
            try:
                made.append(_step(graph, composite, equation))
            except NoRuleError as error:
                # It may lie inside of an elementwise function that is one step, and then nobody reads it.
                refused[equation] = error
    made, read = _needed(made, graph)
    for equation, refusal in refused.items():
        if read.intersection(equation.outputs):
            raise refusal
    relevance = _relevance_values(graph, made, first, composite) if seeded else frozenset()
    return Plan(graph, tuple(made), relevance)


def _softmax_equations(graph: Graph) -> set[Equation]:
    """The exponential, the sum and the division of every softmax."""
    found: set[Equation] = set()
    for equation in graph.equations:
        if is_softmax(equation, graph.producer):
            numerator = equation.inputs[0]
            assert isinstance(numerator, Value)
            found.update([equation, graph.producer[numerator]])
            found.update(u for u in graph.users[numerator] if u.name == "reduce_sum")
    return found


def _needed(made: list[Step], graph: Graph) -> tuple[list[Step], set[Atom]]:
    """Leave out what is merged elsewhere; also gives everything that is read."""
    wanted: set[Atom] = set(graph.outputs)
    kept = []
    for step in reversed(made):
        if wanted.intersection(step.outputs):
            wanted.update(step.inputs)
            kept.append(step)
    return kept[::-1], wanted


def _rule(graph: Graph, composite: Composite, block: Block, first: bool) -> rules.Rule | None:
    path = weights_path(graph, block.weights)
    for pattern, rule in composite.overrides:
        if path and fnmatch.fnmatchcase(path, pattern):
            return rule
    if first:
        return composite.first
    return composite.convolution if block.is_convolution else composite.dense


def weights_path(graph: Graph, atom: Atom) -> str:
    """The path in the tree of parameters from which weights were computed; the first one, if there are several."""
    if not isinstance(atom, Value):
        return ""
    if atom.path or atom not in graph.producer:
        return atom.path
    return next(filter(None, (weights_path(graph, a) for a in graph.producer[atom].inputs)), "")


def _step(graph: Graph, composite: Composite, equation: Equation) -> Step:
    """The step of an equation that is no linear block."""
    live = [i for i, a in enumerate(equation.inputs) if graph.is_live(a)]
    if not live or not any(graph.is_live(v) for v in equation.outputs):
        return steps.native(equation, rule="constant")
    name = equation.name
    if name == "while":
        raise equation.refuse("a while loop has no reverse-mode derivative; use scan or unroll it")
    if name in _ROUTES:
        return steps.native(equation, routes=True, rule="route")
    plain = composite.activation != "pass"
    if name == "max" and len(live) == 1 and _is_zero(graph, equation.inputs[1 - live[0]]):
        if composite.activation == "guided":
            return steps.guided_relu(equation, live[0])
        return steps.elementwise(equation, live[0], homogeneous=True, passes=not plain)
    if composite.seed == "gradient":
        return steps.native(equation)
    if name in _SUMS or (name in _SHIFTS and len(live) == 2):
        return steps.sums(equation, composite.stabilizer * _count(graph, equation))
    if len(live) == 2 and name in ("mul", "dot_general"):
        return steps.halves(equation)
    if len(live) == 2 and name in ("max", "min"):
        return steps.native(equation)
    if len(live) == 1:
        step = _unary(graph, composite, equation, live[0], plain)
        if step is not None:
            return step
    reason = "relevance propagation does not know this operation on values that depend on the data"
    if composite.on_unknown == "raise":
        raise equation.refuse(f"{reason}; a composite with on_unknown='gradient' would let its plain gradient act")
    warnings.warn(f"{equation.refuse(reason)}: its plain gradient acts instead", stacklevel=2)
    return steps.native(equation)


def _count(graph: Graph, equation: Equation) -> float:
    """By what number the result is divided next: a mean is stabilised as a mean, not as a sum."""
    users = graph.users.get(equation.outputs[0], ())
    if len(users) == 1 and users[0].name in ("div", "mul"):
        other = [a for a in users[0].inputs if a is not equation.outputs[0]]
        if len(other) == 1 and isinstance(other[0], Constant) and np.ndim(other[0].value) == 0:
            number = abs(float(other[0].value))
            if number > 0 and (users[0].name == "mul" or users[0].inputs[1] is other[0]):
                return number if users[0].name == "div" else 1 / number
    return 1.0


def _unary(graph: Graph, composite: Composite, equation: Equation, live: int, plain: bool) -> Step | None:
    """An operation on one value that depends on the data, entry by entry."""
    name = equation.name
    if equation.inputs[live].aval.shape != equation.outputs[0].aval.shape:
        # The value is repeated along an axis: entries get several cotangents, which the plain gradient adds up.
        return steps.native(equation) if name in ("mul", "div", "neg", "add", "sub") else None
    if name in _HOMOGENEOUS and not (name == "div" and live == 1):
        return steps.elementwise(equation, live, homogeneous=True, passes=True)
    if name in _SHIFTS:
        # A shift by a statistic of the data (the maximum inside of a softmax) is no bias.
        bias = graph.is_fixed(equation.inputs[1 - live])
        return steps.elementwise(equation, live, homogeneous=not (composite.zero_bias and bias), passes=bias)
    if name in _SMOOTH or name in ("max", "min", "clamp"):
        return steps.elementwise(equation, live, homogeneous=False, passes=not plain)
    return None


def _is_zero(graph: Graph, atom: Atom) -> bool:
    while isinstance(atom, Value) and atom in graph.producer:
        equation = graph.producer[atom]
        if equation.name not in ("broadcast_in_dim", "convert_element_type"):
            return False
        atom = equation.inputs[0]
    return isinstance(atom, Constant) and np.ndim(atom.value) == 0 and float(atom.value) == 0.0


def _first(graph: Graph, found: dict[Equation, Block]) -> set[Equation]:
    """The linear blocks that no other linear block precedes."""
    behind: set[Value] = set()
    first = set()
    for equation in graph.equations:
        after = any(a in behind for a in equation.inputs if graph.is_live(a))
        if equation in found and not after:
            first.add(equation)
        if equation in found or after:
            behind.update(equation.outputs)
    return first


def _nonnegative(graph: Graph) -> frozenset[Atom]:
    """Values that cannot be negative, by construction."""
    known: set[Atom] = set()

    def sure(atom: Atom) -> bool:
        if isinstance(atom, Constant):
            return np.ndim(atom.value) == 0 and float(atom.value) >= 0
        return atom in known

    for equation in graph.equations:
        name, inputs = equation.name, equation.inputs
        if name in ("logistic", "exp", "abs", "square"):
            positive = True
        elif name == "max":
            positive = any(sure(a) for a in inputs)
        elif name in ("gather", "dynamic_slice"):
            positive = sure(inputs[0])
        elif name == "select_n":
            positive = all(sure(a) for a in inputs[1:])
        elif name in _ROUTES or name in _SUMS or name in ("add", "mul", "div", "min", "add_any"):
            positive = all(sure(a) for a in inputs)
        else:
            positive = False
        if positive:
            known.update(equation.outputs)
    return frozenset(known)


def _relevance_values(graph: Graph, made: list[Step], first: set[Equation], composite: Composite) -> frozenset[Value]:
    """Where the cotangent is relevance.

    From the outputs back to the last layers, since a seed may put relevance where the output is zero; and from the
    data to the first layers, if their rule gives relevance.
    """
    if composite.seed == "gradient":
        return frozenset()
    found = {o for o in graph.outputs if graph.is_live(o)}
    for step in reversed(made):
        if step.gives and found.intersection(step.outputs):
            found.update(a for a in step.inputs if graph.is_live(a))
    if isinstance(composite.first, rules.FIRST_LAYER_ONLY):
        found.add(graph.data)
        for step in made:
            live = [a for a in step.inputs if graph.is_live(a)]
            if step.block is None and step.takes and live and all(a in found for a in live):
                found.update(v for v in step.outputs if graph.is_live(v))
            if step.equation in first and step.inputs[0] not in found:
                raise step.equation.refuse(
                    f"the first layer's rule {composite.first} needs a plain path from the input, "
                    "but an operation that mixes entries comes before it"
                )
    return frozenset(found)
