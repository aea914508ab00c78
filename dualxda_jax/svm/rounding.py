"""Dual variables that the dtype of the result holds, in rows that sum to zero exactly.

The α of a sample are multiples of one power of two, fine enough that every sum of them up to C is a number of that
dtype. So rows sum to zero in the result's own arithmetic, and what is certified is exactly what is returned.
"""

from typing import Any

import jax.numpy as jnp

from dualxda_jax.svm.problem import Array


def on_grid(simplex: Array, cost: Array, at_label: Array, dtype: Any) -> Array:
    """Q [k, b] whose C q, but for the label's, are multiples of one power of two for each sample.

    It is the distance of neighbours in `dtype` around α at the label, which is the sum of the others. The label takes
    what they leave; where it had nothing, or they round to more than C, the largest of them gives way.
    """
    wide = cost.astype(jnp.float64)
    safe = jnp.where(wide > 0.0, wide, 1.0)
    mine = jnp.sum(jnp.where(at_label, simplex, 0.0), axis=0)
    total = jnp.maximum(wide * (1.0 - mine), float(jnp.finfo(dtype).tiny))
    # An exponent that is one too low at a power of two still holds every sum up to it.
    grid = jnp.exp2(jnp.floor(jnp.log2(total))) * float(jnp.finfo(dtype).eps)
    others = jnp.where(at_label, 0.0, jnp.round(wide[None, :] * simplex / grid[None, :]))
    excess = jnp.sum(others, axis=0) - jnp.floor(wide / grid)
    excess = jnp.where(mine == 0.0, excess, jnp.maximum(excess, 0.0))
    classes = jnp.arange(simplex.shape[0], dtype=jnp.int32)[:, None]
    largest = jnp.min(jnp.where(others == jnp.max(others, axis=0)[None, :], classes, simplex.shape[0]), axis=0)
    others = others - jnp.where(classes == largest[None, :], excess[None, :], 0.0)
    per = (grid / safe)[None, :]
    left = jnp.maximum(1.0 - jnp.sum(others * per, axis=0), 0.0)
    left = jnp.where(mine == 0.0, 0.0, left)[None, :]
    return jnp.where((wide > 0.0)[None, :], jnp.where(at_label, left, others * per), simplex)


def coefficients_of(simplex: Array, cost: Array, at_label: Array, dtype: Any) -> Array:
    """[n, k] α in `dtype` of q [k, n] on its grid."""
    others = jnp.where(at_label, 0.0, cost[None, :] * simplex).astype(dtype).astype(jnp.float64)
    return jnp.where(at_label, jnp.sum(others, axis=0)[None, :], -others).T.astype(dtype)
