"""Functions that have no heat map, whatever the rules: those that draw random numbers or mix the samples of a batch."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dualxda_jax.xda import graph
from dualxda_jax.xda.graph import Atom, Equation, Trace

_REDUCTIONS = frozenset(["reduce_sum", "reduce_max", "reduce_min", "reduce_prod"])

_RANDOM = frozenset(["random_bits", "random_wrap", "random_fold_in", "random_split", "random_seed", "threefry2x32"])


def random(equations: Sequence[Equation], reached: set[Atom], forward: Callable[..., None]) -> None:
    """Refuse live dropout and other noise: a heat map of one random draw explains nothing."""

    def through(equation: Equation, found: set[Atom]) -> Iterable[Atom]:
        if equation.name not in _RANDOM and not found.intersection(equation.inputs):
            return ()
        if reached.intersection(equation.outputs):
            raise equation.refuse("random numbers meet the data; switch dropout off (deterministic=True)")
        return equation.outputs

    forward(equations, set(), through)


def complex_numbers(equations: Sequence[Equation], reached: set[Atom]) -> None:
    """Refuse complex values of the data: a share of relevance is a quotient of real numbers."""
    for equation in graph.everything(equations):
        made = [v for v in equation.outputs if v in reached]
        if any(jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in made):
            raise equation.refuse(
                "its result is complex, and relevance is a share of real numbers; use real operations"
            )


def nothing_carried(traced: Trace, reached: set[Atom], carried: set[Atom]) -> None:
    """Refuse a function that takes nothing but whole numbers, decisions or constants from the data."""
    outputs = [o for o in traced.outputs if jnp.issubdtype(o.aval.dtype, jnp.inexact)]
    if not any(o in reached for o in outputs) or any(o in carried for o in outputs):
        return
    for equation in graph.everything(traced.equations):
        if carried.intersection(equation.inputs) and not carried.intersection(equation.outputs):
            raise equation.refuse(
                "the outputs depend on the data only through operations that carry no relevance (stop_gradient, "
                "rounding, comparisons, whole numbers)"
            )


def batch_statistics(
    fn: Callable[..., Any], parameters: Sequence[Any], data: Any, traced: Trace, reached: set[Atom]
) -> None:
    """Refuse BatchNorm in training mode: what a sample's features are would depend on the rest of the batch.

    Only a function from batch to batch is looked at. An axis of the batch's size may be another axis, so a suspect is
    confirmed by tracing again with a batch of twice the size: what runs along the batch has grown.
    """
    if np.ndim(data) == 0 or not all(o.aval.shape[:1] == np.shape(data)[:1] for o in traced.outputs):
        return

    size = np.shape(data)[0]

    def reduced(equation: Equation) -> tuple[int, ...]:
        """Sizes of the axes that are reduced away, if it is a reduction."""
        if equation.name not in _REDUCTIONS:
            return ()
        return tuple(equation.inputs[0].aval.shape[axis] for axis in equation.params["axes"])

    def suspect(equation: Equation) -> bool:
        # On one of several devices a batch can have any size.
        mapped = any(caller.primitive.name == "shard_map" for caller in equation.callers)
        return bool(reduced(equation)) and (mapped or size in reduced(equation))

    equations = list(graph.everything(traced.equations))
    suspects = [i for i, e in enumerate(equations) if suspect(e) and e.inputs[0] in reached]
    if not suspects:
        return

    def twice(*arguments: Any) -> Any:
        return fn(*arguments[:-1], jnp.concatenate([arguments[-1]] * 2))

    try:
        grown = graph.trace(twice, parameters, data)
    except (TypeError, ValueError):  # made for one batch size only, so that nothing can be confirmed
        return
    again = list(graph.everything(grown.equations))[1:]
    if len(again) != len(equations) or not all(o.aval.shape[:1] == (2 * size,) for o in grown.outputs):
        return
    for i in suspects:
        if reduced(again[i]) and reduced(again[i]) != reduced(equations[i]):
            raise equations[i].refuse(
                "it reduces over the batch, as BatchNorm does in training mode; use the running averages "
                "(use_running_average=True), since a sample alone has to decide its features"
            )
