"""Look before you trust: which rule goes where in a model, and how much relevance is lost at which layer."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dualxda_jax.types import Array, FeatureFn, Params
from dualxda_jax.xda import _compat, explain, facts, plan, reach, walk
from dualxda_jax.xda.composites import Composite
from dualxda_jax.xda.graph import Graph, Value
from dualxda_jax.xda.steps import Step
from dualxda_jax.xda.walk import Plan


@dataclasses.dataclass(frozen=True)
class RuleRow:
    """One operation of the traced function.

    Attributes:
        operation: the primitive, with what was merged into it, as "conv_general_dilated + add + sub + mul + add";
            that of a loop or a branch after the name of these, as "scan / dot_general + add".
        rule: what its relevance does.
        path: path of its weights in the tree of parameters; empty where it has none.
        module: module path under which it was traced, as "CNN/Conv_0".
        shape: of its output.
    """

    operation: str
    rule: str
    path: str
    module: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ConservationRow:
    """How much relevance one operation lets through.

    Attributes:
        operation: see `RuleRow`; each round of a loop has its own, as "scan[2] / dot_general + add".
        rule: see `RuleRow`.
        path: see `RuleRow`.
        module: see `RuleRow`.
        arrived: sum of the relevance at its outputs.
        passed: sum of the relevance that it handed to its inputs.
    """

    operation: str
    rule: str
    path: str
    module: str
    arrived: float
    passed: float

    @property
    def lost(self) -> float:
        return self.arrived - self.passed


@dataclasses.dataclass(frozen=True)
class RuleTable:
    """Rows in the order of execution; prints as a table."""

    rows: tuple[RuleRow, ...]

    def __str__(self) -> str:
        head = ("operation", "rule", "weights", "module", "output")
        return _table(head, [(r.operation, r.rule, r.path, r.module, str(r.shape)) for r in self.rows])


@dataclasses.dataclass(frozen=True)
class Conservation:
    """Where relevance goes between the seed and the input; prints as a table of the operations that lose any.

    Attributes:
        rows: every operation that relevance passes, in the order of execution.
        seed: sum of the relevance at the features.
        input: sum of the relevance at the input.
    """

    rows: tuple[ConservationRow, ...]
    seed: float
    input: float

    @property
    def lost(self) -> float:
        """Share of the seed that does not reach the input; below 0 where relevance was made."""
        return 1 - self.input / self.seed if self.seed else float("nan")

    def __str__(self) -> str:
        scale = abs(self.seed) or 1.0
        losing = [r for r in self.rows if abs(r.lost) > 1e-4 * scale]
        head = ("operation", "rule", "weights", "module", "arrived", "passed on", "lost / seed")
        cells = [
            (r.operation, r.rule, r.path, r.module, f"{r.arrived:.6g}", f"{r.passed:.6g}", f"{r.lost / scale:+.2%}")
            for r in losing
        ]
        total = f"seed {self.seed:.6g}, at the input {self.input:.6g}, lost {self.lost:+.3%}"
        return f"{_table(head, cells)}\n{total}" if losing else total


def explain_rules(feature_fn: FeatureFn, params: Params, x: Array, *, composite: Composite) -> RuleTable:
    """Which rule goes to which operation of a model.

    Args:
        feature_fn: (params, x[b, ...]) -> features[b, d].
        params: its parameters.
        x: [b, ...] inputs, or a jax.ShapeDtypeStruct of that shape; nothing is computed.
        composite: which rule goes to which layer.

    Returns:
        A table of the operations on values that carry relevance, in the order of execution.

    Raises:
        ValueError, NoRuleError: as `relevance`.
    """
    planned = _plan(feature_fn, params, x, composite)
    rows = []
    for _, step, inside in _walk(planned, rounds=False):
        operation, path, module = _describe(planned.graph, step, inside)
        rows.append(RuleRow(operation, step.rule, path, module, tuple(step.outputs[0].aval.shape)))
    return RuleTable(tuple(rows))


def check_conservation(
    feature_fn: FeatureFn, params: Params, x: Array, *, composite: Composite, seed: Array | None = None
) -> Conservation:
    """How much relevance is lost, and at which layer: to biases, to the stabiliser, or by a rule's nature.

    Args:
        feature_fn: (params, x[b, ...]) -> features[b, d].
        params: its parameters.
        x: [b, ...] inputs; the sums run over all of them.
        composite: which rule goes to which layer.
        seed: [b, d] relevance at the features; their squares if not given, as for the pair of a sample and itself.

    Returns:
        A report, which prints as a table.

    Raises:
        ValueError, NoRuleError: as `relevance`.
    """
    if seed is not None:
        explain.check_seed(seed, explain.check_inputs(feature_fn, params, "x", x, composite))
        seed = jnp.asarray(seed)
    planned = _plan(feature_fn, params, x, composite)
    sums, start, end = _sums(feature_fn, params, x, seed, composite)
    rows = []
    for place, step, inside in _walk(planned, rounds=True):
        operation, path, module = _describe(planned.graph, step, inside)
        arrived, passed = (
            float(sum(float(s) for (p, side, _), s in sums.items() if p == place and side == wanted))
            for wanted in ("output", "input")
        )
        rows.append(ConservationRow(operation, step.rule, path, module, arrived, passed))
    return Conservation(tuple(rows), float(start), float(end))


def _plan(feature_fn: FeatureFn, params: Params, x: Any, composite: Composite) -> Plan:
    explain.check_inputs(feature_fn, params, "x", x, composite)
    return plan.make(reach.build(feature_fn, (params,), x), composite, seeded=True)


_Edge = tuple[tuple[int, ...], str, int]


@functools.partial(jax.jit, static_argnames=("feature_fn", "composite"))
def _sums(
    feature_fn: FeatureFn, params: Params, x: Array, seed: Array | None, composite: Composite
) -> tuple[dict[_Edge, Array], Array, Array]:
    """Sum of the relevance on every edge of the graph, at the outputs and at the input."""
    planned = _plan(feature_fn, params, x, composite)
    sources = planned.graph.sources
    inputs = [*jax.tree.leaves(params), x]
    values: dict[_Edge, Value] = {((), "source", i): v for i, v in enumerate(sources)}
    arrays: dict[_Edge, Any] = {}

    def note(place: tuple[int, ...], side: str, position: int, value: Value, array: Any) -> Any:
        values[place, side, position] = value
        return array

    jax.eval_shape(lambda inputs: walk.run(planned, inputs, watch=note), inputs)

    def tapped(probes: dict[_Edge, Array]) -> Any:
        # Adding nothing to an edge makes the cotangent on it a gradient.
        def add(place: tuple[int, ...], side: str, position: int, value: Value, array: Any) -> Any:
            arrays[place, side, position] = array
            return array + probes[place, side, position]

        def tap(value: Value, array: Any) -> Any:
            return add((), "source", sources.index(value), value, array)

        outputs = walk.run(planned, inputs, tap=tap, watch=add)
        return outputs[0], dict(arrays)

    probes = {key: jnp.zeros(v.aval.shape, v.aval.dtype) for key, v in values.items()}
    features, transpose, seen = jax.vjp(tapped, probes, has_aux=True)
    start = features * features if seed is None else seed.astype(features.dtype)
    (on_edges,) = transpose(start)

    def add_up(array: Array) -> Array:
        return array.astype(array.dtype if array.dtype.itemsize >= 4 else jnp.float32).sum()

    relevance = walk.relevance(planned)

    def total(value: Value, array: Array, cotangent: Array) -> Array:
        given = value in relevance or composite.seed == "gradient"
        return add_up(cotangent if given else array * cotangent)

    sums = {key: total(value, seen[key], on_edges[key]) for key, value in values.items()}
    at_input = functools.reduce(jnp.add, [sums.pop(((), "source", i)) for i in range(len(sources))])
    return sums, add_up(start), at_input


def _walk(
    planned: Plan, *, rounds: bool, place: tuple[int, ...] = (), inside: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[int, ...], Step, tuple[str, ...]]]:
    """(place, step, the loops and branches around it) of every step on values that carry relevance.

    With `rounds` those of a loop come once for each round, in place of the loop itself; what happens in a branch is not
    told apart then.
    """
    for number, step in enumerate(planned.steps):
        graph = planned.graph
        if not graph.live.intersection(step.outputs) or set(step.outputs) <= set(graph.sources):
            continue  # a look-up of tokens is where relevance ends
        here, name = (*place, number), step.equation.name
        if step.watched is None or not rounds:
            yield here, step, inside
        if rounds and step.watched is not None:
            for turn in range(step.equation.params["length"]):
                yield from _walk(step.plans[0], rounds=True, place=(*here, turn), inside=(*inside, f"{name}[{turn}]"))
        elif not rounds:
            for branch, part in enumerate(step.plans):
                label = name if len(step.plans) == 1 else f"{name}[{branch}]"
                yield from _walk(part, rounds=False, place=here, inside=(*inside, label))


def _describe(traced: Graph, step: Step, inside: tuple[str, ...]) -> tuple[str, str, str]:
    equations = [step.equation]
    path = ""
    if step.block is not None:
        block = step.block
        equations = [*(k.equation for k in block.before), step.equation, *(k.equation for k in block.after)]
        path = facts.weights_path(traced, block.weights)
    stack = [*step.equation.callers, step.equation.source]
    module = "/".join(n for n in map(_compat.name_stack, stack) if n)
    return " / ".join([*inside, " + ".join(e.name for e in equations)]), path, module


def _table(head: tuple[str, ...], cells: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [head, *cells]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
