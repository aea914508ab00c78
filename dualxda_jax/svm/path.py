"""Many costs at once: a path from the smallest cost to the largest, each solve warm-started by the one before."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualxda_jax import _check
from dualxda_jax.svm import solver
from dualxda_jax.svm.config import DEFAULT, SolverConfig
from dualxda_jax.types import DualSolution

Array = jax.Array


def solve_path(
    features: Array,
    labels: Array,
    *,
    num_classes: int,
    costs: Any,
    config: SolverConfig = DEFAULT,
    smoothing: Array | float = 0.0,
) -> DualSolution:
    """Solve for m costs.

    Args:
        features: [n, d].
        labels: [n] integers in 0..k-1.
        num_classes: k.
        costs: [m] positive, in any order.
        config: static options, the same for all.
        smoothing: scalar γ, as in `solve`.

    Returns:
        A `DualSolution` whose every array has a leading m axis, in the order of `costs`.

    Raises:
        ValueError: as `solve`; costs that are not a list of positive finite numbers.
    """
    shape = np.shape(costs)
    if len(shape) != 1 or shape[0] == 0:
        _check.fail("costs", f"shape {shape}", "[m] with m of 1 or more")
    if _check.is_traced(features, labels, costs, smoothing):
        return _traced_path(features, labels, jnp.asarray(costs, jnp.float32), num_classes, config, smoothing)
    values = np.asarray(costs, np.float64)
    if not (np.isfinite(values).all() and (values > 0).all()):
        _check.fail("costs", values.tolist(), "positive and finite")
    order = np.argsort(values, kind="stable")
    solutions: list[Any] = [None] * len(values)
    previous = None
    for i in order:
        given: dict[str, Any] = {"cost": float(values[i]), "init": previous, "smoothing": smoothing}
        previous = solver.solve(features, labels, num_classes=num_classes, config=config, **given)
        solutions[i] = previous
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *solutions)


def _traced_path(
    features: Array, labels: Array, costs: Array, num_classes: int, config: SolverConfig, smoothing: Any
) -> DualSolution:
    order = jnp.argsort(costs)

    def one(before: Any, cost: Array) -> tuple[Any, DualSolution]:
        alpha, weights, intercept = before
        none: Any = None
        warm = DualSolution(alpha, weights, intercept, config.intercept_scaling, none)
        given: dict[str, Any] = {"cost": cost, "init": warm, "smoothing": smoothing}
        solution = solver.solve(features, labels, num_classes=num_classes, config=config, **given)
        parts = solution.coefficients, solution.weights, solution.intercept
        return lax.stop_gradient(parts), solution

    dtype = jnp.float64 if features.dtype == jnp.float64 else jnp.float32
    (n, d), k = features.shape, num_classes
    first = jnp.zeros((n, k), dtype), jnp.zeros((k, d), dtype), jnp.zeros(k, dtype)
    solutions = lax.scan(one, first, costs[order])[1]
    back = jnp.argsort(order)
    return jax.tree.map(lambda a: a[back], solutions)
