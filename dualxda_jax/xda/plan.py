"""Which rule goes to which operation of a graph."""

import dataclasses
import fnmatch
import warnings
from collections.abc import Iterator

import numpy as np

from dualxda_jax import _check
from dualxda_jax.xda import facts, rules, steps, walk
from dualxda_jax.xda.clusters import clusters
from dualxda_jax.xda.composites import Composite
from dualxda_jax.xda.folding import LINEAR, Block, blocks
from dualxda_jax.xda.graph import Atom, Equation, Graph, NoRuleError, Value
from dualxda_jax.xda.reach import is_softmax
from dualxda_jax.xda.steps import Step
from dualxda_jax.xda.walk import Plan

# f(t·x) = t·f(x) for t > 0, with at most one operand from the data.
_HOMOGENEOUS = frozenset(["neg", "mul", "div", "abs"])
_SHIFTS = frozenset(["add", "sub", "add_any"])
_SUMS_OVER_DEVICES = frozenset(["psum", "psum_invariant"])
# fmt: off
_SMOOTH = frozenset([
    "tanh", "logistic", "erf", "erfc", "expm1", "log1p", "integer_pow", "square", "sqrt", "cbrt", "sin", "atan",
    "asinh",
])
# fmt: on


@dataclasses.dataclass(frozen=True)
class _Context:
    """What holds for a graph and all its loops and branches.

    Attributes:
        composite: the rules.
        found: every linear block.
        merged: equations that belong to a block.
        first: the linear blocks that no other precedes, if the composite has a rule for them.
        nonnegative: values that cannot be negative.
    """

    composite: Composite
    found: dict[Equation, Block]
    merged: set[Equation]
    first: set[Equation]
    nonnegative: frozenset[Atom]


def make(graph: Graph, composite: Composite, *, seeded: bool) -> Plan:
    """Assign rules.

    Args:
        graph: the function.
        composite: the rules.
        seeded: relevance arrives at the outputs, and is wanted at the data if the first layer's rule gives it; False
            means a modified gradient from end to end.

    Raises:
        NoRuleError: an operation that relevance cannot pass.
        ValueError: bounds of the z-box rule for another number of channels.
    """
    found = {block.equation: block for part in _parts(graph) for block in blocks(part)}
    _warn_of_idle_overrides(graph, composite, found)
    merged = {link.equation for block in found.values() for link in block.after}
    first = _first(graph, found) if composite.first is not None else set()
    context = _Context(composite, found, merged, first, facts.nonnegative(graph))
    made = _steps(graph, context)
    relevance = _relevance_values(graph, made, first, composite, seeded)
    return Plan(graph, tuple(made), relevance)


def _warn_of_idle_overrides(graph: Graph, composite: Composite, found: dict[Equation, Block]) -> None:
    """Say which overrides reach no layer: a misspelt path would change nothing, without a word."""
    paths = list(dict.fromkeys(filter(None, (facts.weights_path(graph, block.weights) for block in found.values()))))
    idle = [p for p, _ in composite.overrides if not any(fnmatch.fnmatchcase(path, p) for path in paths)]
    if idle:
        known = ", ".join(map(repr, paths[:5])) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
        which = f"the layers here are {known}" if paths else "no layer's path is known here (see xda.Composite)"
        warnings.warn(f"overrides: {', '.join(map(repr, idle))} matches no layer; {which}", stacklevel=2)


def _parts(graph: Graph) -> Iterator[Graph]:
    """The graph, and those of its loops and branches."""
    yield graph
    for equation in graph.equations:
        for body in equation.bodies:
            yield from _parts(graph.inside(body))


def _steps(graph: Graph, context: _Context) -> list[Step]:
    composite, found = context.composite, context.found
    read = {block.input for block in found.values()}
    functions = clusters(graph, context.merged, read) if composite.activation == "pass" else {}
    softmax = _softmax_equations(graph)
    made: list[Step] = []
    refused: dict[Equation, NoRuleError] = {}
    for equation in graph.equations:
        if equation in context.merged or not graph.reached.intersection(equation.outputs):
            continue
        if equation in found:
            block = found[equation]
            rule = _rule(graph, composite, block, equation in context.first)
            if rule is not None:
                made.append(steps.linear(block, rule, nonnegative=block.input in context.nonnegative))
                continue
            # Without a rule nothing is merged, so the links run as themselves.
            made.append(steps.native(equation))
            made.extend(steps.native(link.equation) for link in block.after)
        elif equation in softmax:
            # A Taylor expansion of softmax is its gradient times its input (Achtibat et al. 2024, proposition 3.1).
            made.append(steps.native(equation))
        elif equation in functions:
            made.append(steps.function(functions[equation]))
        elif equation.bodies and graph.live.intersection(equation.outputs):
            made.append(_inside(graph, context, equation))
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
    return made


def _inside(graph: Graph, context: _Context, equation: Equation) -> Step:
    """The step of a loop or a branching: its bodies are transformed in turn."""
    plans = []
    for body in equation.bodies:
        inner = graph.inside(body)
        made = _steps(inner, context)
        plans.append(Plan(inner, tuple(made), _inner_relevance(inner, made, context.composite, frozenset())))
    count = equation.params.get("length")
    return walk.inside(equation, plans, "inside" if count is None else f"inside, {count} times")


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
    path = facts.weights_path(graph, block.weights)
    for pattern, rule in composite.overrides:
        if path and fnmatch.fnmatchcase(path, pattern):
            return rule
    if first:
        if isinstance(composite.first, rules.ZBox):
            _check_bounds(composite.first, block)
        return composite.first
    return composite.convolution if block.is_convolution else composite.dense


