"""Influence functions with the Hessian written out and inverted, for models of up to some thousand parameters."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dualxda_jax import _check
from dualxda_jax.baselines.gradients import map_chunks, map_training
from dualxda_jax.baselines.influence import checks, hvp
from dualxda_jax.baselines.protocol import Context, Method, check_queries
from dualxda_jax.baselines.select import Filter
from dualxda_jax.baselines.settings import dtype_name
from dualxda_jax.types import Array

_HIGHEST = jax.lax.Precision.HIGHEST
_COLUMNS = 128  # of the Hessian that are computed at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """What `fit` gives.

    Attributes:
        context: the network and its training set.
        inverse: [p, p] (H + λ)⁻¹.
    """

    context: Context
    inverse: Array


def influence_explicit(
    *,
    params: Filter = "all",
    damping: float = 1e-3,
    hessian: str = "exact",
    max_parameters: int = 20_000,
    chunk: int = 512,
    dtype: Any = None,
) -> Method:
    """Influence functions with the damped Hessian written out: the truth that the approximations are measured by.

    The score of sample i for target c at x is gᵀ (H + λ)⁻¹ g_i with g the gradient of the loss at (x, c), g_i that at
    (x_i, y_i) and H the *mean* of the training losses' Hessians: to first order n times what the loss at (x, c) would
    rise by, were i left out of a training by the mean loss. Higher = speaks for the target.

    Args:
        params: which parameters, see `select`; the others count as fixed.
        damping: λ, added to the diagonal.
        hessian: "exact", or "ggn" for the Gauss-Newton matrix, which is never indefinite for cross-entropy.
        max_parameters: how many parameters to accept; memory is their square.
        chunk: samples at a time.
        dtype: what training gradients, and the vectors (H + λ)⁻¹ g that they are multiplied with, are rounded to in
            `scores`, as "bfloat16"; products accumulate in float32 or wider. Gradients of queries, the Hessian and
            self-influence are not rounded. By default nothing is.

    Returns:
        Method "influence_explicit".

    Raises:
        ValueError: a bad argument; and in `fit`: too many parameters, NaN or Inf in the Hessian.

    Source: Koh and Liang 2017, arXiv 1703.04730.
    """
    damping = checks.nonnegative("damping", damping)
    checks.one_of("hessian", hessian, hvp.HESSIANS)
    _check.positive_integer("max_parameters", max_parameters)
    _check.positive_integer("chunk", chunk)
    config = hvp.Config(params, hessian, chunk, _COLUMNS, dtype=dtype_name(dtype))

    def fit(key: Array, context: Context) -> Fitted:
        p = hvp.size(context, config)
        if p > max_parameters:
            _check.fail("params", f"{p} parameters", f"at most max_parameters={max_parameters} of them")
        inverse = _invert(config, damping, context)
        checks.finite_training(context, config, inverse)
        if not _check.is_traced(inverse) and not bool(jnp.isfinite(inverse).all()):
            _check.fail("context", "NaN or Inf in the Hessian", "finite inputs and parameters")
        return Fitted(context, inverse)

    def scores(fitted: Fitted, x: Array, targets: Array) -> Array:
        targets = check_queries(fitted.context, x, targets)
        return checks.finite_scores(_scores(config, fitted, jnp.asarray(x), targets))

    def self_influence(fitted: Fitted) -> Array:
        return checks.finite_samples(_self_influence(config, fitted))

    return Method("influence_explicit", fit, scores, self_influence)


def _damped(config: hvp.Config, damping: Array, context: Context) -> Array:
    """H + λ, symmetric to the last bit."""
    p = hvp.size(context, config)

    def columns(places: Array) -> Array:
        return hvp.product(context, config, damping, jax.nn.one_hot(places, p, dtype=hvp.dtype(context)))

    matrix = map_chunks(columns, (jnp.arange(p, dtype=jnp.int32),), _COLUMNS)
    return (matrix + matrix.T) / 2


@functools.partial(jax.jit, static_argnums=0)
def _invert(config: hvp.Config, damping: Array, context: Context) -> Array:
    return _inverse(_damped(config, damping, context))


@jax.custom_jvp
def _inverse(matrix: Array) -> Array:
    """Of a symmetric matrix; the pseudo-inverse where it is singular up to rounding."""
    rounding = float(jnp.finfo(matrix.dtype).eps) * len(matrix)
    factor = jnp.linalg.cholesky(matrix)
    pivots = jnp.square(jnp.diagonal(factor))
    # NaN where the matrix is not positive definite.
    definite = jnp.min(pivots) > rounding * jnp.max(pivots)

    def by_cholesky(matrix: Array, factor: Array) -> Array:
        return jax.scipy.linalg.cho_solve((factor, True), jnp.eye(len(matrix), dtype=matrix.dtype))

    def by_eigenvalues(matrix: Array, factor: Array) -> Array:
        values, vectors = jnp.linalg.eigh(matrix)
        known = jnp.abs(values) > rounding * jnp.max(jnp.abs(values))
        inverses = jnp.where(known, 1.0 / jnp.where(known, values, 1.0), 0.0)
        # A NaN must not pass for a direction without curvature.
        inverses = jnp.where(jnp.isfinite(matrix).all(), inverses, jnp.nan)
        return jnp.matmul(vectors * inverses[None, :], vectors.T, precision=_HIGHEST)

    return jax.lax.cond(definite, by_cholesky, by_eigenvalues, matrix, factor)


@_inverse.defjvp
def _inverse_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """−M⁻¹ dM M⁻¹: eigenvectors of equal eigenvalues, as those without curvature, have no derivative."""
    inverse = _inverse(*primals)
    moved = jnp.matmul(tangents[0], inverse, precision=_HIGHEST)
    return inverse, -jnp.matmul(inverse, moved, precision=_HIGHEST)


@functools.partial(jax.jit, static_argnums=0)
def _scores(config: hvp.Config, fitted: Fitted, x: Array, targets: Array) -> Array:
    context = fitted.context

    def some(x: Array, targets: Array) -> Array:
        vectors = hvp.gradients(context, config, x, targets)
        return hvp.against_training(context, config, jnp.matmul(vectors, fitted.inverse, precision=_HIGHEST))

    return map_chunks(some, (x, targets), config.chunk)


@functools.partial(jax.jit, static_argnums=0)
def _self_influence(config: hvp.Config, fitted: Fitted) -> Array:
    def some(x: Array, labels: Array) -> Array:
        vectors = hvp.gradients(fitted.context, config, x, labels)
        return jnp.sum(vectors * jnp.matmul(vectors, fitted.inverse, precision=_HIGHEST), axis=1)

    return map_training(some, fitted.context, config.chunk)
