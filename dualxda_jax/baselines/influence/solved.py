"""What the methods that solve for every query share: solve (H + λ) s = g for a query's gradient g, score sᵀ g_i."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dualxda_jax.baselines.gradients import map_chunks, map_training, spread
from dualxda_jax.baselines.influence import checks, hvp
from dualxda_jax.baselines.protocol import Context, Method, check_queries
from dualxda_jax.types import Array

Numbers = Mapping[str, Any]
"""Hyper-parameters that a solver computes with, as the damping: traced, so that another value compiles nothing."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """What `fit` gives.

    Attributes:
        context: the network and its training set.
        key: for solvers that draw.
    """

    context: Context
    key: Array


Solver = Callable[[Any, Numbers, Fitted, Array], tuple[Array, Array]]
"""(config, numbers, fitted, right-hand sides [m, p]) -> solutions [m, p] and how each ended [m]."""


def method(name: str, config: hvp.Config, numbers: Numbers, solver: Solver, report: Callable[[Array], None]) -> Method:
    """A method whose scores are products of solutions with the training gradients.

    Args:
        name: of the method.
        config: static options.
        numbers: the options that are traced.
        solver: a function at the top of a module, one and the same for every call.
        report: warns or raises where solves ended badly; called outside of a trace only as far as it looks itself.
    """

    def fit(key: Array, context: Context) -> Fitted:
        hvp.selected(context, config)
        return Fitted(context, key)

    def scores(fitted: Fitted, x: Array, targets: Array) -> Array:
        targets = check_queries(fitted.context, x, targets)
        result, ended = _scores(config, solver, dict(numbers), fitted, jnp.asarray(x), targets)
        checks.finite_training(fitted.context, config, result)
        report(ended)
        return checks.finite_scores(result)

    def self_influence(fitted: Fitted) -> Array:
        result, ended = _self_influence(config, solver, dict(numbers), fitted)
        checks.finite_training(fitted.context, config, result)
        report(ended)
        return checks.finite_samples(result)

    return Method(name, fit, scores, self_influence)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(
    config: hvp.Config, solver: Solver, numbers: Numbers, fitted: Fitted, x: Array, targets: Array
) -> tuple[Array, Array]:
    context = fitted.context

    def some(x: Array, targets: Array) -> tuple[Array, Array]:
        solution, ended = solver(config, numbers, fitted, hvp.gradients(context, config, x, targets))
        return hvp.against_training(context, config, solution), ended

    return map_chunks(some, (x, targets), config.vectors)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _self_influence(config: hvp.Config, solver: Solver, numbers: Numbers, fitted: Fitted) -> tuple[Array, Array]:
    context = fitted.context
    # Here the right-hand sides lie over the devices, as the samples do whose gradients they are.
    config = dataclasses.replace(config, vectors=spread(config.vectors))

    def some(x: Array, labels: Array) -> tuple[Array, Array]:
        vectors = hvp.gradients(context, config, x, labels)
        solution, ended = solver(config, numbers, fitted, vectors)
        return jnp.sum(vectors * solution, axis=1), ended

    return map_training(some, context, config.vectors)
