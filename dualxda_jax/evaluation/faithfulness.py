"""How closely the surrogate stands in for the network that it explains."""

import dataclasses
from typing import Any

import jax
import numpy as np

from dualxda_jax import _check
from dualxda_jax.evaluation.bootstrap import Interval, check_bootstrap
from dualxda_jax.types import Array

_AT_ONCE = 1 << 22


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Faithfulness:
    """Agreement of the network's head and the surrogate; 1 is perfect in all four.

    Scalars from `surrogate_faithfulness`; `faithfulness_per_query` and `faithfulness_intervals` fill the same fields.

    Attributes:
        weight_cosine: scalar, cosine of the two weight matrices, row by row, averaged over the classes.
        logit_correlation: scalar, Pearson's correlation of all logits of all queries.
        matthews: scalar, Matthews correlation (multi-class) of the predicted classes.
        kendall_tau: scalar, Kendall's τ-b of the logits of a query, averaged over the queries.
    """

    weight_cosine: Any
    logit_correlation: Any
    matthews: Any
    kendall_tau: Any


def surrogate_faithfulness(
    network_weights: Any, surrogate_weights: Any, network_logits: Any, surrogate_logits: Any
) -> Faithfulness:
    """Four measures of the agreement between the network's head and its surrogate, on the host in float64.

    What has no value is nan, never a number that looks like one: `logit_correlation` if either side's logits are all
    equal; `matthews` if either side predicts one class only. Classes with a zero weight row on either side (they have
    no direction) and queries with all logits equal on either side (they have no order) are left out of their means; the
    mean is nan if none is left.

    Args:
        network_weights: [k, d] of the final linear layer, a row a class.
        surrogate_weights: [k, d].
        network_logits: [q, k].
        surrogate_logits: [q, k].

    Returns:
        The four measures.

    Raises:
        ValueError: shapes that do not fit each other, fewer than 2 classes, no query, NaN or infinite entries.

    Source: arXiv 2402.12118, faithfulness of the surrogate; Gorodkin 2004 for the multi-class Matthews correlation.
    """
    weights, logits = _checked(network_weights, surrogate_weights, network_logits, surrogate_logits)
    return Faithfulness(*(float(value[0]) for value in _measures(_cosines(*weights), _taus(*logits), logits)))


def faithfulness_per_query(
    network_weights: Any, surrogate_weights: Any, network_logits: Any, surrogate_logits: Any
) -> Faithfulness:
    """What `surrogate_faithfulness` is made of: values per query, and per class for the weights.

    Two of the measures are no means of such values: they correlate over all queries at once. Here stand the nearest
    values of a query alone; the intervals of the measures themselves are `faithfulness_intervals`.

    Args:
        network_weights: as in `surrogate_faithfulness`.
        surrogate_weights: as there.
        network_logits: as there.
        surrogate_logits: as there.

    Returns:
        weight_cosine [k] of each class, nan without a direction; logit_correlation [q], Pearson's over a query's k
        logits, nan where they are all equal on either side; matthews [q], 1 where both predict the same class and else
        0; kendall_tau [q], nan without an order. The means of the first and the last are those of
        `surrogate_faithfulness`.

    Raises:
        ValueError: as `surrogate_faithfulness`.
    """
    weights, (a, b) = _checked(network_weights, surrogate_weights, network_logits, surrogate_logits)
    own = [_correlations(x[None], y[None], np.ones((1, 1)))[0] for x, y in zip(a, b, strict=True)]
    same = (a.argmax(axis=1) == b.argmax(axis=1)).astype(np.float64)
    return Faithfulness(_cosines(*weights), np.array(own), same, _taus(a, b))


