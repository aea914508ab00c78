"""Conjugate gradients on the face by one matrix, where so little is free that it is small.

A step u of a sample on the classes A, which must sum to zero, is made of steps from one class of A to each other: with
(i, c) for sample i going to class c from its first class r_i, b = e_c − e_{r_i} and v the lengths, u = Σ v b, and the
matrix of v is (B Bᵀ) ⊙ (X Xᵀ), B the rows b and X the features of the samples. An iteration is one small product.
"""

import jax.numpy as jnp

from dualxda_jax.svm import conjugate
from dualxda_jax.svm.problem import Array, contract, places

# Steps that there is room for, so many times the iterations that reading the features would get, and at most.
ROOM, LONGER, MOST = 256, 2, 300


def count(active: Array) -> Array:
    """How many steps there are for active [k, p] bool."""
    number = jnp.sum(active, axis=0, dtype=jnp.int32)
    return jnp.sum(jnp.maximum(number - 1, 0), dtype=jnp.int32)


def solve(features: Array, active: Array, slope: Array, limit: Array, forcing: float) -> tuple[Array, Array]:
    """Conjugate gradients for J X Xᵀ J u = slope, J the removal of the mean over the active classes of a sample.

    Args:
        features: [p, D] X, the free samples at norm 1.
        active: [k, p] bool, the classes that they are on; `count` of them is `ROOM` at most.
        slope: [k, p] balanced.
        limit: scalar int32, iterations at most.
        forcing: part of the residual that may be left.

    Returns:
        u [k, p], and a direction without curvature or zero.
    """
    k, dtype = slope.shape[0], features.dtype
    classes = jnp.arange(k, dtype=jnp.int32)
    # Not argmax, which wants int64 where x64 is on.
    first = jnp.min(jnp.where(active, classes[:, None], k), axis=0)
    others = (active & (classes[:, None] != first[None, :])).T.reshape(-1)
    total = jnp.sum(others, dtype=jnp.int32)
    index = places(others, ROOM, 0)
    there = jnp.arange(ROOM, dtype=jnp.int32) < total
    sample, to = index // k, index % k
    start = first[sample]
    base = (classes[None, :] == to[:, None]).astype(dtype) - (classes[None, :] == start[:, None]).astype(dtype)
    x = jnp.where(there[:, None], features[sample], 0.0)
    matrix = contract(base, base, 1, 1) * contract(x, x, 1, 1)
    right = jnp.where(there, slope[to, sample] - slope[start, sample], 0.0).astype(dtype)

    times = lambda values: contract(values[None, :], matrix, 1, 0)[0]  # noqa: E731
    v, level = conjugate.solve(times, right, limit, forcing)

    def back(values: Array) -> Array:
        values = jnp.where(there, values, 0.0).astype(slope.dtype)
        return jnp.zeros_like(slope).at[to, sample].add(values).at[start, sample].add(-values)

    return back(v), back(level)
