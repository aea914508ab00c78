"""A traced function as a list of equations with call-like primitives inlined; loops and branches keep theirs apart."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

import jax

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
class Body:
    """The inner function of a loop, or one branch.

    Attributes:
        equations: in order of execution.
        inputs: what it is given: constants, carry and slices of a loop; the operands of a branch.
        outputs: what it gives back: carry and slices of a loop; the results of a branch.
    """

    equations: tuple["Equation", ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Atom, ...]


@dataclasses.dataclass(eq=False, frozen=True)
class Equation:
    """One primitive applied to atoms.

    Attributes:
        source: the equation as jax traced it.
        inputs: what it reads.
        outputs: what it computes.
        callers: the call-like equations that it was inlined from, outermost first.
        bodies: the body of a loop, the branches of a branching; empty for anything else.
    """

    source: _compat.JaxprEqn
    inputs: tuple[Atom, ...]
    outputs: tuple[Value, ...]
    callers: tuple[_compat.JaxprEqn, ...] = ()
    bodies: tuple[Body, ...] = ()

    @property
    def name(self) -> str:
        return self.source.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        return self.source.params

    @property
    def operands(self) -> tuple[Atom, ...]:
        """What the bodies are given: everything but the number of the branch."""
        return self.inputs[_compat.decisions(self.source) :]

    @property
    def feedback(self) -> tuple[tuple[Atom, Value], ...]:
        """The pairs (output, input) of a loop's body that make the carry."""
        places = _compat.carries(self.source) if self.bodies else ()
        return tuple((self.bodies[0].outputs[out], self.bodies[0].inputs[into]) for out, into in places)

    def refuse(self, reason: str) -> NoRuleError:
        """The error for an operation that relevance cannot pass."""
        return NoRuleError(f"no rule for `{self.name}` at {_compat.place([*self.callers, self.source])}: {reason}")


@dataclasses.dataclass(eq=False, frozen=True)
class Graph:
    """A function as equations in order of execution; or the part of one that is a body, with the same facts.

    Attributes:
        equations: those that the outputs need.
        inputs: its flat arguments. Of the whole function these are the parameters' leaves and, last, the data.
        sources: where relevance is wanted: the data, or what was looked up with data that are whole numbers.
        constants: values that the function closed over.
        outputs: flat outputs.
        out_tree: their tree.
        producer: the equation that computes a value.
        users: the equations that read it.
        origin: what a body's constant or slice is outside of it.
        reached: values that depend on the data.
        live: values through which relevance flows: they depend on the data and the outputs depend on them, both by
            operations that carry relevance.
    """

    equations: tuple[Equation, ...]
    inputs: tuple[Value, ...]
    sources: tuple[Value, ...]
    constants: dict[Value, Any]
    outputs: tuple[Atom, ...]
    out_tree: Any
    producer: dict[Value, Equation]
    users: dict[Value, tuple[Equation, ...]]
    origin: dict[Value, Atom]
    reached: frozenset[Atom]
    live: frozenset[Atom]

    @property
    def data(self) -> Value:
        return self.inputs[-1]

    def is_live(self, atom: Atom) -> TypeGuard[Value]:
        return isinstance(atom, Value) and atom in self.live

    def is_fixed(self, atom: Atom) -> bool:
        """Whether the data have no influence on it."""
        return atom not in self.reached

    def inside(self, body: Body) -> "Graph":
        """The graph of a loop's body or of a branch."""
        return dataclasses.replace(
            self, equations=body.equations, inputs=body.inputs, outputs=body.outputs, sources=(), out_tree=None
        )


@dataclasses.dataclass(eq=False, frozen=True)
class Trace:
    """What was traced, before anything is known about it. Attributes as in `Graph`."""

    equations: tuple[Equation, ...]
    inputs: tuple[Value, ...]
    constants: dict[Value, Any]
    outputs: tuple[Atom, ...]
    out_tree: Any
    origin: dict[Value, Atom]


def trace(fn: Callable[..., Any], parameters: Sequence[Any], data: Any) -> Trace:
    """Trace fn(*parameters, data).

    Args:
        fn: the function.
        parameters: its leading arguments, pytrees of arrays.
        data: its last argument, one array.
    """
    closed, out_tree = _compat.trace(fn, *parameters, data)
    named = jax.tree_util.tree_leaves_with_path(tuple(parameters))
    paths = [_path(keys) for keys, _ in named]
    inputs = [Value(v.aval, path) for v, path in zip(closed.jaxpr.invars, [*paths, ""], strict=True)]
    inliner = _Inliner({}, {})
    equations, outputs = inliner.function(closed, inputs, ())
    return Trace(equations, tuple(inputs), inliner.constants, outputs, out_tree, inliner.origin)