def faithfulness_intervals(
    network_weights: Any, surrogate_weights: Any, network_logits: Any, surrogate_logits: Any, key: Array, *,
    resamples: int = 1000, level: float = 0.95,
) -> Faithfulness:  # fmt: skip
    """How sure the measures of `surrogate_faithfulness` are: each computed anew on queries drawn with replacement.

    Args:
        network_weights: as in `surrogate_faithfulness`.
        surrogate_weights: as there.
        network_logits: as there.
        surrogate_logits: as there.
        key: typed key.
        resamples: how often queries are drawn.
        level: share of the draws between the ends, in 0..1.

    Returns:
        An `Interval` for each measure, `mean` being the measure itself and `defined` how many queries have a say in it.
        Weights belong to no query: their interval is over the classes, and `defined` counts those. Draws in which a
        measure has no value are left out.

    Raises:
        ValueError: as `surrogate_faithfulness` and `bootstrap`.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    weights, logits = _checked(network_weights, surrogate_weights, network_logits, surrogate_logits)
    check_bootstrap(key, resamples, level)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    cosines, taus = _cosines(*weights), _taus(*logits)
    drawn, left, each = [], resamples, max(1, _AT_ONCE // max(len(taus), len(cosines)))
    while left:
        now = min(left, each)
        left -= now
        counts = _draws(rng, now, len(taus)), _draws(rng, now, len(cosines))
        drawn.append(_measures(cosines, taus, logits, counts))
    values = _measures(cosines, taus, logits)
    defined = (np.isfinite(cosines).sum(), len(taus), len(taus), np.isfinite(taus).sum())
    return Faithfulness(
        *(
            _interval(float(value[0]), np.concatenate(draws), int(count), level)
            for value, draws, count in zip(values, zip(*drawn, strict=True), defined, strict=True)
        )
    )


def _measures(
    cosines: np.ndarray, taus: np.ndarray, logits: tuple[np.ndarray, np.ndarray], counts: Any = None
) -> list[np.ndarray]:
    """[r] of each measure: queries and classes as often as counts ([r, q], [r, k]) say, or once each."""
    queries, classes = (np.ones((1, len(taus))), np.ones((1, len(cosines)))) if counts is None else counts
    return [
        _means(cosines, classes),
        _correlations(*logits, queries),
        _matthews(*logits, queries),
        _means(taus, queries),
    ]


def _checked(
    network_weights: Any, surrogate_weights: Any, network_logits: Any, surrogate_logits: Any
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    weights = _pair(("network_weights", network_weights), ("surrogate_weights", surrogate_weights), ("k", "d"))
    logits = _pair(("network_logits", network_logits), ("surrogate_logits", surrogate_logits), ("q", "k"))
    k = weights[0].shape[0]
    if k < 2:
        _check.fail("network_weights", f"{k} rows", "at least 2, one a class")
    if logits[0].shape[1] != k:
        _check.fail("network_logits", f"shape {logits[0].shape}", f"[q, {k}], a column for each row of the weights")
    return weights, logits


def _pair(
    network: tuple[str, Any], surrogate: tuple[str, Any], letters: tuple[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    _check.shape(*network, letters)
    _check.shape(*surrogate, np.shape(network[1]))
    for name, values in (network, surrogate):
        if 0 in np.shape(values):
            _check.fail(name, f"shape {np.shape(values)}", "not empty")
        bad = np.size(values) - np.count_nonzero(np.isfinite(np.asarray(values, np.float64)))
        if bad:
            _check.fail(name, f"{bad} NaN or infinite entries", "finite")
    return np.asarray(network[1], np.float64), np.asarray(surrogate[1], np.float64)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[k] of the rows; nan where one has no direction."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    defined = norms > 0.0
    return np.where(defined, np.sum(a * b, axis=1) / np.where(defined, norms, 1.0), np.nan)


def _correlations(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[r] Pearson's correlations of all logits, each query as often as counts [r, q] say."""
    # Without their means, so that little is lost in the differences of squares below.
    x, y = a - a.mean(), b - b.mean()
    sums = [(counts @ v.sum(axis=1)) / (counts.sum(axis=1) * a.shape[1]) for v in (x, y, x * x, y * y, x * y)]
    mean_x, mean_y, xx, yy, xy = sums
    spread_x, spread_y = xx - mean_x**2, yy - mean_y**2
    # Equal values leave what rounding leaves.
    known = (spread_x > 1e-14 * xx) & (spread_y > 1e-14 * yy) & (np.ptp(a) > 0.0) & (np.ptp(b) > 0.0)
    scale = np.sqrt(np.where(known, spread_x * spread_y, 1.0))
    return np.where(known, (xy - mean_x * mean_y) / scale, np.nan)


def _matthews(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[r] Matthews correlations of the predictions, each query as often as counts [r, q] say."""
    first, second, k = a.argmax(axis=1), b.argmax(axis=1), a.shape[1]
    total, agree = counts.sum(axis=1), counts @ (first == second)
    in_a, in_b = counts @ np.eye(k)[first], counts @ np.eye(k)[second]
    spread = (total**2 - (in_a**2).sum(axis=1)) * (total**2 - (in_b**2).sum(axis=1))
    value = (agree * total - (in_a * in_b).sum(axis=1)) / np.sqrt(np.where(spread > 0.0, spread, 1.0))
    return np.where(spread > 0.0, value, np.nan)


def _taus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[q] Kendall's τ-b of each query's logits; nan where one side has no order."""
    # Loading scipy.stats takes longer than importing this package.
    from scipy.stats import kendalltau

    ordered = (np.ptp(a, axis=1) > 0.0) & (np.ptp(b, axis=1) > 0.0)
    found = np.full(len(a), np.nan)
    found[ordered] = [kendalltau(x, y).statistic for x, y in zip(a[ordered], b[ordered], strict=True)]
    return found


def _means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[r] means of the values that are known, each as often as counts [r, n] say."""
    known = np.isfinite(values)
    total = counts @ known
    return np.where(total > 0, counts @ np.where(known, values, 0.0) / np.where(total > 0, total, 1.0), np.nan)


def _draws(rng: np.random.Generator, resamples: int, size: int) -> np.ndarray:
    """[r, n] how often each of n is drawn in n draws with replacement."""
    return rng.multinomial(size, np.full(size, 1 / size), size=resamples).astype(np.float64)


def _interval(value: float, draws: np.ndarray, defined: int, level: float) -> Interval:
    known = draws[np.isfinite(draws)]
    ends: Any = (np.nan, np.nan)
    if known.size and np.isfinite(value):
        ends = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    fields: tuple[Any, ...] = (value, float(ends[0]), float(ends[1]), defined)
    return Interval(*fields)
