"""Euclidean projection onto the probability simplex."""

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def project(points: Array, *, axis: int = -1) -> Array:
    """Project onto the probability simplex along an axis.

    Newton's method on the threshold θ of q = max(v − θ, 0), Σ q = 1. The function is piecewise linear, convex and
    falling, so the steps climb to the root from the left and end after finitely many; points whose largest entry is
    ahead of the others by 1 or more come out as exact vertices.

    Args:
        points: any finite values; k of them along the axis.
        axis: the axis of a simplex.

    Returns:
        Array like `points`, non-negative and summing to 1 along the axis; exact zeros below the threshold.

    Source: Michelot, A finite algorithm for finding the projection of a point onto the canonical simplex, 1986.
    """
    # A common shift changes nothing but the rounding: without it large values stop summing to one.
    shifted = points - jnp.max(points, axis=axis, keepdims=True)
    k = points.shape[axis]
    # Two lower bounds of θ: had all entries been positive, or the largest alone.
    start = jnp.maximum((jnp.sum(shifted, axis=axis, keepdims=True) - 1.0) / k, -1.0)

    def climb(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        theta, _, steps = state
        above = jnp.maximum(shifted - theta, 0.0)
        count = jnp.sum((above > 0.0).astype(points.dtype), axis=axis, keepdims=True)
        excess = jnp.sum(above, axis=axis, keepdims=True) - 1.0
        # Where rounding hides the root, θ stays between its bounds: the largest entry (0) is always above it.
        new = jnp.clip(theta + excess / jnp.maximum(count, 1.0), theta, -1.0 / k)
        return new, jnp.any(new - theta > 4.0 * jnp.finfo(points.dtype).eps), steps + 1

    def unsettled(state: tuple[Array, Array, Array]) -> Array:
        return state[1] & (state[2] <= k)

    theta = lax.while_loop(unsettled, climb, (start, jnp.asarray(True), jnp.asarray(0, jnp.int32)))[0]
    q = jnp.maximum(shifted - theta, 0.0)
    return q / jnp.sum(q, axis=axis, keepdims=True)


def threshold(points: Array, total: Array, steps: int) -> Array:
    """[b] τ with Σ_c max(h_c − τ, 0) = total, for h [k, b] whose largest entries are 0.

    Args:
        points: [k, b] h.
        total: scalar, 0 or more; for 0, τ is 0.
        steps: static, Newton steps at most; where they do not suffice, the result is a lower bound.
    """

    def climb(_: Array, tau: Array) -> Array:
        above = jnp.maximum(points - tau[None, :], 0.0)
        count = jnp.sum(jnp.where(above > 0.0, 1.0, 0.0).astype(points.dtype), axis=0)
        return jnp.maximum(tau + (jnp.sum(above, axis=0) - total) / jnp.maximum(count, 1.0), tau)

    number = jnp.where(total > 0.0, steps, 0).astype(jnp.int32)
    return lax.fori_loop(jnp.asarray(0, jnp.int32), number, climb, jnp.zeros_like(points[0]) - total)
