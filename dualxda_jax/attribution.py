"""Attribution of a query to the training samples through the dual variables of the surrogate (DualDA).

A solution is first reduced to its support vectors (`compress`, on the host, because their number depends on values).
Everything after that is a pure function of a `SupportModel` and works under `jit`, `vmap`, `grad` and on a mesh.
The score of training sample i for class c at a query with features φ is α_ic (⟨φ_i, φ⟩ + b²); scores of all samples
sum to the surrogate's logit of c. Positive: i speaks for c (proponent); negative: against it (opponent).

Products are taken at the highest precision and accumulated in float32 or wider, whatever the inputs' dtypes.

Source: "Sparse, Efficient and Explainable Data Attribution with DualXDA", arXiv 2402.12118.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dualxda_jax import _check
from dualxda_jax.types import Array, DualSolution, SupportModel, TopK

_HIGHEST = jax.lax.Precision.HIGHEST

# Bounds on the block of scores that `top_k` holds at a time: [q, rows] with q·rows near the budget where it can be.
_BLOCK_ROWS = 1024
_MIN_BLOCK_ROWS = 128
_BLOCK_BUDGET = 1 << 24


def compress(features: Any, labels: Any, solution: DualSolution, *, tolerance: float = 0.0) -> SupportModel:
    """Keep the support vectors of a solution, in the order of the training set.

    Runs on the host: s depends on values, so it cannot be compiled. Derivatives pass through (`jax.grad` of a function
    that solves, compresses and scores) while which rows are kept is held fixed. Only support rows are read from
    `features`, which may be a memory-mapped array. Rows with NaN coefficients are kept, so that they show.

    Args:
        features: [n, d] the features that were solved on, jax or numpy.
        labels: [n] integers in 0..k-1.
        solution: what `svm.solve` returned for them.
        tolerance: rows whose coefficients are all at most this in absolute value are dropped. Above 0 the dropped rows
            are missing from the sum of the scores, while `weights` stay those of the whole solution.

    Returns:
        A `SupportModel` with s support vectors; s may be 0. Coefficients and features keep their dtypes.

    Raises:
        ValueError: inside jit or vmap, mismatched shapes, labels that are no integers in 0..k-1, a bad tolerance.
    """
    _check.shape("solution.coefficients", solution.coefficients, ("n", "k"))
    n, k = solution.coefficients.shape
    features, labels = (a if hasattr(a, "shape") else np.asarray(a) for a in (features, labels))
    _check.shape("features", features, (n, "d"))
    d = features.shape[1]
    _check.shape("labels", labels, (n,))
    _check.integers("labels", labels)
    _check.class_range("labels", labels, k)
    _check.shape("solution.weights", solution.weights, (k, d))
    _check.shape("solution.intercept", solution.intercept, (k,))
    if not (math.isfinite(tolerance) and tolerance >= 0):
        _check.fail("tolerance", tolerance, "a finite number, at least 0")

    coefficients = jax.lax.stop_gradient(jnp.asarray(solution.coefficients))
    if _check.is_traced(coefficients):
        _check.fail("solution", "a traced value", "known: compress runs outside of jit and vmap")
    largest = np.asarray(_row_maxima(coefficients))
    index = np.flatnonzero(~(largest <= tolerance)).astype(np.int32)
    return SupportModel(
        coefficients=_take_rows(solution.coefficients, index),
        features=_take_rows(features, index),
        labels=_take_rows(labels, index),
        index=jnp.asarray(index),
        weights=solution.weights,
        intercept=solution.intercept,
        intercept_scaling=solution.intercept_scaling,
        train_size=n,
    )


def scores(model: SupportModel, query: Array, targets: Array, *, include_intercept: bool = True) -> Array:
    """Score every support vector for the target class of every query.

    Args:
        model: the support vectors.
        query: [q, d] features of the queries.
        targets: [q] integers in 0..k-1, the class that each query is explained for. A value outside that range gives
            NaN where it cannot be checked (inside a trace).
        include_intercept: False leaves b² out, as the reference does; the scores then do not sum to the logit.

    Returns:
        [q, s] coefficients[i, target] · (⟨features_i, query⟩ + b²), columns in the order of `model.index`.

    Raises:
        ValueError: mismatched shapes, targets that are no integers in 0..k-1.
    """
    _check_query(model, query)
    _check_targets(model, query, targets)
    return _scores(model, jnp.asarray(query), jnp.asarray(targets), include_intercept=include_intercept)


def dense(model: SupportModel, scores: Array) -> Array:
    """Spread scores of support vectors over the whole training set.

    Args:
        model: the support vectors.
        scores: [q, s] as `scores` returns them.

    Returns:
        [q, n] with exact zeros for the samples that are no support vectors.

    Raises:
        ValueError: scores of another shape.
    """
    _check.shape("scores", scores, ("q", model.index.shape[0]))
    return _dense(model, jnp.asarray(scores))


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
    the training set, the lower first. Derivatives are those of the kept scores; the ranking itself is held fixed.

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
        ValueError: k outside 1..s, mismatched shapes, targets that are no integers in 0..k-1.
    """
    _check_query(model, query)
    _check_targets(model, query, targets)
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