def everything(equations: Sequence[Equation]) -> Iterator[Equation]:
    """Every equation, those of loops and branches after the one that holds them."""
    for equation in equations:
        yield equation
        for body in equation.bodies:
            yield from everything(body.equations)


def wiring(equations: Sequence[Equation]) -> tuple[dict[Value, Equation], dict[Value, tuple[Equation, ...]]]:
    """Who computes a value, and who reads it."""
    users: dict[Value, list[Equation]] = defaultdict(list)
    for equation in everything(equations):
        for atom in equation.inputs:
            if isinstance(atom, Value):
                users[atom].append(equation)
    producer = {v: e for e in everything(equations) for v in e.outputs}
    return producer, {v: tuple(e) for v, e in users.items()}


def _path(keys: Sequence[Any]) -> str:
    # The first key is the position among the arguments; flax's top level "params" says nothing about the layer.
    parts = [jax.tree_util.keystr((k,), simple=True, separator="/") for k in keys[1:]]
    return "/".join(parts[1:] if parts[:1] == ["params"] else parts)


@dataclasses.dataclass(frozen=True)
class _Inliner:
    constants: dict[Value, Any]
    origin: dict[Value, Atom]

    def function(
        self, closed: _compat.ClosedJaxpr, inputs: Sequence[Atom], callers: tuple[_compat.JaxprEqn, ...]
    ) -> tuple[tuple[Equation, ...], tuple[Atom, ...]]:
        """The equations that a function's outputs need, and these outputs."""
        equations: list[Equation] = []
        outputs = self._inline(closed.jaxpr, closed.consts, inputs, equations, callers)
        return tuple(_needed(equations, outputs)), tuple(outputs)

    def _inline(
        self,
        jaxpr: _compat.Jaxpr,
        consts: Sequence[Any],
        arguments: Sequence[Atom],
        equations: list[Equation],
        callers: tuple[_compat.JaxprEqn, ...],
    ) -> list[Atom]:
        closed_over = [Value(v.aval) for v in jaxpr.constvars]
        self.constants.update(zip(closed_over, consts, strict=True))
        env: dict[Any, Atom] = dict(zip(jaxpr.constvars, closed_over, strict=True))
        env.update(zip(jaxpr.invars, arguments, strict=True))

        def read(v: Any) -> Atom:
            return Constant(v.val, v.aval) if isinstance(v, _compat.Literal) else env[v]

        for source in jaxpr.eqns:
            inputs = tuple(read(v) for v in source.invars)
            inner = _compat.inner_jaxpr(source)
            if inner is None:
                outputs: Sequence[Atom] = tuple(Value(v.aval) for v in source.outvars)
                bodies = tuple(self._body(source, inputs, b, callers) for b in _compat.bodies(source))
                equations.append(Equation(source, inputs, outputs, callers, bodies))  # type: ignore[arg-type]
            else:
                outputs = self._inline(inner[0], inner[1], inputs, equations, (*callers, source))
            env.update(zip(source.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _body(
        self,
        source: _compat.JaxprEqn,
        inputs: Sequence[Atom],
        closed: _compat.ClosedJaxpr,
        callers: tuple[_compat.JaxprEqn, ...],
    ) -> Body:
        given = tuple(Value(v.aval) for v in closed.jaxpr.invars)
        carried = {into for _, into in _compat.carries(source)}
        outside = inputs[_compat.decisions(source) :]
        # A carry is no longer what it was outside once a round is over.
        self.origin.update((v, a) for i, (v, a) in enumerate(zip(given, outside, strict=True)) if i not in carried)
        equations, outputs = self.function(closed, given, (*callers, source))
        return Body(equations, given, outputs)


def _needed(equations: Sequence[Equation], outputs: Sequence[Atom]) -> list[Equation]:
    wanted = set(outputs)
    kept = []
    for equation in reversed(equations):
        if wanted.intersection(equation.outputs):
            wanted.update(equation.inputs)
            kept.append(equation)
    return kept[::-1]
