"""A traced function as a flat list of equations, and what depends on what in it."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax.xda import _compat


class NoRuleError(ValueError, NotImplementedError):
    """Relevance cannot be propagated through this function: the message names the operation, its place and why.

    A ValueError because the function is at fault, a NotImplementedError because a rule for it may come.
    """


@dataclasses.dataclass(eq=False, frozen=True)
class Value:
    """Something that the function computes or is given. Compared by identity.

    Attributes:
        aval: its shape and dtype.
        path: its path in the tree of parameters, empty for anything else.
    """

    aval: Any
    path: str = ""


@dataclasses.dataclass(eq=False, frozen=True)
class Constant:
    """A number written into the trace."""

    value: Any
    aval: Any


Atom = Value | Constant


@dataclasses.dataclass(eq=False, frozen=True)
class Equation:
    """One primitive applied to atoms.

    Attributes:
        source: the equation as jax traced it.
        inputs: what it reads.
        outputs: what it computes.
        callers: the call-like equations that it was inlined from, outermost first.
    """

    source: _compat.JaxprEqn
    inputs: tuple[Atom, ...]
    outputs: tuple[Value, ...]
    callers: tuple[_compat.JaxprEqn, ...] = ()

    @property
    def name(self) -> str:
        return self.source.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        return self.source.params

    def refuse(self, reason: str) -> NoRuleError:
        """The error for an operation that relevance cannot pass."""
        return NoRuleError(f"no rule for `{self.name}` at {_compat.place([*self.callers, self.source])}: {reason}")


@dataclasses.dataclass(eq=False, frozen=True)
class Graph:
    """A function of (parameters, data) as equations in order of execution; call-like primitives are inlined.

    Attributes:
        equations: those that the outputs need.
        parameters: the leaves of every argument but the last.
        data: the last argument.
        constants: values that the function closed over.
        outputs: flat outputs.
        out_tree: their tree.
        producer: the equation that computes a value.
        users: the equations that read it.
        reached: values that depend on the data.
        live: values through which relevance flows: they depend on the data and the outputs depend on them, both by
            operations that carry relevance.
    """

    equations: tuple[Equation, ...]
    parameters: tuple[Value, ...]
    data: Value
    constants: dict[Value, Any]
    outputs: tuple[Atom, ...]
    out_tree: Any
    producer: dict[Value, Equation]
    users: dict[Value, tuple[Equation, ...]]
    reached: frozenset[Value]
    live: frozenset[Value]

    def is_live(self, atom: Atom) -> TypeGuard[Value]:
        return isinstance(atom, Value) and atom in self.live

    def is_fixed(self, atom: Atom) -> bool:
        """Whether the data have no influence on it."""
        return not (isinstance(atom, Value) and atom in self.reached)


# No relevance flows through these: they take whole numbers or decisions, or are the statistics by which a
# normalisation divides, which count as constants (Achtibat et al. 2024, AttnLRP, on LayerNorm).
# fmt: off
STOPS = frozenset([
    "stop_gradient", "rsqrt", "sign", "floor", "ceil", "round", "is_finite", "argmax", "argmin", "eq", "ne", "lt",
    "le", "gt", "ge", "and", "or", "not", "xor", "iota",
])
# fmt: on

_REDUCTIONS = frozenset(["reduce_sum", "reduce_max", "reduce_min", "reduce_prod"])

_RANDOM = frozenset(["random_bits", "random_wrap", "random_fold_in", "random_split", "random_seed", "threefry2x32"])


def build(fn: Callable[..., Any], parameters: Sequence[Any], data: Any) -> Graph:
    """Trace fn(*parameters, data) into a graph.

    Args:
        fn: the function.
        parameters: its leading arguments, pytrees of arrays.
        data: its last argument, one array.

    Raises:
        NoRuleError: random numbers meet the data, or samples of the batch meet each other.
    """
    closed, out_tree = _compat.trace(fn, *parameters, data)
    named = jax.tree_util.tree_leaves_with_path(tuple(parameters))
    paths = [_path(keys) for keys, _ in named]
    inputs = [Value(v.aval, path) for v, path in zip(closed.jaxpr.invars, [*paths, ""], strict=True)]
    constants = {Value(v.aval): c for v, c in zip(closed.jaxpr.constvars, closed.consts, strict=True)}
    equations: list[Equation] = []
    outputs = _inline(closed.jaxpr, list(constants), inputs, constants, equations)
    equations = _needed(equations, outputs)
    producer = {v: e for e in equations for v in e.outputs}
    users: dict[Value, list[Equation]] = defaultdict(list)
    for equation in equations:
        for atom in equation.inputs:
            if isinstance(atom, Value):
                users[atom].append(equation)
    reached = _forward(equations, inputs[-1], lambda equation: equation.outputs)
    live = _forward(equations, inputs[-1], _carried) & _backward(equations, outputs, producer, reached)
    _refuse_random(equations, reached)
    _refuse_batch_statistics(fn, parameters, data, equations, reached, outputs)
    return Graph(
        tuple(equations),
        tuple(inputs[:-1]),
        inputs[-1],
        constants,
        tuple(outputs),
        out_tree,
        producer,
        {v: tuple(e) for v, e in users.items()},
        frozenset(reached),
        frozenset(live),
    )


def _path(keys: Sequence[Any]) -> str:
    # The first key is the position among the arguments; flax's top level "params" says nothing about the layer.
    parts = [jax.tree_util.keystr((k,), simple=True, separator="/") for k in keys[1:]]
    return "/".join(parts[1:] if parts[:1] == ["params"] else parts)


def _inline(
    jaxpr: _compat.Jaxpr,
    constvars: Sequence[Atom],
    arguments: Sequence[Atom],
    constants: dict[Value, Any],
    equations: list[Equation],
    callers: tuple[_compat.JaxprEqn, ...] = (),
) -> list[Atom]:
    env: dict[Any, Atom] = dict(zip(jaxpr.constvars, constvars, strict=True))
    env.update(zip(jaxpr.invars, arguments, strict=True))

    def read(v: Any) -> Atom:
        return Constant(v.val, v.aval) if isinstance(v, _compat.Literal) else env[v]

    for source in jaxpr.eqns:
        inputs = tuple(read(v) for v in source.invars)
        inner = _compat.inner_jaxpr(source)
        if inner is None:
            outputs: Sequence[Atom] = tuple(Value(v.aval) for v in source.outvars)
            equations.append(Equation(source, inputs, outputs, callers))  # type: ignore[arg-type]
        else:
            closed_over = [Value(v.aval) for v in inner[0].constvars]
            constants.update(zip(closed_over, inner[1], strict=True))
            outputs = _inline(inner[0], closed_over, inputs, constants, equations, (*callers, source))
        env.update(zip(source.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _needed(equations: Sequence[Equation], outputs: Iterable[Atom]) -> list[Equation]:
    wanted = set(outputs)
    kept = []
    for equation in reversed(equations):
        if wanted.intersection(equation.outputs):
            wanted.update(equation.inputs)
            kept.append(equation)
    return kept[::-1]


def _carried(equation: Equation) -> tuple[Value, ...]:
    if equation.name in STOPS:
        return ()
    return tuple(v for v in equation.outputs if jnp.issubdtype(v.aval.dtype, jnp.inexact))


def _forward(
    equations: Sequence[Equation], data: Value, through: Callable[[Equation], tuple[Value, ...]]
) -> set[Value]:
    found = {data}
    for equation in equations:
        if found.intersection(v for v in equation.inputs if isinstance(v, Value)):
            found.update(through(equation))
    return found


def _backward(
    equations: Sequence[Equation], outputs: Iterable[Atom], producer: dict[Value, Equation], reached: set[Value]
) -> set[Value]:
    found = {o for o in outputs if isinstance(o, Value)}
    for equation in reversed(equations):
        if not found.intersection(_carried(equation)):
            continue
        inputs = equation.inputs
        if equation.name == "div" and inputs[0] in reached and not is_softmax(equation, producer):
            # A norm or a standard deviation: a statistic, as above.
            inputs = inputs[:1]
        found.update(a for a in inputs if isinstance(a, Value))
    return found


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


def _refuse_random(equations: Sequence[Equation], reached: set[Value]) -> None:
    """Refuse live dropout and other noise: a heat map of one random draw explains nothing."""
    random: set[Value] = set()
    for equation in equations:
        if equation.name in _RANDOM or random.intersection(v for v in equation.inputs if isinstance(v, Value)):
            random.update(equation.outputs)
            if reached.intersection(equation.outputs):
                raise equation.refuse("random numbers meet the data; switch dropout off (deterministic=True)")


def _refuse_batch_statistics(
    fn: Callable[..., Any],
    parameters: Sequence[Any],
    data: Any,
    equations: Sequence[Equation],
    reached: set[Value],
    outputs: Sequence[Atom],
) -> None:
    """Refuse BatchNorm in training mode: what a sample's features are would depend on the rest of the batch.

    Only a function from batch to batch is looked at. An axis of the batch's size may be another axis, so a suspect is
    confirmed by tracing again with a batch of one more: the batch axis is the one that grew.
    """
    if np.ndim(data) == 0 or not all(o.aval.shape[:1] == np.shape(data)[:1] for o in outputs):
        return

    def suspect(equation: Equation, size: int) -> bool:
        if equation.name not in _REDUCTIONS or 0 not in equation.params["axes"]:
            return False
        return equation.inputs[0].aval.shape[0] == size

    suspects = [i for i, e in enumerate(equations) if suspect(e, len(data)) and e.inputs[0] in reached]
    if not suspects:
        return
    larger = jax.ShapeDtypeStruct((len(data) + 1, *np.shape(data)[1:]), jnp.result_type(data))
    try:
        closed, _ = _compat.trace(fn, *parameters, larger)
    except (TypeError, ValueError):  # made for one batch size only, so that nothing can be confirmed
        return
    again: list[Equation] = []
    inputs = [Value(v.aval) for v in closed.jaxpr.invars]
    constants = {Value(v.aval): c for v, c in zip(closed.jaxpr.constvars, closed.consts, strict=True)}
    grown = _inline(closed.jaxpr, list(constants), inputs, constants, again)
    again = _needed(again, grown)
    if len(again) != len(equations) or not all(o.aval.shape[:1] == larger.shape[:1] for o in grown):
        return
    for i in suspects:
        if suspect(again[i], larger.shape[0]):
            raise equations[i].refuse(
                "it reduces over the batch, as BatchNorm does in training mode; use the running averages "
                "(use_running_average=True), since a sample alone has to decide its features"
            )
