"""Conjugate gradients on vectors, which stop at a direction without curvature and hand it over."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm.problem import Array

# Curvature per squared length that counts as none: rounding makes as much of large eigenvalues.
FLAT = 1e-6


def solve(product: Callable[[Array], Array], right: Array, limit: Array, forcing: float) -> tuple[Array, Array]:
    """Conjugate gradients from zero.

    Args:
        product: the matrix times a vector [s].
        right: [s].
        limit: scalar int32, iterations at most.
        forcing: part of the residual that may be left.

    Returns:
        The solution [s], and a direction without curvature or zero.
    """

    def unfinished(state: Any) -> Array:
        *_, square, i = state
        return (square > goal) & (i < limit)

    def iterate(state: Any) -> Any:
        u, r, towards, square, i = state
        seen = product(towards)
        curvature = jnp.sum(towards * seen)
        level = curvature <= FLAT * jnp.sum(towards * towards)
        share = jnp.where(level, 0.0, square / jnp.where(level, 1.0, curvature))
        r = r - share * seen
        new = jnp.sum(r * r)
        onward = jnp.where(level, towards, r + new / square * towards)
        return u + share * towards, r, onward, jnp.where(level, -1.0, new), i + 1

    square = jnp.sum(right * right)
    goal = forcing**2 * square
    first = (jnp.zeros_like(right), right, right, square, jnp.asarray(0, jnp.int32))
    u, _, towards, square, _ = lax.while_loop(unfinished, iterate, first)
    return u, jnp.where(square < 0.0, towards, 0.0)
