"""Functions that have no heat map, whatever the rules: those that draw random numbers or mix the samples of a batch."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
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


def batch_statistics(
    fn: Callable[..., Any], parameters: Sequence[Any], data: Any, traced: Trace, reached: set[Atom]
) -> None:
    """Refuse BatchNorm in training mode: what a sample's features are would depend on the rest of the batch.

    Only a function from batch to batch is looked at. An axis of the batch's size may be another axis, so a suspect is
    confirmed by tracing again with a batch of one more: the batch axis is the one that grew.
    """
    if np.ndim(data) == 0 or not all(o.aval.shape[:1] == np.shape(data)[:1] for o in traced.outputs):
        return

    def suspect(equation: Equation, size: int) -> bool:
        if equation.name not in _REDUCTIONS or 0 not in equation.params["axes"]:
            return False
        return equation.inputs[0].aval.shape[0] == size

    equations = list(graph.everything(traced.equations))
    suspects = [i for i, e in enumerate(equations) if suspect(e, len(data)) and e.inputs[0] in reached]
    if not suspects:
        return
    larger = jax.ShapeDtypeStruct((len(data) + 1, *np.shape(data)[1:]), jnp.result_type(data))
    try:
        grown = graph.trace(fn, parameters, larger)
    except (TypeError, ValueError):  # made for one batch size only, so that nothing can be confirmed
        return
    again = list(graph.everything(grown.equations))
    if len(again) != len(equations) or not all(o.aval.shape[:1] == larger.shape[:1] for o in grown.outputs):
        return
    for i in suspects:
        if suspect(again[i], larger.shape[0]):
            raise equations[i].refuse(
                "it reduces over the batch, as BatchNorm does in training mode; use the running averages "
                "(use_running_average=True), since a sample alone has to decide its features"
            )
