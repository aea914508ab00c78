"""Primal and dual objective of any dual variables, in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import _check
from dualxda_jax.svm.config import DEFAULT, SolverConfig
from dualxda_jax.svm.inputs import in_trace, prepare, result_dtype
from dualxda_jax.svm.problem import Array, from_coefficients, primal_and_gap, problem_of, weights_of


def objectives(
    features: Array,
    labels: Array,
    coefficients: Array,
    *,
    num_classes: int,
    cost: Array | float,
    intercept_scaling: float = 0.0,
) -> tuple[Array, Array]:
    """Primal objective at W(α) and dual objective at α, computed in float64 whatever dtype comes in.

    Args:
        features: [n, d].
        labels: [n] integers in 0..k-1.
        coefficients: [n, k] feasible dual variables.
        num_classes: k.
        cost: scalar or [n].
        intercept_scaling: b.

    Returns:
        (primal, dual), scalars: float64 NumPy numbers outside of a trace, float32 (float64 under x64) arrays inside.
    """
    features, labels, costs = prepare(features, labels, num_classes, cost, None, DEFAULT)
    _check.shape("coefficients", coefficients, [features.shape[0], num_classes])
    _check.numbers("coefficients", coefficients)
    if not _check.is_traced(intercept_scaling) and not (math.isfinite(intercept_scaling) and intercept_scaling >= 0):
        _check.fail("intercept_scaling", intercept_scaling, "0 or more and finite")
    if not in_trace(features, labels, coefficients, costs):
        x, y, alpha, c = (np.asarray(a) for a in (features, labels, coefficients, costs))
        primal, dual = host_objectives(x, y, alpha, c.astype(np.float64), intercept_scaling)
        return np.float64(primal), np.float64(dual)  # type: ignore[return-value]
    with jax.enable_x64(True):
        parts = _objectives(features, labels, coefficients, costs, intercept_scaling)
    return parts


def host_objectives(
    features: np.ndarray, labels: np.ndarray, alpha: np.ndarray, cost: np.ndarray, scaling: float, chunk: int = 8192
) -> tuple[float, float]:
    """Primal and dual objective in float64 NumPy, chunk by chunk: (primal at W(α), dual at α)."""
    n, k = alpha.shape
    weights, bias, linear = np.zeros((k, features.shape[1])), np.zeros(k), 0.0
    parts = [slice(i, i + chunk) for i in range(0, n, chunk)]
    for part in parts:
        a = np.asarray(alpha[part], np.float64)
        weights += a.T @ np.asarray(features[part], np.float64)
        bias += scaling * a.sum(axis=0)
        linear += a.sum() - a[np.arange(len(a)), labels[part]].sum()
    norm = 0.5 * (float(np.sum(weights**2)) + float(np.sum(bias**2)))
    loss = 0.0
    for part in parts:
        z = np.asarray(features[part], np.float64) @ weights.T + scaling * bias
        rows = np.arange(len(z))
        true = z[rows, labels[part]].copy()
        z += 1.0
        z[rows, labels[part]] -= 1.0
        loss += float(np.sum(cost[part] * (z.max(axis=1) - true)))
    return norm + loss, -norm - linear


@functools.partial(jax.jit, static_argnames=("intercept_scaling",))
def _objectives(
    features: Array, labels: Array, coefficients: Array, costs: Array, intercept_scaling: float
) -> tuple[Array, Array]:
    config = SolverConfig(intercept_scaling=intercept_scaling)
    problem = problem_of(features, labels, costs, coefficients.shape[1], config)
    q = from_coefficients(coefficients.astype(jnp.float64), labels, problem.cost)
    primal, gap = primal_and_gap(problem, weights_of(problem, q), q)
    dtype = result_dtype(features)
    return primal.astype(dtype), (primal - gap).astype(dtype)
