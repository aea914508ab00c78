"""Primal and dual objective of any dual variables, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualxda_jax import _check
from dualxda_jax.svm.config import DEFAULT
from dualxda_jax.svm.inputs import in_trace, prepare, result_dtype, smoothing_of
from dualxda_jax.svm.problem import Array, contract, one_hot_of, with_constant
from dualxda_jax.svm.simplex import threshold


def objectives(
    features: Array,
    labels: Array,
    coefficients: Array,
    *,
    num_classes: int,
    cost: Array | float,
    intercept_scaling: float = 0.0,
    smoothing: Array | float = 0.0,
) -> tuple[Array, Array]:
    """Primal objective at W(α) and dual objective at α, computed in float64 whatever dtype comes in.

    Args:
        features: [n, d].
        labels: [n] integers in 0..k-1.
        coefficients: [n, k] feasible dual variables.
        num_classes: k.
        cost: scalar or [n].
        intercept_scaling: b.
        smoothing: scalar γ, 0 or more: the objectives of the smoothed problem.

    Returns:
        (primal, dual), scalars: float64 NumPy numbers outside of a trace, float32 (float64 under x64) arrays inside.
    """
    given = features if hasattr(features, "dtype") else np.asarray(features)
    features, labels, costs = prepare(given, labels, num_classes, cost, None, DEFAULT)
    _check.shape("coefficients", coefficients, [features.shape[0], num_classes])
    _check.numbers("coefficients", coefficients)
    if not _check.is_traced(intercept_scaling) and not (_check.is_real(intercept_scaling) and intercept_scaling >= 0):
        _check.fail("intercept_scaling", repr(intercept_scaling), "0 or more and finite")
    gamma = smoothing_of(smoothing)
    if not in_trace(given, labels, coefficients, cost, gamma):
        x, y, alpha = np.asarray(given), np.asarray(labels), np.asarray(coefficients)
        # Not as `prepare` left them: float64 of NumPy is float64 here whether or not x64 is on.
        c = np.asarray(cost, np.float64)
        primal, dual = host_objectives(x, y, alpha, np.broadcast_to(c, len(x)), intercept_scaling, gamma or 0.0)
        return np.float64(primal), np.float64(dual)  # type: ignore[return-value]
    with jax.enable_x64(True):
        gamma = jnp.asarray(0.0 if gamma is None else gamma, jnp.float64)
        parts = _objectives(features, labels, coefficients, costs, gamma, intercept_scaling)
    return parts


def host_objectives(
    features: np.ndarray, labels: np.ndarray, alpha: np.ndarray, cost: np.ndarray, scaling: float,
    smoothing: float = 0.0, chunk: int = 8192,
) -> tuple[float, float]:  # fmt: skip
    """Primal and dual objective in float64 NumPy, chunk by chunk: (primal at W(α), dual at α)."""
    n, k = alpha.shape
    weights, bias, linear = np.zeros((k, features.shape[1])), np.zeros(k), 0.0
    parts = [slice(i, i + chunk) for i in range(0, n, chunk)]
    for part in parts:
        a = np.asarray(alpha[part], np.float64)
        weights += a.T @ np.asarray(features[part], np.float64)
        bias += scaling * a.sum(axis=0)
        linear += a.sum() - a[np.arange(len(a)), labels[part]].sum()
    norm = 0.5 * (float(np.sum(weights**2)) + float(np.sum(bias**2)))
    loss = 0.0
    if smoothing > 0.0:
        q = (np.arange(k)[None, :] == labels[:, None]) - alpha / np.where(cost > 0.0, cost, 1.0)[:, None]
        linear += 0.5 * smoothing * float(np.sum(cost * (np.sum(q * q, axis=1) - 1.0)))
    for part in parts:
        z = np.asarray(features[part], np.float64) @ weights.T + scaling * bias
        rows = np.arange(len(z))
        true = z[rows, labels[part]].copy()
        z += 1.0
        z[rows, labels[part]] -= 1.0
        loss += float(np.sum(cost[part] * (_largest(z, smoothing) - true)))
    return norm + loss, -norm - linear


def _largest(z: np.ndarray, smoothing: float) -> np.ndarray:
    """[n] max_p ⟨p, z⟩ − γ/2 (‖p‖² − 1) over the simplex, for z [n, k]; the maximum of z where γ = 0."""
    if smoothing == 0.0:
        return z.max(axis=1)
    ordered = -np.sort(-z / smoothing, axis=1)
    shifts = (np.cumsum(ordered, axis=1) - 1.0) / np.arange(1, z.shape[1] + 1)
    last = (ordered > shifts).sum(axis=1) - 1
    p = np.maximum(z / smoothing - shifts[np.arange(len(z)), last][:, None], 0.0)
    return np.sum(p * z, axis=1) - 0.5 * smoothing * (np.sum(p * p, axis=1) - 1.0)


@functools.partial(jax.jit, static_argnames=("intercept_scaling",))
def _objectives(
    features: Array, labels: Array, coefficients: Array, costs: Array, gamma: Array, intercept_scaling: float
) -> tuple[Array, Array]:
    """As `host_objectives`; in reverse, a chunk is cast anew."""
    (n, d), k = features.shape, coefficients.shape[1]
    size = min(DEFAULT.chunk, n)

    def chunk(i: Array) -> tuple[Array, Array, Array, Array]:
        """Rows [size, D], labels one-hot, α and costs in float64; rows seen before have neither α nor cost."""
        start = jnp.minimum(i * size, n - size)
        new = start + jnp.arange(size) >= i * size
        x, y, a, c = (lax.dynamic_slice_in_dim(b, start, size) for b in (features, labels, coefficients, costs))
        x = with_constant(x.astype(jnp.float64), intercept_scaling)
        one_hot = one_hot_of(y, k, jnp.float64).T
        return x, one_hot, jnp.where(new[:, None], a, 0.0).astype(jnp.float64), jnp.where(new, c, 0.0)

    @jax.checkpoint
    def add_weights(i: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
        x, one_hot, alpha, c = chunk(i)
        c = c.astype(jnp.float64)
        # γ/2 Σ C (‖q‖² − 1) for q = e_y − α / C, without q.
        mine, square = jnp.sum(alpha * one_hot, axis=1), jnp.sum(alpha * alpha, axis=1)
        bend = jnp.where(c > 0.0, 0.5 * square / jnp.where(c > 0.0, c, 1.0) - mine, 0.0)
        linear = jnp.sum(alpha * (1.0 - one_hot)) + gamma * jnp.sum(bend)
        return total[0] + contract(alpha, x, 0, 0), total[1] + linear

    zero, width = jnp.zeros((), jnp.float64), d + (intercept_scaling != 0.0)
    count = -(-n // size)
    weights, linear = lax.fori_loop(0, count, add_weights, (jnp.zeros((k, width), jnp.float64), zero))

    @jax.checkpoint
    def add_loss(i: Array, loss: Array) -> Array:
        x, one_hot, _, c = chunk(i)
        plain = contract(x, weights, 1, 1)
        z = plain + 1.0 - one_hot
        high = jnp.max(z, axis=1)
        # The minimum over τ of τ + Σ max(h − τ, 0)² / 2γ: at the minimum its derivative by τ is 0.
        h, safe = z - high[:, None], jnp.where(gamma > 0.0, gamma, 1.0)
        tau = lax.stop_gradient(threshold(lax.stop_gradient(h).T, lax.stop_gradient(gamma), coefficients.shape[1]))
        bend = tau + jnp.sum(jnp.maximum(h - tau[:, None], 0.0) ** 2, axis=1) / (2.0 * safe) + 0.5 * gamma
        hinge = high + jnp.where(gamma > 0.0, bend, 0.0) - jnp.sum(plain * one_hot, axis=1)
        return loss + jnp.sum(c.astype(jnp.float64) * hinge)

    norm, dtype = 0.5 * jnp.sum(weights * weights), result_dtype(features)
    loss = lax.fori_loop(0, count, add_loss, zero)
    return (norm + loss).astype(dtype), (-norm - linear).astype(dtype)
