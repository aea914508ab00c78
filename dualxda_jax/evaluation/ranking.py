"""Do the scores rank what was planted (mislabelled samples, a shortcut) and what retraining shows?

No order is invented among equal scores: they share their ranks or enter together.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualxda_jax import _check
from dualxda_jax.evaluation.detection import check_scores, floating

Array = jax.Array

_ROWS_AT_ONCE = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MislabelCurve:
    """How soon the corrupted samples are found when the training set is inspected from the highest self-influence down.

    Attributes:
        curve: [n] fraction of the corrupted samples found among the first 1..n.
        area: scalar, mean of the curve.
        normalized: scalar, area between the worst order (0) and the best (1); a random order has 0.5 on average.
    """

    curve: Array
    area: Array
    normalized: Array


def mislabeling_detection(self_influence: Any, corrupted: Any) -> MislabelCurve:
    """Rank by self-influence and see how soon the corrupted labels turn up.

    Samples of equal self-influence are inspected in every order at once: the curve is the mean over the orders.

    Args:
        self_influence: [n] higher is more suspicious.
        corrupted: [n] bool, which labels were changed.

    Returns:
        The curve, its area, and the normalised area. With none corrupted all of it is nan; with all corrupted, where
        every order is the best and the worst, `normalized` is. The values whose mean is `normalized`, one for each
        corrupted sample, are `place_values`.

    Raises:
        ValueError: shapes that do not fit, `corrupted` not bool, no sample, NaN (inside a trace it gives nan instead).

    Source: arXiv 2402.12118, mislabelling detection; with c corrupted the best area is (n − c + (c + 1)/2) / n, the
        worst (c + 1) / (2 n).
    """
    _check_influence(self_influence, corrupted)
    return _mislabel(floating(self_influence), jnp.asarray(corrupted))


def place_values(self_influence: Any, corrupted: Any) -> np.ndarray:
    """What each corrupted sample adds to the normalised area of `mislabeling_detection`: their mean is that area.

    This metric has no queries; its interval is that of these values (`bootstrap`).

    Args:
        self_influence: [n] higher is more suspicious.
        corrupted: [n] bool, which labels were changed.

    Returns:
        [c] float64, one for each corrupted sample in the order of the training set; the higher, the earlier it is
        inspected. Equal ones at their average place. With none corrupted [0], with all corrupted nan.

    Raises:
        ValueError: as `mislabeling_detection`; traced arrays, since c has to be known.
    """
    _check_influence(self_influence, corrupted)
    if _check.is_traced(self_influence, corrupted):
        _check.fail("self_influence", "a traced array", "known: the number of values is that of the corrupted samples")
    values, corrupted = np.asarray(floating(self_influence)), np.asarray(corrupted)
    n, c = values.size, np.count_nonzero(corrupted)
    if c == n:
        return np.full(n, np.nan)
    ordered = np.sort(-values)
    first, last = np.searchsorted(ordered, -values, "left"), np.searchsorted(ordered, -values, "right")
    place = (first + last + 1) / 2  # 1..n, the mean over equal ones
    areas = (n - place[corrupted] + 1) / n
    best, worst = (n - c + (c + 1) / 2) / n, (c + 1) / (2 * n)
    return (areas - worst) / (best - worst)


def _check_influence(self_influence: Any, corrupted: Any) -> None:
    _check.shape("self_influence", self_influence, ("n",))
    _check.numbers("self_influence", self_influence, or_bool=True)
    n = np.shape(self_influence)[0]
    if n == 0:
        _check.fail("self_influence", "no samples", "[n] with n > 0")
    if not _check.is_traced(self_influence):
        bad = np.count_nonzero(np.isnan(np.asarray(self_influence)))
        if bad:
            _check.fail("self_influence", f"{bad} NaN", "numbers")
    _bools("corrupted", corrupted, (n,))


def shortcut_detection(scores: Any, marked: Any, *, keep: Any, per_query: bool = False) -> Array:
    """Average precision of the scores against "this training sample carries the mark", averaged over some queries.

    Precision counts at the end of each group of equal scores, as if its members entered together.

    Args:
        scores: [q, n] attribution for the class that the shortcut leads to.
        marked: [n] bool, which training samples carry the mark.
        keep: [q] bool, the queries that count: predicted as that class, but not of it.
        per_query: give each kept query's value, not the mean; `keep` then has to be known outside of a trace.

    Returns:
        A scalar in [0, 1], or [keep.sum()] with per_query. nan if no query is kept or no sample marked.

    Raises:
        ValueError: shapes that do not fit, `marked` or `keep` not bool, NaN scores (inside a trace they give
            nan instead).

    Source: arXiv 2402.12118, shortcut detection (AUPRC).
    """
    check_scores(scores)
    q, n = np.shape(scores)
    _bools("marked", marked, (n,))
    _bools("keep", keep, (q,))
    marked = jnp.asarray(marked)
    if _check.is_traced(keep):
        if per_query:
            _check.fail("keep", "a traced array", "known outside of the trace when per_query is True")
        values = _average_precision(floating(scores), marked)
        return jnp.sum(jnp.where(keep, values, 0.0)) / jnp.sum(keep, dtype=jnp.int32).astype(values.dtype)
    kept = np.flatnonzero(np.asarray(keep))
    values = _average_precision(floating(scores)[kept], marked) if kept.size else jnp.zeros(0)
    if per_query:
        return values
    return jnp.mean(values) if kept.size else jnp.asarray(jnp.nan)


def lds(scores: Any, subsets: Any, outputs: Any) -> Array:
    """Linear datamodelling score: do summed attributions of a subset rank what a network trained on it says?

    Per query, Spearman's correlation over the subsets, ties at their average rank, between Σ_{i ∈ S} scores_i and the
    output of the network retrained on S. The paper's output is the log-softmax at the target; TRAK's is the margin, and
    dattri's a loss, which has the opposite sign.

    Args:
        scores: [q, n].
        subsets: [m, n] bool, a row a subset, with m of at least 2.
        outputs: [m, q] of the networks retrained on them.

    Returns:
        [q]; nan where the sums or the outputs are the same for all subsets, or where infinite scores leave no sum.
        Sums are those of float32 at least, whatever the scores' type.

    Raises:
        ValueError: shapes that do not fit, `subsets` not bool, a subset without members, fewer than 2 subsets, NaN,
            scores or outputs that are no real numbers.

    Source: Park et al., TRAK, ICML 2023; arXiv 2402.12118.
    """
    check_scores(scores)
    q, n = np.shape(scores)
    _bools("subsets", subsets, ("m", n))
    m = np.shape(subsets)[0]
    if m < 2:
        _check.fail("subsets", f"{m} rows", "at least 2, one a subset")
    _check.shape("outputs", outputs, (m, q))
    _check.numbers("outputs", outputs, or_bool=True)
    if not _check.is_traced(subsets):
        empty = np.flatnonzero(~np.asarray(subsets).any(axis=1))
        if empty.size:
            _check.fail("subsets", f"{empty.size} without members, first in row {empty[0]}", "subsets with members")
    if not _check.is_traced(outputs) and np.isnan(np.asarray(outputs)).any():
        _check.fail("outputs", "NaN", "numbers")
    return _lds(floating(scores), jnp.asarray(subsets), floating(outputs))


class _Ties(NamedTuple):
    """Where the group of equal values around each place of a sorted array starts and ends, [n] both."""

    start: Array
    end: Array


def _ties(ordered: Array) -> _Ties:
    n = ordered.shape[0]
    place = jnp.arange(n, dtype=jnp.int32)
    differs = ordered[1:] != ordered[:-1]
    edge = jnp.ones(1, bool)
    start = lax.cummax(jnp.where(jnp.concatenate([edge, differs]), place, 0))
    end = lax.cummin(jnp.where(jnp.concatenate([differs, edge]), place, n - 1), reverse=True)
    return _Ties(start, end)


@jax.jit
def _mislabel(values: Array, corrupted: Array) -> MislabelCurve:
    n = values.shape[0]
    order = jnp.argsort(values, descending=True)
    ties = _ties(values[order])
    # Counts stay integers: a sum of fractions would drift over a million samples.
    found = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(corrupted[order], dtype=jnp.int32)])
    before, inside = found[ties.start], found[ties.end + 1] - found[ties.start]
    passed = (jnp.arange(n, dtype=jnp.int32) - ties.start + 1).astype(jnp.float32)
    share = passed / (ties.end - ties.start + 1).astype(jnp.float32)
    total = found[-1].astype(jnp.float32)
    curve = (before.astype(jnp.float32) + share * inside.astype(jnp.float32)) / total
    curve = jnp.where(jnp.any(jnp.isnan(values)), jnp.nan, curve)
    area = jnp.mean(curve)
    best, worst = (n - total + (total + 1) / 2) / n, (total + 1) / (2 * n)
    defined = (found[-1] > 0) & (found[-1] < n)
    return MislabelCurve(curve, area, jnp.where(defined, (area - worst) / (best - worst), jnp.nan))


@jax.jit
def _average_precision(scores: Array, marked: Array) -> Array:
    """[q] average precision of each row."""

    def one(row: Array) -> Array:
        order = jnp.argsort(row, descending=True)
        hit = marked[order]
        end = _ties(row[order]).end
        precision = jnp.cumsum(hit, dtype=jnp.int32)[end].astype(jnp.float32) / (end + 1).astype(jnp.float32)
        value = jnp.sum(jnp.where(hit, precision, 0.0)) / jnp.sum(hit, dtype=jnp.int32).astype(jnp.float32)
        return jnp.where(jnp.any(jnp.isnan(row)), jnp.nan, value)

    return lax.map(one, scores, batch_size=_ROWS_AT_ONCE)


@jax.jit
def _lds(scores: Array, subsets: Array, outputs: Array) -> Array:
    # Sums in a narrow type would tie, or overflow.
    scores = scores.astype(jnp.float32) if jnp.finfo(scores.dtype).bits < 32 else scores
    sums = jnp.einsum("qn,mn->qm", scores, subsets.astype(scores.dtype), precision=lax.Precision.HIGHEST)
    return lax.map(lambda pair: _spearman(*pair), (sums, outputs.T), batch_size=_ROWS_AT_ONCE)


def _spearman(a: Array, b: Array) -> Array:
    x, y = _ranks(a), _ranks(b)
    value = jnp.sum(x * y) / jnp.sqrt(jnp.sum(x * x) * jnp.sum(y * y))
    return jnp.where(jnp.any(jnp.isnan(a)) | jnp.any(jnp.isnan(b)), jnp.nan, value)


def _ranks(values: Array) -> Array:
    """[m] doubled ranks about their mean, equal values at their average.

    Integers throughout: equal values are at 0 exactly, where the mean of floats would leave its rounding error.
    """
    count = functools.partial(jnp.sum, axis=1, dtype=jnp.int32)
    below = count(values[None, :] < values[:, None])
    same = count(values[None, :] == values[:, None])
    return (2 * below + same - values.shape[0]).astype(jnp.float32)


def _bools(argument: str, array: Any, expected: tuple[int | str, ...]) -> None:
    _check.shape(argument, array, expected)
    dtype = array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype
    if not np.issubdtype(dtype, np.bool_):
        _check.fail(argument, f"dtype {dtype}", "bool")
