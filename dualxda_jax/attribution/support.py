"""From a solution to its support vectors, and from their scores back to the whole training set."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dualxda_jax import _check
from dualxda_jax.attribution import scoring
from dualxda_jax.types import Array, DualSolution, SupportModel


def compress(features: Any, labels: Any, solution: DualSolution, *, tolerance: float = 0.0) -> SupportModel:
    """Keep the support vectors of a solution, in the order of the training set.

    Runs on the host: s depends on values, so it cannot be compiled. Derivatives pass through (`jax.grad` of a function
    that solves, compresses and scores) while which rows are kept is held fixed. Only support rows are read from
    `features`, which may be a memory-mapped array. Rows with NaN coefficients are kept, so that they show.

    Args:
        features: [n, d] the features that were solved on, jax or numpy.
        labels: [n] integers in 0..k-1.
        solution: what `svm.solve` returned for them.
        tolerance: rows whose coefficients are all at most this in absolute value are dropped. Where that drops any that
            are not zero, `weights` and `intercept` are those of the rows that stay: scores sum to logits all the same.

    Returns:
        A `SupportModel` with s support vectors; s may be 0. Coefficients and features keep their dtypes.

    Raises:
        ValueError: inside jit or vmap, a solution that is none, mismatched shapes, labels that are no integers in
            0..k-1, a bad tolerance.
    """
    if not isinstance(solution, DualSolution):
        _check.fail("solution", f"a {type(solution).__name__}", "the DualSolution that svm.solve returned")
    _check.shape("solution.coefficients", solution.coefficients, ("n", "k"))
    n, k = solution.coefficients.shape
    features, labels = (a if hasattr(a, "shape") else np.asarray(a) for a in (features, labels))
    _check.shape("solution.weights", solution.weights, (k, "d"))
    _check.shape("features", features, (n, solution.weights.shape[1]))
    _check.shape("labels", labels, (n,))
    _check.integers("labels", labels)
    _check.class_range("labels", labels, k)
    _check.shape("solution.intercept", solution.intercept, (k,))
    _check.within("tolerance", tolerance, 0, sys.float_info.max, "a finite number, at least 0")

    coefficients = jax.lax.stop_gradient(jnp.asarray(solution.coefficients))
    if _check.is_traced(coefficients):
        _check.fail("solution", "a traced value", "known: compress runs outside of jit and vmap")
    largest = np.asarray(_row_maxima(coefficients))
    index = np.flatnonzero(~(largest <= tolerance)).astype(np.int32)
    kept, rows = _take_rows(solution.coefficients, index), _take_rows(features, index)
    weights, intercept = solution.weights, solution.intercept
    if np.any((largest > 0.0) & (largest <= tolerance)):
        weights, intercept = scoring.weights_of(kept, rows, solution.intercept_scaling)
    return SupportModel(
        coefficients=kept,
        features=rows,
        labels=_take_rows(labels, index),
        index=jnp.asarray(index),
        weights=weights,
        intercept=intercept,
        intercept_scaling=solution.intercept_scaling,
        train_size=n,
    )


def dense(model: SupportModel, scores: Array) -> Array:
    """Spread scores of support vectors over the whole training set.

    Args:
        model: the support vectors.
        scores: [q, s] as `scores` returns them.

    Returns:
        [q, n] with exact zeros for the samples that are no support vectors.

    Raises:
        ValueError: scores of another shape, a model that is no `SupportModel`.
    """
    scoring.check_model(model)
    _check.shape("scores", scores, ("q", model.index.shape[0]))
    return _dense(model, jnp.asarray(scores))


@jax.jit
def _row_maxima(coefficients: Array) -> Array:
    return jnp.max(jnp.abs(coefficients), axis=1)


def _take_rows(array: Any, index: np.ndarray) -> Array:
    if not isinstance(array, jax.Array):
        return jnp.asarray(np.asarray(array[index]))
    sharding = jax.lax.stop_gradient(array).sharding
    if isinstance(sharding, NamedSharding) and sharding.num_devices > 1:
        # Support rows lie anywhere: only they are collected, and every device gets them all.
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        return array.at[index].get(out_sharding=everywhere)
    return array[index]


@jax.jit
def _dense(model: SupportModel, values: Array) -> Array:
    s = model.index.shape[0]
    if s == 0:
        return jnp.zeros((values.shape[0], model.train_size), values.dtype)
    index = scoring.gather_rows(model.index)
    place = jnp.full(model.train_size, s, jnp.int32).at[index].set(jnp.arange(s, dtype=jnp.int32))
    # Over an Explicit mesh axis the scores of one query lie on several devices, and any of them may be needed anywhere.
    values = scoring.gather_rows(values.T).T
    return jnp.take(values, place, axis=1, mode="fill", fill_value=0)
