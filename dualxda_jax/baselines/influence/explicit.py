"""Influence functions with the Hessian written out and inverted, for models of up to some thousand parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dualxda_jax import _check
from dualxda_jax.baselines.gradients import map_chunks
from dualxda_jax.baselines.influence import checks, hvp
from dualxda_jax.baselines.protocol import Context, Method, check_queries
from dualxda_jax.baselines.select import Filter
from dualxda_jax.types import Array

_HIGHEST = jax.lax.Precision.HIGHEST
_COLUMNS = 128  # of the Hessian that are computed at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """What `fit` gives.

    Attributes:
        context: the network and its training set.
        factor: [p, p] the lower Cholesky factor of H + λ, or the eigenvectors of H in columns.
        inverses: [p] 1 / (eigenvalue + λ), or None with a Cholesky factor.
    """

    context: Context
    factor: Array
    inverses: Array | None


def influence_explicit(
    *,
    params: Filter = "all",
    damping: float = 1e-3,
    hessian: str = "exact",
    inverse: str = "cholesky",
    max_parameters: int = 20_000,
    chunk: int = 512,
) -> Method:
    """Influence functions with the damped Hessian written out: the truth that the approximations are measured by.

    The score of sample i for target c at x is gᵀ (H + λ)⁻¹ g_i with g the gradient of the loss at (x, c), g_i that at
    (x_i, y_i) and H the *mean* of the training losses' Hessians: to first order n times what the loss at (x, c) would
    rise by, were i left out of a training by the mean loss. Higher = speaks for the target.

    Args:
        params: which parameters, see `select`; the others count as fixed.
        damping: λ, added to the diagonal.
        hessian: "exact", or "ggn" for the Gauss-Newton matrix, which is never indefinite for cross-entropy.
        inverse: "cholesky" needs a positive definite H + λ; "eigh" inverts every eigenvalue of a symmetric one,
            negative ones too, and leaves out directions in which H + λ vanishes up to rounding (the pseudo-inverse).
        max_parameters: how many parameters to accept; memory is their square.
        chunk: samples at a time.

    Returns:
        Method "influence_explicit".

    Raises:
        ValueError: a bad argument; and in `fit`: too many parameters, H + λ not positive definite under "cholesky".

    Source: Koh and Liang 2017, arXiv 1703.04730.
    """
    checks.nonnegative("damping", damping)
    checks.one_of("hessian", hessian, hvp.HESSIANS)
    checks.one_of("inverse", inverse, ("cholesky", "eigh"))
    checks.positive_integer("max_parameters", max_parameters)
    checks.positive_integer("chunk", chunk)
    config = hvp.Config(params, hessian, damping, chunk, _COLUMNS)

    def fit(key: Array, context: Context) -> Fitted:
        p = hvp.size(context, config)
        if p > max_parameters:
            _check.fail("params", f"{p} parameters", f"at most max_parameters={max_parameters} of them")
        factor, inverses = (_cholesky if inverse == "cholesky" else _eigh)(config, context)
        if inverses is None and not _check.is_traced(factor) and not bool(jnp.isfinite(factor).all()):
            must = 'large enough to make H + damping positive definite (or use hessian="ggn" or inverse="eigh")'
            _check.fail("damping", damping, must)
        return Fitted(context, factor, inverses)

    def scores(fitted: Fitted, x: Array, targets: Array) -> Array:
        targets = check_queries(fitted.context, x, targets)
        return checks.finite_scores(_scores(config, fitted, jnp.asarray(x), targets))

    def self_influence(fitted: Fitted) -> Array:
        return checks.finite_samples(_self_influence(config, fitted))

    return Method("influence_explicit", fit, scores, self_influence)


def _damped(config: hvp.Config, context: Context) -> Array:
    """H + λ, symmetric to the last bit."""
    p = hvp.size(context, config)

    def columns(places: Array) -> Array:
        return hvp.product(context, config, jax.nn.one_hot(places, p, dtype=hvp.dtype(context)))

    matrix = map_chunks(columns, (jnp.arange(p, dtype=jnp.int32),), _COLUMNS)
    return (matrix + matrix.T) / 2


@functools.partial(jax.jit, static_argnums=0)
def _cholesky(config: hvp.Config, context: Context) -> tuple[Array, None]:
    return jnp.linalg.cholesky(_damped(config, context)), None


@functools.partial(jax.jit, static_argnums=0)
def _eigh(config: hvp.Config, context: Context) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(_damped(config, context))
    largest = jnp.max(jnp.abs(values))
    known = jnp.abs(values) > largest * float(jnp.finfo(values.dtype).eps) * values.size
    return vectors, jnp.where(known, 1.0 / jnp.where(known, values, 1.0), 0.0)


def _solve(fitted: Fitted, vectors: Array) -> Array:
    """(H + λ)⁻¹ v for vectors [m, p]."""
    if fitted.inverses is None:
        return jax.scipy.linalg.cho_solve((fitted.factor, True), vectors.T).T
    met = jnp.matmul(vectors, fitted.factor, precision=_HIGHEST) * fitted.inverses[None]
    return jnp.matmul(met, fitted.factor.T, precision=_HIGHEST)


@functools.partial(jax.jit, static_argnums=0)
def _scores(config: hvp.Config, fitted: Fitted, x: Array, targets: Array) -> Array:
    context = fitted.context

    def some(x: Array, targets: Array) -> Array:
        vectors = hvp.gradients(context, config, x, targets)
        return hvp.against_training(context, config, _solve(fitted, vectors))

    return map_chunks(some, (x, targets), config.chunk)


@functools.partial(jax.jit, static_argnums=0)
def _self_influence(config: hvp.Config, fitted: Fitted) -> Array:
    def some(x: Array, labels: Array) -> Array:
        vectors = hvp.gradients(fitted.context, config, x, labels)
        return jnp.sum(vectors * _solve(fitted, vectors), axis=1)

    return map_chunks(some, (fitted.context.inputs, fitted.context.labels), config.chunk)
