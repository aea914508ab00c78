"""Running a plan: the function's own outputs, with the modified gradient."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from dualxda_jax.types import Array
from dualxda_jax.xda import _compat, steps
from dualxda_jax.xda.graph import Atom, Constant, Graph, Value


@dataclasses.dataclass(eq=False, frozen=True)
class Plan:
    """A graph with a rule for every operation.

    Attributes:
        graph: the function.
        steps: what to run, in order, after everything that depends on parameters alone.
        relevance: the values at which the cotangent is the relevance itself instead of c.
    """

    graph: Graph
    steps: tuple[steps.Step, ...]
    relevance: frozenset[Value]


Watch = Callable[[tuple[int, ...], str, int, Value, Any], Any]


def run(
    planned: Plan,
    inputs: Sequence[Array],
    *,
    tap: Callable[[Value, Array], Array] | None = None,
    watch: Watch | None = None,
    place: tuple[int, ...] = (),
) -> list[Array]:
    """Evaluate a plan; differentiate this with respect to the sources for the modified gradient.

    Args:
        planned: what to run.
        inputs: of the graph, flat.
        tap: called as tap(value, array) for every source of the graph, and gives the array to go on with.
        watch: called as watch(place, "input" or "output", position, value, array) for every live value that a step
            reads or writes, and gives the array to go on with.
        place: the number of the step, after those of the loops around it, each with its round.

    Returns:
        The flat outputs.
    """
    graph = planned.graph
    env: dict[Value, Any] = dict(graph.constants)

    def write(atoms: Sequence[Value], arrays: Sequence[Any], env: dict[Value, Any] = env) -> None:
        env.update(zip(atoms, arrays, strict=True))
        if tap is not None:
            env.update((v, tap(v, env[v])) for v in atoms if v in graph.sources)

    write(graph.inputs, inputs)

    def read(atom: Atom, env: dict[Value, Any] = env) -> Any:
        return atom.value if isinstance(atom, Constant) else env[atom]

    def run_step(number: int, step: steps.Step, env: dict[Value, Any]) -> None:
        here = (*place, number)

        def seen(side: str, atoms: Sequence[Atom], arrays: Sequence[Any]) -> list[Any]:
            if watch is None:
                return list(arrays)
            pairs = enumerate(zip(atoms, arrays, strict=True))
            return [watch(here, side, i, a, v) if graph.is_live(a) else v for i, (a, v) in pairs]

        values = seen("input", step.inputs, [read(a, env) for a in step.inputs])
        outputs = seen("output", step.outputs, _run_step(planned, step, values, watch, here))
        write(step.outputs, outputs, env)

    for equation in graph.equations:
        if not graph.reached.intersection(equation.outputs):
            computed = _compat.bind(equation.source, [read(a) for a in equation.inputs])
            env.update(zip(equation.outputs, computed, strict=True))
    for part in _parts(planned, watched=watch is not None):
        if part.remat is None:
            for number, step in part.steps:
                run_step(number, step, env)
            continue

        def again(given: list[Any], part: _Part = part) -> list[Any]:
            inner: dict[Value, Any] = dict(zip(part.inputs, given, strict=True))
            for number, step in part.steps:
                run_step(number, step, inner)
            return [inner[v] for v in part.outputs]

        given = [env[v] for v in part.inputs]
        env.update(zip(part.outputs, _compat.rematerialised(part.remat, again)(given), strict=True))
    return [read(o) for o in graph.outputs]


@dataclasses.dataclass(frozen=True)
class _Part:
    """Consecutive steps, and what they have from others and have for others where they are rematerialised."""

    remat: Any
    steps: list[tuple[int, steps.Step]]
    inputs: list[Value]
    outputs: list[Value]


def _parts(planned: Plan, *, watched: bool) -> list[_Part]:
    """The steps, those apart that the function wraps in jax.checkpoint.

    A loop takes care of its body's by itself; and what is looked at from outside cannot be rematerialised.
    """
    graph = planned.graph

    def remat(pair: tuple[int, steps.Step]) -> Any:
        step = pair[1]
        if watched or not graph.sources or set(graph.sources).intersection(step.outputs):
            return None
        return _compat.rematerialising(step.equation.callers)

    parts: list[_Part] = []
    for _, group in itertools.groupby(enumerate(planned.steps), key=lambda pair: id(remat(pair))):
        members = list(group)
        made = {v for _, step in members for v in step.outputs}
        read = dict.fromkeys(a for _, step in members for a in step.inputs if isinstance(a, Value) and a not in made)
        parts.append(_Part(remat(members[0]), members, list(read), []))
    wanted: set[Atom] = set(graph.outputs)
    for part in reversed(parts):
        part.outputs.extend(v for _, step in part.steps for v in step.outputs if v in wanted)
        wanted.update(part.inputs)
    return parts


def sources(planned: Plan, inputs: Sequence[Array]) -> list[Array]:
    """The graph's sources: the data, or what tokens look up (then the rest of the graph is dead code under jit)."""
    graph = planned.graph
    if graph.sources == (graph.data,):
        return [inputs[-1]]
    found: dict[Value, Array] = {}
    run(planned, inputs, tap=lambda value, array: found.setdefault(value, array))
    return [found[s] for s in graph.sources]


