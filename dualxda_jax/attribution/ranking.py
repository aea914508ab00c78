"""The highest or lowest scores of each query, without holding all of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax import _check
from dualxda_jax.attribution import scoring
from dualxda_jax.types import Array, SupportModel, TopK

# Bounds on the block of scores that is held at a time: [q, rows] with q·rows near the budget where it can be.
_BLOCK_ROWS = 1024
_MIN_BLOCK_ROWS = 128
_BLOCK_BUDGET = 1 << 24


def top_k(
    model: SupportModel,
    query: Array,
    targets: Array,
    *,
    k: int,
    largest: bool = True,
    include_intercept: bool = True,
) -> TopK:
    """Rank the support vectors by their score for each query and keep the first k.

    The support vectors are streamed in blocks and merged into a running top k, so memory is bounded by [q, block] for
    any s. Only support vectors are ranked (all other samples score exactly 0). Equal scores are ordered by the place in
    the training set, the lower first; NaN comes before all others, so that it shows. Derivatives are those of the kept
    scores; the ranking itself is held fixed.

    Args:
        model: the support vectors. Rows sharded over an Explicit mesh axis are gathered first.
        query: [q, d] features of the queries.
        targets: [q] integers in 0..k-1, as in `scores`.
        k: how many to keep, from 1 to s.
        largest: True for proponents (highest first), False for opponents (lowest first).
        include_intercept: as in `scores`.

    Returns:
        `TopK` with scores [q, k], best first, and their places in the training set [q, k].

    Raises:
        ValueError: a model that is no `SupportModel`, k outside 1..s, mismatched shapes, targets that are no integers
            in 0..k-1.
    """
    scoring.check_query(model, query)
    scoring.check_targets(model, query, targets)
    s = model.index.shape[0]
    if not (isinstance(k, int | np.integer) and 1 <= k <= s):
        _check.fail("k", k, f"an integer in 1..{s} (the number of support vectors)")
    return _top_k(
        model,
        jnp.asarray(query),
        jnp.asarray(targets),
        k=int(k),
        largest=bool(largest),
        include_intercept=bool(include_intercept),
        rows=_block_rows(s, np.shape(query)[0], int(k)),
    )


def _block_rows(s: int, q: int, k: int) -> int:
    """Support vectors in one block of `top_k`."""
    within_budget = min(_BLOCK_ROWS, max(_MIN_BLOCK_ROWS, _BLOCK_BUDGET // max(1, q)))
    return min(s, max(k, within_budget))


@functools.partial(jax.jit, static_argnames=("k", "largest", "include_intercept", "rows"))
def _top_k(
    model: SupportModel, query: Array, targets: Array, *, k: int, largest: bool, include_intercept: bool, rows: int
) -> TopK:
    squared_intercept = scoring.squared_intercept(model, include_intercept)
    coefficients, features = scoring.gather_rows(model.coefficients), scoring.gather_rows(model.features)
    kept, places = _kept_scores(coefficients, features, query, targets, k, largest, rows, squared_intercept)
    index = scoring.gather_rows(model.index)
    return TopK(scores=kept, index=scoring.pick_rows(index, places))


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6, 7))
def _kept_scores(
    coefficients: Array,
    features: Array,
    query: Array,
    targets: Array,
    k: int,
    largest: bool,
    rows: int,
    squared_intercept: float,
) -> tuple[Array, Array]:
    """The k best scores [q, k] and their rows [q, k] by a running merge over blocks of support vectors."""
    s = features.shape[0]
    sign = 1.0 if largest else -1.0

    def block_keys(start: Array) -> Array:
        block = [jax.lax.dynamic_slice_in_dim(a, start, rows) for a in (coefficients, features)]
        values = scoring.block_scores(block[0], block[1], query, targets, squared_intercept)
        # The sort tells -0 from +0; they are one score and must tie. Of NaN only the positive one ranks first.
        return jnp.where(jnp.isnan(values), jnp.nan, jnp.where(values == 0, 0.0, sign * values))

    def merge(best: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
        # The last block is moved back to end at s; its rows that were seen before must not be ranked twice.
        start = jnp.minimum(number * rows, s - rows)
        fresh = start + jnp.arange(rows, dtype=jnp.int32) >= number * rows
        keys = jnp.where(fresh[None, :], block_keys(start), -jnp.inf)
        # The best so far stand first and equal keys keep their order: ties go to the lower row.
        merged, where = jax.lax.top_k(jnp.concatenate([best[0], keys], axis=1), k)
        earlier = jnp.take_along_axis(best[1], jnp.minimum(where, k - 1), axis=1)
        return (merged, jnp.where(where < k, earlier, start + where - k)), None

    first = jax.lax.top_k(block_keys(jnp.int32(0)), k)
    (keys, places), _ = jax.lax.scan(merge, (first[0], first[1]), jnp.arange(1, -(-s // rows), dtype=jnp.int32))
    return jnp.where(keys == 0, 0.0, sign * keys), places


@_kept_scores.defjvp
def _kept_scores_jvp(
    k: int, largest: bool, rows: int, squared_intercept: float, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[tuple[Array, Array], tuple[Array, Any]]:
    # Only the k kept pairs of a query have a derivative: no need to go through the stream again.
    coefficients, features, query, targets = primals
    kept, places = _kept_scores(coefficients, features, query, targets, k, largest, rows, squared_intercept)

    def pair_scores(coefficients: Array, features: Array, query: Array, row: Array) -> Array:
        dtype = kept.dtype
        products = scoring.pick_rows(features, row).astype(dtype) * query.astype(dtype)
        own = jnp.arange(coefficients.shape[1])[None, :] == targets[:, None]
        coefficient = jnp.sum(jnp.where(own, scoring.pick_rows(coefficients, row).astype(dtype), 0.0), axis=1)
        return coefficient * (jnp.sum(products, axis=1) + squared_intercept)

    def all_scores(coefficients: Array, features: Array, query: Array) -> Array:
        return jax.lax.map(functools.partial(pair_scores, coefficients, features, query), places.T).T

    _, changed = jax.jvp(all_scores, (coefficients, features, query), tuple(tangents[:3]))
    return (kept, places), (changed, np.zeros(places.shape, jax.dtypes.float0))
