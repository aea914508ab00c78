"""Do the top-scored training samples belong to the target?"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualxda_jax import _check

Array = jax.Array

_ROWS_AT_ONCE = 64


def class_detection(scores: Any, train_labels: Any, targets: Any, *, k: int = 5, per_query: bool = False) -> Array:
    """Fraction of the k top-scored training samples whose label is the target.

    Samples tied at the k-th place share the places that are left: of t tied samples for p places each counts p / t.
    Sparse methods score most samples exactly 0, so an order among those would be an accident of storage.

    Args:
        scores: [q, n] attribution of each training sample for the target; higher speaks for it.
        train_labels: [n] integers.
        targets: [q] integers, usually the predicted classes.
        k: how many of the top samples count, 1..n. The paper takes 5, quanda 1.
        per_query: give each query's value, not the mean.

    Returns:
        A scalar in [0, 1], or [q] with per_query.

    Raises:
        ValueError: shapes that do not fit, labels that are not integers, k outside 1..n, no query, NaN among the scores
            (inside a trace, where values are unknown, the queries with NaN get nan instead).

    Source: arXiv 2402.12118, class detection.
    """
    return _detection(scores, train_labels, targets, k, per_query, names=("train_labels", "targets"))


def subclass_detection(scores: Any, train_labels: Any, targets: Any, *, k: int = 5, per_query: bool = False) -> Array:
    """Fraction of the k top-scored training samples that share the query's fine label.

    For a network trained on classes that were merged (2i and 2i + 1): the scores know the merged classes only, the
    labels given here are the fine ones. Ties as in `class_detection`.

    Args:
        scores: [q, n] attribution of each training sample for the predicted merged class.
        train_labels: [n] integers, fine labels.
        targets: [q] integers, the queries' true fine labels.
        k: how many of the top samples count, 1..n.
        per_query: give each query's value, not the mean.

    Returns:
        A scalar in [0, 1], or [q] with per_query.

    Raises:
        ValueError: as `class_detection`.

    Source: arXiv 2402.12118, subclass detection.
    """
    return _detection(scores, train_labels, targets, k, per_query, names=("train_labels", "targets"))


def check_scores(scores: Any) -> None:
    """Check that scores are real [q, n] with at least one of each, and free of NaN where their values are known."""
    _check.shape("scores", scores, ("q", "n"))
    _check.numbers("scores", scores, or_bool=True)
    if 0 in np.shape(scores):
        _check.fail("scores", f"shape {np.shape(scores)}", "[q, n] with at least one query and one training sample")
    if not _check.is_traced(scores):
        # On the host: in a trace of something else, jnp would make tracers of known values.
        values = np.asarray(scores)
        rows = [i for i in range(len(values)) if np.isnan(values[i]).any()]
        if rows:
            _check.fail("scores", f"NaN in {len(rows)} queries, first in row {rows[0]}", "numbers")


def _detection(scores: Any, train_labels: Any, targets: Any, k: int, per_query: bool, names: tuple[str, str]) -> Array:
    check_scores(scores)
    q, n = np.shape(scores)
    for name, labels, length in zip(names, (train_labels, targets), (n, q), strict=True):
        _check.shape(name, labels, (length,))
        _check.integers(name, labels)
        if not _check.is_traced(labels) and (least := np.asarray(labels).min()) < 0:
            _check.fail(name, int(least), "0 or more")
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= n:
        _check.fail("k", k, f"an integer in 1..{n}, the number of training samples")
    values = _top_share(
        floating(scores), jnp.asarray(train_labels).astype(jnp.int32), jnp.asarray(targets).astype(jnp.int32), k=int(k)
    )
    return values if per_query else jnp.mean(values)


def floating(scores: Any) -> Array:
    """An array of floats: what came in, or float32 of it."""
    scores = jnp.asarray(scores)
    return scores if jnp.issubdtype(scores.dtype, jnp.floating) else scores.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="k")
def _top_share(scores: Array, labels: Array, targets: Array, *, k: int) -> Array:
    """[q] shares; the masks exist for a few queries at a time."""

    def one(query: tuple[Array, Array]) -> Array:
        row, target = query
        last = lax.top_k(row, k)[0][-1]
        above, tied, match = row > last, row == last, labels == target
        count = functools.partial(jnp.sum, dtype=jnp.int32)
        places = (k - count(above)).astype(jnp.float32)
        share = places / count(tied).astype(jnp.float32)
        hits = count(above & match).astype(jnp.float32) + share * count(tied & match).astype(jnp.float32)
        return jnp.where(jnp.any(jnp.isnan(row)), jnp.nan, hits / k)

    return lax.map(one, (scores, targets), batch_size=_ROWS_AT_ONCE)