def relevance(planned: Plan) -> frozenset[Value]:
    """The values at which the cotangent is relevance, those inside of loops and branches included."""
    return planned.relevance.union(*(relevance(p) for step in planned.steps for p in step.plans))


def _run_step(
    planned: Plan, step: steps.Step, values: list[Any], watch: Watch | None, place: tuple[int, ...]
) -> tuple[Any, ...]:
    """Run one step, converting between relevance and c where its neighbours speak the other."""
    graph, relevance = planned.graph, planned.relevance
    if not graph.live.intersection(step.outputs):
        # Statistics and decisions: constants to the propagation.
        reached = [not graph.is_fixed(a) for a in step.inputs]
        return step.run([steps.detach(v) if r else v for v, r in zip(values, reached, strict=True)], False, False)
    arrives = bool(relevance.intersection(step.outputs))
    relevance_out = arrives and step.takes
    first_layer = step.block is not None and step.inputs[0] in relevance
    starts = step.starts and bool(relevance.intersection(step.inputs))
    hands_on = first_layer or (relevance_out and step.gives) or starts
    pairs = list(zip(values, step.inputs, strict=True))
    if hands_on:
        values = [steps.from_relevance(v) if graph.is_live(a) and a not in relevance else v for v, a in pairs]
    else:
        values = [steps.to_relevance(v) if a in relevance else v for v, a in pairs]
    if watch is not None and step.watched is not None:
        outputs = step.watched(values, watch, place)
    else:
        outputs = step.run(values, relevance_out, hands_on)
    after = list(zip(outputs, step.outputs, strict=True))
    if relevance_out:
        # Some of several outputs may be read by operations that hand back c.
        return tuple(o if v in relevance or not graph.is_live(v) else steps.to_relevance(o) for o, v in after)
    return tuple(steps.from_relevance(o) if v in relevance else o for o, v in after)


def inside(equation: Any, plans: Sequence[Plan], rule: str) -> steps.Step:
    """A loop over layers, a choice between branches or a mapped function, with transformed bodies.

    Between the bodies and what is around them travels c, so that relevance at an output that is exactly zero is lost.

    Args:
        equation: the scan, cond or shard_map.
        plans: of its body or branches.
        rule: for people.
    """

    def body(planned: Plan, values: Sequence[Any], watch: Watch | None = None, place: tuple[int, ...] = ()) -> Any:
        # What the body only takes statistics and decisions from stays a constant.
        graph = planned.graph
        given = [
            steps.detach(v) if a in graph.reached and a not in graph.live else v
            for v, a in zip(values, graph.inputs, strict=True)
        ]
        return run(planned, given, watch=watch, place=place)

    def plain(values: Sequence[Any], relevance_out: bool, relevance_in: bool) -> tuple[Any, ...]:
        functions = [lambda *v, p=p: body(p, v) for p in plans]
        return _compat.rebind_bodies(equation.source, functions, values)

    def watched(values: Sequence[Any], watch: Watch, place: tuple[int, ...]) -> tuple[Any, ...]:
        def one(*given: Any) -> Any:
            return body(plans[0], given[:-1], watch, (*place, given[-1]))

        return _compat.rebind_bodies(equation.source, [one], values, unroll=True)

    return steps.Step(
        equation,
        equation.inputs,
        equation.outputs,
        plain,
        rule,
        plans=tuple(plans),
        watched=watched if equation.name == "scan" else None,
    )
