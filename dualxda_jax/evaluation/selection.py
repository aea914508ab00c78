"""Are the samples that the attributions call important those that a network needs? Retraining says.

Both metrics rank the training samples by importance Σ_queries |score|, keep a part, and ask `retrain` what a network
trained on that part alone is worth.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dualxda_jax import _check
from dualxda_jax.evaluation.detection import check_scores
from dualxda_jax.types import Array

Retrain = Callable[[np.ndarray], Any]
"""keep[f, n] bool -> values[f], or [f, q] with one for each query: the worth of a network trained on each row's
samples. All rows come in one call, so that the networks can be trained together."""

FRACTIONS = tuple(i / 10 for i in range(1, 11))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectionCurve:
    """What networks trained on parts of the training set are worth.

    Attributes:
        fractions: [f] of the samples that are kept (coreset) or removed (pruning), ascending.
        values: [f] what `retrain` said, averaged over its queries.
        area: scalar, mean height of the curve through the values (trapezoids); the value itself if there is only one.
        per_query: [q] each query's own area, whose mean is `area`; None where `retrain` gave one value a fraction.
    """

    fractions: np.ndarray
    values: np.ndarray
    area: float
    per_query: np.ndarray | None


def coreset_selection(
    scores: Any, retrain: Retrain, *, fractions: Sequence[float] = FRACTIONS, key: Array | None = None
) -> SelectionCurve:
    """Train on the most important samples alone.

    With the mean cross-entropy against the original network's predictions as the value, lower is better. Samples of
    equal importance are taken in a random order, drawn once from `key`: sparse methods give most samples exactly 0, and
    an order by place would prefer whatever the data set starts with.

    Args:
        scores: [q, n] attributions of any method.
        retrain: keep[f, n] bool -> values[f] or [f, q].
        fractions: of the samples that are kept, in (0, 1]; of n at least one sample each.
        key: typed key of the order among equals; None takes `jax.random.key(0)`.

    Returns:
        The curve, by ascending fraction.

    Raises:
        ValueError: scores of another shape or with NaN or infinities, no fraction, one outside (0, 1], one given twice,
            something else than a typed key, a `retrain` that is no function or returns another shape, NaN or what is
            no real numbers.

    Source: arXiv 2402.12118, coreset selection.
    """
    _check_retrain(retrain)
    order = ranking(scores, key=key)
    ascending = _fractions(fractions, order.size, most=1.0)
    keep = np.zeros((ascending.size, order.size), bool)
    for row, fraction in zip(keep, ascending, strict=True):
        row[order[: _count(fraction, order.size)]] = True
    return _curve(ascending, retrain(keep))


def data_pruning(
    scores: Any, retrain: Retrain, *, fractions: Sequence[float] = FRACTIONS[:-1], key: Array | None = None
) -> SelectionCurve:
    """Train without the most important samples.

    With the mean cross-entropy against the original network's predictions as the value, higher is better: what was
    removed was needed. Ties as in `coreset_selection`.

    Args:
        scores: [q, n] attributions of any method.
        retrain: keep[f, n] bool -> values[f] or [f, q].
        fractions: of the samples that are removed, in (0, 1); at least one sample stays.
        key: typed key of the order among equals; None takes `jax.random.key(0)`.

    Returns:
        The curve, by ascending fraction.

    Raises:
        ValueError: as `coreset_selection`; a fraction that leaves nothing.

    Source: arXiv 2402.12118, data pruning.
    """
    _check_retrain(retrain)
    order = ranking(scores, key=key)
    ascending = _fractions(fractions, order.size, most=None)
    keep = np.ones((ascending.size, order.size), bool)
    for row, fraction in zip(keep, ascending, strict=True):
        row[order[: _count(fraction, order.size)]] = False
    return _curve(ascending, retrain(keep))


def ranking(scores: Any, *, key: Array | None = None) -> np.ndarray:
    """Training samples by falling importance Σ_queries |score|.

    Args:
        scores: [q, n].
        key: typed key of the order among equals; None takes `jax.random.key(0)`.

    Returns:
        [n] places in the training set, the most important first.

    Raises:
        ValueError: scores of another shape or with NaN or infinities.
    """
    check_scores(scores)
    if key is not None:
        _check.key("key", key)
    if _check.is_traced(scores):
        _check.fail("scores", "a traced array", "known: networks are retrained outside of jit")
    importance = np.zeros(np.shape(scores)[1])
    for row in np.asarray(scores):
        importance += np.abs(row.astype(np.float64))
    if not np.isfinite(importance).all():
        _check.fail("scores", f"infinities in {np.count_nonzero(~np.isfinite(importance))} columns", "finite")
    shuffled = np.asarray(jax.random.permutation(jax.random.key(0) if key is None else key, importance.size))
    return shuffled[np.argsort(-importance[shuffled], kind="stable")]


def _count(fraction: float, n: int) -> int:
    return max(1, round(fraction * n))


def _fractions(fractions: Sequence[float], n: int, *, most: float | None) -> np.ndarray:
    try:
        values = np.sort(np.asarray(fractions, np.float64))
    except (TypeError, ValueError):
        _check.fail("fractions", repr(fractions), "numbers")
    must = "in (0, 1]" if most else "in (0, 1), leaving at least one sample"
    if values.ndim != 1 or values.size == 0:
        _check.fail("fractions", f"shape {values.shape}", "one number or more")
    if not (values > 0).all() or not (values <= 1).all() or (most is None and _count(values[-1], n) >= n):
        _check.fail("fractions", str([float(v) for v in values]), must)
    if (np.diff(values) == 0).any():
        _check.fail("fractions", str([float(v) for v in values]), "different from each other")
    return values


def _check_retrain(retrain: Any) -> None:
    if not callable(retrain):
        _check.fail("retrain", f"a {type(retrain).__name__}", "a function from keep[f, n] to the worth of each row")


def _curve(fractions: np.ndarray, values: Any) -> SelectionCurve:
    try:
        values = np.asarray(values)
        values = values.astype(np.float64, casting="safe" if np.iscomplexobj(values) else "unsafe")
    except (TypeError, ValueError):
        _check.fail("retrain", f"an output of type {type(values).__name__}", "real numbers, as many for each row")
    if values.ndim not in (1, 2) or len(values) != len(fractions) or values.size == 0:
        _check.fail("retrain", f"an output of shape {values.shape}", f"[{len(fractions)}] or [{len(fractions)}, q]")
    if np.isnan(values).any():
        _check.fail("retrain", f"{np.count_nonzero(np.isnan(values))} NaN in its output", "numbers")
    areas = values[0]
    if len(fractions) > 1:
        areas = np.trapezoid(values, fractions, axis=0) / (fractions[-1] - fractions[0])
    per_query = areas if values.ndim == 2 else None
    means = values.mean(axis=1) if values.ndim == 2 else values
    return SelectionCurve(fractions, means, float(np.mean(areas)), per_query)
