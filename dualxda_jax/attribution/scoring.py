"""Scores of support vectors, their own influence, and the surrogate's logits; rows that lie over a mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dualxda_jax import _check
from dualxda_jax.types import Array, SupportModel

_HIGHEST = jax.lax.Precision.HIGHEST


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
        ValueError: a model that is no `SupportModel`, mismatched shapes, targets that are no integers in 0..k-1.
    """
    check_query(model, query)
    check_targets(model, query, targets)
    return _scores(model, jnp.asarray(query), jnp.asarray(targets), include_intercept=include_intercept)


def self_influence(model: SupportModel) -> Array:
    """How much each support vector speaks for its own label at itself; needs no query.

    Mislabelled samples rank high.

    Args:
        model: the support vectors.

    Returns:
        [s] coefficients[i, y_i] · (‖features_i‖² + b²), never negative.

    Raises:
        ValueError: a model that is no `SupportModel`.
    """
    check_model(model)
    return _self_influence(model)


def logits(model: SupportModel, query: Array) -> Array:
    """Logits of the surrogate: class by class the sum of the scores over the support vectors.

    Args:
        model: the support vectors.
        query: [q, d] features of the queries.

    Returns:
        [q, k] query · weightsᵀ + intercept.

    Raises:
        ValueError: a model that is no `SupportModel`, another shape of query.
    """
    check_query(model, query)
    return _logits(model, jnp.asarray(query))


def check_model(model: Any) -> None:
    """Refuse what is no `SupportModel`, such as a solution that was not compressed."""
    if not isinstance(model, SupportModel):
        must = "a SupportModel: call attribution.compress(features, labels, solution) first"
        _check.fail("model", f"a {type(model).__name__}", must)


def check_query(model: SupportModel, query: Any) -> None:
    """Refuse a model that is none, and queries of another shape than [q, d] or that are no numbers."""
    check_model(model)
    _check.shape("query", query, ("q", model.features.shape[1]))
    _check.numbers("query", query)


def check_targets(model: SupportModel, query: Any, targets: Any) -> None:
    """Refuse targets that are not [q] integers in 0..k-1."""
    _check.shape("targets", targets, (np.shape(query)[0],))
    _check.integers("targets", targets)
    # Parts of an array that live on another process cannot be looked at from here.
    if _check.is_traced(targets) or getattr(targets, "is_fully_addressable", True):
        _check.class_range("targets", targets, model.coefficients.shape[1])


def _accumulator(*arrays: Array) -> jnp.dtype:
    """The widest dtype among the arrays, float32 at least."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, [a.dtype for a in arrays], jnp.dtype(jnp.float32))


def _dot(left: Array, right: Array, dtype: jnp.dtype) -> Array:
    """Products left · rightᵀ of [a, d] and [b, d], accumulated and returned in `dtype`."""
    if left.dtype != right.dtype or not jnp.issubdtype(left.dtype, jnp.floating):
        left, right = left.astype(dtype), right.astype(dtype)
    return jnp.matmul(left, right.T, precision=_HIGHEST, preferred_element_type=dtype)


def weights_of(coefficients: Array, features: Array, intercept_scaling: float) -> tuple[Array, Array]:
    """Weights [k, d] and intercept [k] that rows with coefficients [rows, k] make."""
    weights = _dot(coefficients.T, features.T, _accumulator(coefficients, features))
    return weights.astype(coefficients.dtype), intercept_scaling**2 * jnp.sum(coefficients, axis=0)


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


def block_scores(coefficients: Array, features: Array, query: Array, targets: Array, squared_intercept: float) -> Array:
    """[q, rows] scores of some rows, by the definition."""
    dtype = _accumulator(query, features, coefficients)
    kernel = _dot(query, features, dtype) + squared_intercept
    return _target_coefficients(coefficients, targets, dtype) * kernel


def squared_intercept(model: SupportModel, include_intercept: bool) -> float:
    """b², or 0 where it is left out."""
    return model.intercept_scaling**2 if include_intercept else 0.0


@functools.partial(jax.jit, static_argnames="include_intercept")
def _scores(model: SupportModel, query: Array, targets: Array, *, include_intercept: bool) -> Array:
    coefficients, features = model.coefficients, model.features
    if _row_axes(query) is not None:
        # One mesh axis cannot shard both sides of [q, s]; the queries keep it.
        coefficients, features = gather_rows(coefficients), gather_rows(features)
    return block_scores(coefficients, features, query, targets, squared_intercept(model, include_intercept))


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


def _row_axes(array: Array) -> Any:
    """Names of the Explicit mesh axes that the rows are sharded over; None for none."""
    spec = jax.typeof(array).sharding.spec
    return spec[0] if len(spec) else None


def gather_rows(array: Array) -> Array:
    """Undo a sharding of the rows over Explicit mesh axes (Auto axes are the compiler's to place)."""
    if _row_axes(array) is None:
        return array
    kind = jax.typeof(array).sharding
    return jax.sharding.reshard(array, NamedSharding(kind.mesh, PartitionSpec(None, *kind.spec[1:])))


def pick_rows(array: Array, rows: Array) -> Array:
    """array[rows] for rows that may be sharded over Explicit axes."""
    kind = jax.typeof(rows).sharding
    if all(axis is None for axis in kind.spec):
        return array[rows]
    trailing = (None,) * (array.ndim - 1)
    return array.at[rows].get(out_sharding=NamedSharding(kind.mesh, PartitionSpec(*kind.spec, *trailing)))
