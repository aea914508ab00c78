"""Relevance propagation as a function transformation: the same outputs with a modified gradient."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dualxda_jax import _check
from dualxda_jax.types import Array
from dualxda_jax.xda import _compat, graph, plan, steps
from dualxda_jax.xda.composites import Composite
from dualxda_jax.xda.graph import Atom, Constant, Value


def lrp(fn: Callable[[Array], Any], *, composite: Composite) -> Callable[[Array], Any]:
    """Give a function the modified gradient of a composite: input × gradient is then its relevance.

    Args:
        fn: a function of the input alone (close over parameters, or use functools.partial), with array outputs.
        composite: which rule goes to which layer.

    Returns:
        A function with fn's outputs. `x * jax.grad(lambda x: lrp(fn)(x)[i])(x)` is the relevance of output i. It is
        traced anew at every call outside of jit. The modified gradient is one with respect to the input: to a linear
        layer's rule its weights are constants, so differentiate fn itself by its parameters. Derivatives of the
        relevance by the parameters are exact.

    Raises:
        ValueError: the composite's first-layer rule puts relevance where the input is zero (flat, w², z-box).
        NoRuleError: when called, if fn contains an operation that relevance cannot pass.
    """
    check_composite(composite)
    if not composite.differentiable:
        _check.fail(
            "composite",
            f"{composite.name}, whose first layer has the rule {composite.first}",
            "one whose relevance is input times modified gradient; use xda.relevance for this one",
        )

    def transformed(x: Array) -> Any:
        inner, parameters = _split_parameters(fn)
        traced = graph.build(inner, parameters, x)
        outputs = run(plan.make(traced, composite, seeded=False), jax.tree.leaves(parameters), x)
        return jax.tree.unflatten(traced.out_tree, outputs)

    return transformed


def _split_parameters(fn: Callable[[Array], Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """See a functools.partial over pytrees of arrays as a function of these and the data: then paths are known."""
    if not isinstance(fn, functools.partial) or fn.keywords:
        return fn, ()
    arrays = all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(fn.args))
    return (fn.func, fn.args) if arrays else (fn, ())


Watch = Callable[[int, str, int, Value, Any], Any]


def run(planned: plan.Plan, parameters: Sequence[Array], data: Array, watch: Watch | None = None) -> list[Array]:
    """Evaluate a plan; differentiate this with respect to `data` for the modified gradient.

    Args:
        planned: what to run.
        parameters: leaves of the function's leading arguments.
        data: its last argument.
        watch: called as watch(step, "input" or "output", position, value, array) for every live value that a step
            reads or writes, and gives the array to go on with.

    Returns:
        The flat outputs.
    """
    traced = planned.graph
    env: dict[Value, Any] = dict(traced.constants)
    env.update(zip(traced.parameters, parameters, strict=True))
    env[traced.data] = data

    def read(atom: Atom) -> Any:
        return atom.value if isinstance(atom, Constant) else env[atom]

    for equation in traced.equations:
        if not any(v in traced.reached for v in equation.outputs):
            computed = _compat.bind(equation.source, [read(a) for a in equation.inputs])
            env.update(zip(equation.outputs, computed, strict=True))
    for number, step in enumerate(planned.steps):

        def seen(side: str, atoms: Sequence[Atom], arrays: Sequence[Any], number: int = number) -> list[Any]:
            if watch is None:
                return list(arrays)
            pairs = enumerate(zip(atoms, arrays, strict=True))
            return [watch(number, side, i, a, v) if traced.is_live(a) else v for i, (a, v) in pairs]

        values = seen("input", step.inputs, [read(a) for a in step.inputs])
        outputs = seen("output", step.outputs, _run_step(planned, step, values))
        env.update(zip(step.outputs, outputs, strict=True))
    return [read(o) for o in traced.outputs]


def _run_step(planned: plan.Plan, step: steps.Step, values: list[Any]) -> tuple[Any, ...]:
    """Run one step, converting between relevance and c where its neighbours speak the other."""
    traced, relevance = planned.graph, planned.relevance
    if not any(traced.is_live(v) for v in step.outputs):
        # Statistics and decisions: constants to the propagation.
        reached = [not traced.is_fixed(a) for a in step.inputs]
        return step.run([steps.detach(v) if r else v for v, r in zip(values, reached, strict=True)], False, False)
    arrives = any(v in relevance for v in step.outputs)
    relevance_out = arrives and step.takes
    first_layer = step.block is not None and step.inputs[0] in relevance
    hands_on = first_layer or (relevance_out and step.gives)
    if not hands_on:
        values = [steps.to_relevance(v) if a in relevance else v for v, a in zip(values, step.inputs, strict=True)]
    outputs = step.run(values, relevance_out, hands_on)
    if arrives and not step.takes:
        outputs = tuple(
            steps.from_relevance(o) if v in relevance else o for o, v in zip(outputs, step.outputs, strict=True)
        )
    return outputs


def check_composite(composite: Any) -> None:
    """Refuse anything that is not a composite, with a hint where a factory was not called."""
    if not isinstance(composite, Composite):
        was = f"the function {composite.__name__}" if callable(composite) else repr(composite)
        _check.fail("composite", was, "a Composite, as xda.composites.epsilon_plus() returns")