def _check_bounds(rule: rules.ZBox, block: Block) -> None:
    """Refuse bounds that are not those of the first layer's channels."""
    shape = block.input.aval.shape
    for argument, bound in (("low", rule.low), ("high", rule.high)):
        if np.size(bound) not in (1, *shape[-1:]):
            must = f"one number, or one for each of the {shape[-1]} entries along the last axis of {shape}, the input"
            _check.fail(argument, f"{np.size(bound)} bounds", must)


def _step(graph: Graph, composite: Composite, equation: Equation) -> Step:
    """The step of an equation that is no linear block."""
    live = [i for i, a in enumerate(equation.inputs) if graph.is_live(a)]
    if not live or not any(graph.is_live(v) for v in equation.outputs):
        return steps.native(equation, rule="constant")
    name = equation.name
    if name == "while":
        raise equation.refuse("a while loop has no reverse-mode derivative; use scan or unroll it")
    if name in facts.ROUTES:
        return steps.native(equation, routes=True, rule="route")
    plain = composite.activation != "pass"
    if name == "max" and len(live) == 1 and facts.is_zero(graph, equation.inputs[1 - live[0]]):
        if composite.activation == "guided":
            return steps.guided_relu(equation, live[0])
        return steps.elementwise(equation, live[0], homogeneous=True, passes=not plain)
    if composite.seed == "gradient":
        return steps.native(equation)
    if name in _SUMS_OVER_DEVICES:
        return steps.native(equation, rule="share")
    if name in facts.SUMS or (name in _SHIFTS and len(live) == 2):
        return steps.sums(equation, composite.stabilizer * facts.count(graph, equation))
    if len(live) == 2 and name in ("mul", "dot_general"):
        return steps.halves(equation)
    if len(live) == 2 and name in ("max", "min"):
        return steps.native(equation)
    if len(live) == 1:
        step = _unary(graph, composite, equation, live[0], plain)
        if step is not None:
            return step
    reason = "relevance propagation does not know this operation on values that depend on the data"
    if name in LINEAR:
        reason = (
            "its weights depend on the data (stop_gradient, a choice among weights, or a cond or switch under vmap, "
            "which is one); apply each of the weights and choose among the results"
        )
    if composite.on_unknown == "raise":
        raise equation.refuse(f"{reason}; a composite with on_unknown='gradient' would let its plain gradient act")
    warnings.warn(f"{equation.refuse(reason)}: its plain gradient acts instead", stacklevel=2)
    return steps.native(equation)


def _unary(graph: Graph, composite: Composite, equation: Equation, live: int, plain: bool) -> Step | None:
    """An operation on one value that depends on the data, entry by entry."""
    name = equation.name
    if equation.inputs[live].aval.shape != equation.outputs[0].aval.shape:
        # The value is repeated along an axis: entries get several cotangents, which the plain gradient adds up.
        return steps.native(equation) if name in ("mul", "div", "neg", "add", "sub") else None
    if name in _HOMOGENEOUS and not (name == "div" and live == 1):
        return steps.elementwise(equation, live, homogeneous=True, passes=True)
    if name in _SHIFTS:
        # A shift by a statistic of the data (the maximum inside of a softmax) is no bias; a bias that is kept takes its
        # share, which is what c does by itself.
        passes = composite.zero_bias and graph.is_fixed(equation.inputs[1 - live])
        return steps.elementwise(equation, live, homogeneous=not passes, passes=passes)
    if name in _SMOOTH or name in ("max", "min", "clamp"):
        return steps.elementwise(equation, live, homogeneous=False, passes=not plain)
    return None


def _first(graph: Graph, found: dict[Equation, Block]) -> set[Equation]:
    """The linear blocks that no other linear block precedes."""
    behind = facts.behind_linear(graph, found)
    first = {e for e in found if not any(a in behind for a in e.inputs if graph.is_live(a))}
    if found and not first:
        raise next(iter(found)).refuse(
            "the first linear layer is the first round of a loop, and the composite's rule for the first layer must "
            "not reach the other rounds; take the first round out of the loop, or a composite without such a rule"
        )
    return first


def _relevance_values(
    graph: Graph, made: list[Step], first: set[Equation], composite: Composite, seeded: bool
) -> frozenset[Value]:
    """Where the cotangent is relevance.

    From the outputs back to the last layers, since a seed may put relevance where the output is zero; likewise before
    shifts and other functions that are not zero at zero; and from the data to the first layers, if their rule gives
    relevance.
    """
    if composite.seed == "gradient":
        return frozenset()
    outputs = frozenset(o for o in graph.outputs if graph.is_live(o)) if seeded else frozenset()
    found = set(_inner_relevance(graph, made, composite, outputs))
    if not seeded:
        return frozenset(found.difference(graph.sources))
    if isinstance(composite.first, rules.FIRST_LAYER_ONLY):
        found.update(graph.sources)
        top = set(graph.equations)
        for equation in first - top:
            raise equation.refuse(
                f"the first layer's rule {composite.first} hands out relevance itself, which cannot leave a loop or a "
                "branch; move the first layer out of it, or choose another rule for it"
            )
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


def _inner_relevance(
    graph: Graph, made: list[Step], composite: Composite, outputs: frozenset[Value]
) -> frozenset[Value]:
    """From the outputs and from where a step starts it, relevance goes back to what does not hand it on."""
    if composite.seed == "gradient":
        return frozenset()
    found = set(outputs)
    for step in reversed(made):
        if step.starts or (step.gives and found.intersection(step.outputs)):
            found.update(a for a in step.inputs if graph.is_live(a))
    # Into a loop's body and out of it goes c.
    return frozenset(found if graph.sources else found.difference(graph.inputs, graph.outputs))
