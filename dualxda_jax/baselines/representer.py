"""Representer points: the head, refitted with weight decay, as a sum over training samples."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
from jax import lax

from dualxda_jax import _check
from dualxda_jax.baselines.gradients import check_finite, map_forward
from dualxda_jax.baselines.protocol import Context, Method, check_queries
from dualxda_jax.baselines.rows import products, wide
from dualxda_jax.baselines.similarity import check_features, features
from dualxda_jax.types import Array

TARGETS = ("predictions", "labels")

_HIGHEST = lax.Precision.HIGHEST
_MAX_STEPS = 100
_MAX_INNER = 250


class NotStationaryWarning(UserWarning):
    """The refit of the head ended above its tolerance; the residual that was reached is in the fit."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fitted:
    """The refitted head and its coefficients.

    Attributes:
        context: what was learnt from.
        points: [n, d] features, or [n, d + 1] with the constant one at the end.
        coefficients: [n, k] α.
        weights: [k, d] of the refitted head, or [k, d + 1].
        residual: scalar, ‖W − Σ_i α_i ⊗ φ_i‖ / ‖W‖; 0 where the refit is stationary.
    """

    context: Context
    points: Array
    coefficients: Array
    weights: Array
    residual: Array


def representer(
    regularization: float = 0.003,
    *,
    targets: str = "predictions",
    intercept_scaling: float = 0.0,
    tolerance: float = 1e-6,
    chunk: int = 256,
) -> Method:
    """Score α_ic ⟨φ_i, φ(x)⟩ with α_ic = (p_ic − y_ic) / (−2λn), c the target: parts of the refitted head's logit.

    The head W (without bias, unless `intercept_scaling` gives it one) is refitted on the features to minimise
    (1/n) Σ_i CE(softmax(W φ_i), y_i) + λ‖W‖², and p are its probabilities. At the minimum W = Σ_i α_i ⊗ φ_i, so that a
    query's scores sum over the samples to the refit's logit; `residual` of the fit says how nearly. Self-influence is
    α_{i,label} ‖φ_i‖². Computed in float64.

    Args:
        regularization: λ.
        targets: y: "predictions", the network's own probabilities, or "labels".
        intercept_scaling: b, a constant feature that is appended to all, so that the score is α_ic (⟨φ_i, φ(x)⟩ + b²);
            the bias is regularised as the rest is. 0 for none, as in the paper.
        tolerance: the residual ‖W − Σ_i α_i ⊗ φ_i‖ / ‖W‖ to reach; a refit that does not is returned with a warning.
        chunk: samples that the network sees at once.

    Raises:
        ValueError: λ or the tolerance not positive, an intercept scaling below 0, unknown targets, a chunk below
            1; in `fit`, a context without features.

    Source: Yeh et al. 2018, "Representer point selection for explaining deep neural networks", Theorem 3.1.
    """
    for name, value in {"regularization": regularization, "tolerance": tolerance}.items():
        if not (_check.is_real(value) and value > 0):
            _check.fail(name, value, "positive and finite")
    if not (_check.is_real(intercept_scaling) and intercept_scaling >= 0):
        _check.fail("intercept_scaling", intercept_scaling, "finite and 0 or more")
    if targets not in TARGETS:
        _check.fail("targets", repr(targets), f"one of {', '.join(TARGETS)}")
    _check.positive_integer("chunk", chunk)
    regularization, intercept_scaling, tolerance = map(float, (regularization, intercept_scaling, tolerance))
    fit = functools.partial(_fit, regularization, targets, intercept_scaling, tolerance, chunk)
    return Method("representer", fit, functools.partial(_scores, intercept_scaling, chunk), _self_influence)


def _with_constant(intercept_scaling: float, points: Array) -> Array:
    """Features [b, d], with the constant one at the end if there is one."""
    return jnp.pad(points, ((0, 0), (0, 1)), constant_values=intercept_scaling) if intercept_scaling else points