def self_influence(model: SupportModel) -> Array:
    """How much each support vector speaks for its own label at itself; needs no query.

    Mislabelled samples rank high.

    Args:
        model: the support vectors.

    Returns:
        [s] coefficients[i, y_i] · (‖features_i‖² + b²), never negative.
    """
    return _self_influence(model)


def logits(model: SupportModel, query: Array) -> Array:
    """Logits of the surrogate: class by class the sum of the scores over the support vectors.

    Args:
        model: the support vectors.
        query: [q, d] features of the queries.

    Returns:
        [q, k] query · weightsᵀ + intercept.

    Raises:
        ValueError: another shape of query.
    """
    _check_query(model, query)
    return _logits(model, jnp.asarray(query))


def _check_query(model: SupportModel, query: Any) -> None:
    _check.shape("query", query, ("q", model.features.shape[1]))


def _check_targets(model: SupportModel, query: Any, targets: Any) -> None:
    _check.shape("targets", targets, (np.shape(query)[0],))
    _check.integers("targets", targets)
    # Parts of an array that live on another process cannot be looked at from here.
    if _check.is_traced(targets) or getattr(targets, "is_fully_addressable", True):
        _check.class_range("targets", targets, model.coefficients.shape[1])


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


def _accumulator(*arrays: Array) -> jnp.dtype:
    """The widest dtype among the arrays, float32 at least."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, [a.dtype for a in arrays], jnp.dtype(jnp.float32))


def _dot(left: Array, right: Array, dtype: jnp.dtype) -> Array:
    """Products left · rightᵀ of [a, d] and [b, d], accumulated and returned in `dtype`."""
    if left.dtype != right.dtype or not jnp.issubdtype(left.dtype, jnp.floating):
        left, right = left.astype(dtype), right.astype(dtype)
    return jnp.matmul(left, right.T, precision=_HIGHEST, preferred_element_type=dtype)


def _target_coefficients(coefficients: Array, targets: Array, dtype: jnp.dtype) -> Array:
    """[q, rows] coefficients[i, target]; NaN where a target is no class."""
    k = coefficients.shape[1]
    if _row_axes(targets) is None:
        inside = jnp.where(targets < 0, k, targets)
        return jnp.take(coefficients.T, inside, axis=0, mode="fill", fill_value=jnp.nan).astype(dtype)
    # A gather cannot place its output when the indices are sharded over an Explicit axis; a product can.
    chosen = jax.nn.one_hot(targets, k, dtype=dtype)
    picked = _dot(chosen, coefficients, dtype)
    return jnp.where(((targets >= 0) & (targets < k))[:, None], picked, jnp.nan)


def _block_scores(
    coefficients: Array, features: Array, query: Array, targets: Array, squared_intercept: float
) -> Array:
    dtype = _accumulator(query, features, coefficients)
    kernel = _dot(query, features, dtype) + squared_intercept
    return _target_coefficients(coefficients, targets, dtype) * kernel


def _squared_intercept(model: SupportModel, include_intercept: bool) -> float:
    return model.intercept_scaling**2 if include_intercept else 0.0


def _row_axes(array: Array) -> Any:
    """Names of the Explicit mesh axes that the rows are sharded over; None for none."""
    spec = jax.typeof(array).sharding.spec
    return spec[0] if len(spec) else None


def _gather_rows(array: Array) -> Array:
    """Undo a sharding of the rows over Explicit mesh axes (Auto axes are the compiler's to place)."""
    if _row_axes(array) is None:
        return array
    kind = jax.typeof(array).sharding
    return jax.sharding.reshard(array, NamedSharding(kind.mesh, PartitionSpec(None, *kind.spec[1:])))


@functools.partial(jax.jit, static_argnames="include_intercept")
def _scores(model: SupportModel, query: Array, targets: Array, *, include_intercept: bool) -> Array:
    coefficients, features = model.coefficients, model.features
    if _row_axes(query) is not None:
        # One mesh axis cannot shard both sides of [q, s]; the queries keep it.
        coefficients, features = _gather_rows(coefficients), _gather_rows(features)
    return _block_scores(coefficients, features, query, targets, _squared_intercept(model, include_intercept))


@jax.jit
def _dense(model: SupportModel, values: Array) -> Array:
    s = model.index.shape[0]
    if s == 0:
        return jnp.zeros((values.shape[0], model.train_size), values.dtype)
    index = _gather_rows(model.index)
    place = jnp.full(model.train_size, s, jnp.int32).at[index].set(jnp.arange(s, dtype=jnp.int32))
    # Over an Explicit mesh axis the scores of one query lie on several devices, and any of them may be needed anywhere.
    values = _gather_rows(values.T).T
    return jnp.take(values, place, axis=1, mode="fill", fill_value=0)


def _block_rows(s: int, q: int, k: int) -> int:
    """Support vectors in one block of `top_k`."""
    within_budget = min(_BLOCK_ROWS, max(_MIN_BLOCK_ROWS, _BLOCK_BUDGET // max(1, q)))
    return min(s, max(k, within_budget))


@functools.partial(jax.jit, static_argnames=("k", "largest", "include_intercept", "rows"))
def _top_k(
    model: SupportModel, query: Array, targets: Array, *, k: int, largest: bool, include_intercept: bool, rows: int
) -> TopK:
    squared_intercept = _squared_intercept(model, include_intercept)
    coefficients, features = _gather_rows(model.coefficients), _gather_rows(model.features)
    kept, places = _kept_scores(coefficients, features, query, targets, k, largest, rows, squared_intercept)
    index = _gather_rows(model.index)
    return TopK(scores=kept, index=_pick_rows(index, places))


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
        values = _block_scores(block[0], block[1], query, targets, squared_intercept)
        # The sort tells -0 from +0; they are one score and must tie.
        return jnp.where(values == 0, 0.0, sign * values)

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
        products = _pick_rows(features, row).astype(dtype) * query.astype(dtype)
        own = jnp.arange(coefficients.shape[1])[None, :] == targets[:, None]
        coefficient = jnp.sum(jnp.where(own, _pick_rows(coefficients, row).astype(dtype), 0.0), axis=1)
        return coefficient * (jnp.sum(products, axis=1) + squared_intercept)

    def all_scores(coefficients: Array, features: Array, query: Array) -> Array:
        return jax.lax.map(functools.partial(pair_scores, coefficients, features, query), places.T).T

    _, changed = jax.jvp(all_scores, (coefficients, features, query), tuple(tangents[:3]))
    return (kept, places), (changed, np.zeros(places.shape, jax.dtypes.float0))


def _pick_rows(array: Array, rows: Array) -> Array:
    """array[rows] for rows that may be sharded over Explicit axes."""
    kind = jax.typeof(rows).sharding
    if all(axis is None for axis in kind.spec):
        return array[rows]
    trailing = (None,) * (array.ndim - 1)
    return array.at[rows].get(out_sharding=NamedSharding(kind.mesh, PartitionSpec(*kind.spec, *trailing)))


@jax.jit
def _self_influence(model: SupportModel) -> Array:
    dtype = _accumulator(model.coefficients, model.features)
    own = jnp.arange(model.coefficients.shape[1])[None, :] == model.labels[:, None]
    coefficient = jnp.sum(jnp.where(own, model.coefficients.astype(dtype), 0.0), axis=1)
    return coefficient * (jnp.sum(jnp.square(model.features.astype(dtype)), axis=1) + model.intercept_scaling**2)


@jax.jit
def _logits(model: SupportModel, query: Array) -> Array:
    dtype = _accumulator(query, model.weights)
    return _dot(query, model.weights, dtype) + model.intercept.astype(dtype)[None, :]
