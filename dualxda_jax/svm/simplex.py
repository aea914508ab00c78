"""Euclidean projection onto the probability simplex, row by row."""

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def project(points: Array) -> Array:
    """Project every row onto the probability simplex.

    Newton's method on the threshold θ of q = max(v − θ, 0), Σ q = 1. The function is piecewise linear, convex and falling,
    so the steps climb to the root from the left and end after finitely many; rows that are wide of the rest by 1 or more
    come out as exact vertices.

    Args:
        points: [..., k] any finite values.

    Returns:
        Array like `points`: rows are non-negative and sum to 1; exact zeros below the threshold.

    Source: Michelot, A finite algorithm for finding the projection of a point onto the canonical simplex, 1986.
    """
    # A common shift changes nothing but the rounding: without it rows of large values stop summing to one.
    shifted = points - jnp.max(points, axis=-1, keepdims=True)
    k = points.shape[-1]
    lowest = jnp.maximum((jnp.sum(shifted, axis=-1, keepdims=True) - 1.0) / k, -1.0)

    def newton(theta: Array) -> Array:
        above = shifted > theta
        total = jnp.sum(jnp.where(above, shifted - theta, 0.0), axis=-1, keepdims=True)
        count = jnp.sum(above.astype(points.dtype), axis=-1, keepdims=True)
        return theta + (total - 1.0) / jnp.maximum(count, 1.0)

    def unsettled(state: tuple[Array, Array, Array]) -> Array:
        _, moved, steps = state
        return moved & (steps < k)

    def climb(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        theta, _, steps = state
        # The maximum is 0 and must stay above the threshold, whatever rounding does.
        new = jnp.clip(newton(theta), theta, -1.0 / (2 * k))
        return new, jnp.any((shifted > theta) != (shifted > new)), steps + 1

    start = (newton(lowest), jnp.asarray(True), jnp.asarray(0, jnp.int32))
    theta = lax.while_loop(unsettled, climb, start)[0]
    q = jnp.maximum(shifted - theta, 0.0)
    return q / jnp.sum(q, axis=-1, keepdims=True)