def _fit(
    regularization: float,
    targets: str,
    intercept_scaling: float,
    tolerance: float,
    chunk: int,
    key: Array,
    context: Context,
) -> Fitted:
    points, wanted = _points_and_targets(targets, chunk, check_features(context))
    points = _with_constant(intercept_scaling, points)
    check_finite("features", points)
    with jax.enable_x64(True):
        weights, coefficients, residual = _refit(points, wanted, regularization, tolerance)
    if not _check.is_traced(residual) and not float(residual) <= tolerance:
        reached = f"residual {float(residual):.1e} above the tolerance {tolerance:.1e}"
        warnings.warn(f"representer: {reached}; raise it or regularization", NotStationaryWarning, stacklevel=3)
    return Fitted(context, points, coefficients, weights, residual)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _points_and_targets(targets: str, chunk: int, context: Context) -> tuple[Array, Array]:
    """Features [n, d], and [n, k] what the refit is to predict."""

    def both(x: Array) -> tuple[Array, Array]:
        # In one program, so that the network's layers are computed once.
        points = context.features(context.params, x)  # type: ignore[misc]
        logits = context.logits(context.params, x)
        return points, jax.nn.softmax(logits.astype(wide(logits.dtype)), axis=-1)

    if targets == "labels":
        wanted = jax.nn.one_hot(context.labels, context.num_classes, dtype=jnp.float32)
        return features(context, context.inputs, chunk), wanted
    return map_forward(both, context.inputs, chunk)


@jax.jit
def _refit(points: Array, targets: Array, regularization: float, tolerance: float) -> tuple[Array, Array, Array]:
    """Newton's method, its steps by conjugate gradients, halved where the objective does not fall."""
    phi, y = points.astype(jnp.float64), targets.astype(jnp.float64)
    n, d = phi.shape
    k = y.shape[1]
    # The softmax's curvature is at most 1/2: with this, the conditioning no longer depends on the features' scale.
    bound = _product(phi.T, phi) / (2 * n) + 2 * regularization * jnp.eye(d)
    factor = jax.scipy.linalg.cho_factor(bound)

    def objective(w: Array) -> Array:
        z = _product(phi, w.T)
        return (jax.nn.logsumexp(z, axis=1) - (y * z).sum(axis=1)).mean() + regularization * jnp.square(w).sum()

    def slope(w: Array) -> tuple[Array, Array]:
        p = jax.nn.softmax(_product(phi, w.T), axis=1)
        return _product((p - y).T, phi) / n + 2 * regularization * w, p

    def residual(w: Array, gradient: Array) -> Array:
        # W − Σ α φ is the gradient over 2λ.
        size = jnp.linalg.norm(w)
        return jnp.linalg.norm(gradient) / (2 * regularization) / jnp.where(size > 0, size, 1)

    def unfinished(state: tuple[Array, Array, Array, Array]) -> Array:
        w, gradient, _, steps = state
        return (residual(w, gradient) > 0.3 * tolerance) & (steps < _MAX_STEPS)

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        w, gradient, p, steps = state

        def curvature(v: Array) -> Array:
            z = _product(phi, v.T)
            return _product((p * (z - (p * z).sum(axis=1)[:, None])).T, phi) / n + 2 * regularization * v

        relative = residual(w, gradient)
        direction, _ = jax.scipy.sparse.linalg.cg(
            curvature,
            -gradient,
            tol=jnp.clip(relative, 1e-8, 0.1),
            maxiter=_MAX_INNER,
            M=lambda v: jax.scipy.linalg.cho_solve(factor, v.T).T,
        )
        start, fall = objective(w), (gradient * direction).sum()

        def too_long(length: Array) -> Array:
            # Rounding decides about steps that change nothing: those are taken.
            slack = 1e-14 * jnp.abs(start)
            return (objective(w + length * direction) > start + 1e-4 * length * fall + slack) & (length > 1e-6)

        w = w + lax.while_loop(too_long, lambda length: length / 2, jnp.ones(())) * direction
        return w, *slope(w), steps + 1

    start = jnp.zeros((k, d))
    w, gradient, p, _ = lax.while_loop(unfinished, step, (start, *slope(start), jnp.zeros((), jnp.int32)))
    # No features at all: then W = 0 = Σ α φ.
    reached = jnp.where(jnp.any(gradient != 0), residual(w, gradient), 0)
    out = points.dtype
    return w.astype(out), ((y - p) / (2 * regularization * n)).astype(out), reached.astype(out)


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=_HIGHEST)


def _scores(intercept_scaling: float, chunk: int, fitted: Fitted, x: Array, targets: Array) -> Array:
    targets = check_queries(fitted.context, x, targets)
    query = _with_constant(intercept_scaling, features(fitted.context, jnp.asarray(x), chunk))
    return _weighted(fitted.coefficients, fitted.points, query, targets)


@jax.jit
def _weighted(coefficients: Array, points: Array, query: Array, targets: Array) -> Array:
    return jnp.take(coefficients.T, targets, axis=0) * products(query, points, points.dtype)


def _self_influence(fitted: Fitted) -> Array:
    own = jnp.take_along_axis(fitted.coefficients, fitted.context.labels[:, None], axis=1)[:, 0]
    return own * jnp.square(fitted.points).sum(axis=1)
