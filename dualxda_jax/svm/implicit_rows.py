"""The products and the linear solve behind derivatives of the solution (`implicit`, whose names these are).

Everything runs in float64, over rows that are cast chunk by chunk.

Source: conjugate residuals: Saad, Iterative Methods for Sparse Linear Systems (2003), algorithm 6.20.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dualxda_jax.svm.problem import Array, contract, places, with_constant

_MAX_ITERATIONS = 5000


class Point(NamedTuple):
    """A solved problem: coefficients [n, k], features [n, d], labels [n], cost [n], smoothing γ."""

    coefficients: Array
    features: Array
    labels: Array
    cost: Array
    smoothing: Array


class Static(NamedTuple):
    """What a program is compiled for: b, rows reserved for the free ones (None: all) and rows cast at once."""

    intercept_scaling: float
    capacity: int | None
    chunk: int


class Face(NamedTuple):
    """What the pattern of a solution gives, in float64.

    Attributes:
        active: [n, k] 1 at the positive entries of P, one or more a row.
        free: [n] rows with two or more of them.
        direction: [n, k] e_y − s/|s|: how α moves with the cost, but for u.
        alpha: [n, k] the coefficients.
        weights: [k, d] or, with an intercept, [k, d + 1].
        simplex: [n, k] q.
    """

    active: Array
    free: Array
    direction: Array
    alpha: Array
    weights: Array
    simplex: Array


def tangent(active: Array, values: Array) -> Array:
    """T: keep the active entries of each row and subtract their mean."""
    kept = jnp.where(active > 0.0, values, 0.0)
    mean = jnp.sum(kept, axis=1) / jnp.maximum(jnp.sum(active, axis=1), 1.0)
    return jnp.where(active > 0.0, kept - mean[:, None], 0.0)


def sum_rows(left: Array, right: Array) -> Array:
    """Product leftᵀ · right, replicated: rows across an Explicit mesh axis end in one sum over the devices."""
    if not _row_sharded(right):
        return contract(left, right, 0, 0)
    everywhere = NamedSharding(jax.typeof(right).sharding.mesh, PartitionSpec(None, None))
    dimensions = (((0,), (0,)), ((), ()))
    return lax.dot_general(left, right, dimensions, precision=lax.Precision.HIGHEST, out_sharding=everywhere)


def _extended(features: Array, scaling: float) -> Array:
    """Rows in float64, with the constant feature where there is one."""
    return with_constant(features.astype(jnp.float64), scaling)


def outer(left: Array, features: Array, scaling: float, chunk: int) -> Array:
    """Σ_i left_i ⊗ (φ_i, b): [k, d] or [k, d + 1]; float64 rows are made chunk by chunk."""
    n, k = left.shape
    width = features.shape[1] + (scaling != 0.0)
    if _whole(features, chunk):
        return sum_rows(left, _extended(features, scaling))

    def add(number: Array, total: Array) -> Array:
        start = jnp.minimum(number * chunk, n - chunk)
        fresh = start + jnp.arange(chunk, dtype=jnp.int32) >= number * chunk
        rows = jnp.where(fresh[:, None], lax.dynamic_slice_in_dim(left, start, chunk), 0.0)
        return total + contract(rows, _extended(lax.dynamic_slice_in_dim(features, start, chunk), scaling), 0, 0)

    return lax.fori_loop(*_count(-(-n // chunk)), add, jnp.zeros((k, width), jnp.float64))


def scores(features: Array, weights: Array, scaling: float, chunk: int) -> Array:
    """[n, k] (φ_i, b) · weightsᵀ, chunk by chunk."""
    n, k = features.shape[0], weights.shape[0]
    if _whole(features, chunk):
        return contract(_extended(features, scaling), weights, 1, 1)

    def write(number: Array, out: Array) -> Array:
        start = jnp.minimum(number * chunk, n - chunk)
        rows = contract(_extended(lax.dynamic_slice_in_dim(features, start, chunk), scaling), weights, 1, 1)
        return lax.dynamic_update_slice_in_dim(out, rows, start, 0)

    return lax.fori_loop(*_count(-(-n // chunk)), write, jnp.zeros((n, k), jnp.float64))


def _row_sharded(array: Array) -> bool:
    """Rows lie across an Explicit mesh axis: they are neither sliced nor gathered."""
    spec = jax.typeof(array).sharding.spec
    return len(spec) > 0 and spec[0] is not None


def _whole(features: Array, chunk: int) -> bool:
    return features.shape[0] <= chunk or _row_sharded(features)


def _count(number: Array | int) -> tuple[Array, Array]:
    """Bounds of a loop in int32 whether or not x64 is enabled."""
    return jnp.asarray(0, jnp.int32), jnp.asarray(number, jnp.int32)


def solve(at: Point, face: Face, right: Array, static: Static) -> Array:
    """Solve (T K T + γ/C) u = right for u [n, k] in the range of T; right is in that range."""
    n, k = right.shape
    cost = at.cost.astype(jnp.float64)[:, None]
    shift = jnp.where(cost > 0.0, at.smoothing.astype(jnp.float64) / jnp.where(cost > 0.0, cost, 1.0), 0.0)
    scaling = static.intercept_scaling
    # T of every row with one active entry is 0: in the order of the whole, such rows do no harm.
    if _row_sharded(at.features):
        scale = _unit_scale(_extended(at.features, scaling))
        rows = _extended(at.features, scaling) * scale

        def apply_all(u: Array) -> Array:
            return tangent(face.active, contract(rows, sum_rows(u, rows), 1, 1)) + scale**2 * shift * u

        return scale * _conjugate_residuals(apply_all, scale * right, _limit(face))

    capacity = n if static.capacity is None else min(static.capacity, n)
    block = min(capacity, static.chunk)
    capacity = -(-capacity // block) * block
    where = places(face.free, capacity, n)
    blocks = -(-jnp.sum(face.free, dtype=jnp.int32) // block)
    inside = jnp.minimum(where, n - 1)
    active = jnp.where((where < n)[:, None], face.active[inside], 0.0)

    def rows_of(number: Array) -> tuple[Array, Array]:
        part = lax.dynamic_slice_in_dim(inside, number * block, block)
        rows = _extended(at.features[part], scaling)
        scale = _unit_scale(rows)
        return rows * scale, scale

    def apply(u: Array) -> Array:
        def add(number: Array, total: Array) -> Array:
            part = lax.dynamic_slice_in_dim(u, number * block, block)
            return total + contract(part, rows_of(number)[0], 0, 0)

        def write(number: Array, out: Array) -> Array:
            part = tangent(
                lax.dynamic_slice_in_dim(active, number * block, block), contract(rows_of(number)[0], weights, 1, 1)
            )
            return lax.dynamic_update_slice_in_dim(out, part, number * block, 0)

        weights = lax.fori_loop(*_count(blocks), add, jnp.zeros_like(face.weights))
        return lax.fori_loop(*_count(blocks), write, jnp.zeros_like(u)) + scale**2 * shift[inside] * u

    def scales(number: Array, out: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(out, rows_of(number)[1], number * block, 0)

    scale = lax.fori_loop(*_count(blocks), scales, jnp.ones((capacity, 1), jnp.float64))
    gathered = jnp.where(active > 0.0, scale * right[inside], 0.0)
    u = scale * _conjugate_residuals(apply, gathered, _limit(face))
    return jnp.zeros((n, k), jnp.float64).at[where].set(u, mode="drop")


def _unit_scale(rows: Array) -> Array:
    """[rows, 1] what brings each row to norm 1; 1 for a row of zeros."""
    squared = jnp.sum(rows * rows, axis=1, keepdims=True)
    return jnp.where(squared > 0.0, 1.0 / jnp.sqrt(jnp.where(squared > 0.0, squared, 1.0)), 1.0)


def _limit(face: Face) -> Array:
    """Steps allowed: exact arithmetic needs at most one for each free coordinate."""
    coordinates = jnp.sum(jnp.where(face.free, jnp.sum(face.active, axis=1) - 1.0, 0.0))
    return jnp.minimum(4.0 * coordinates + 20.0, float(_MAX_ITERATIONS))


def _conjugate_residuals(apply: Callable[[Array], Array], right: Array, limit: Array) -> Array:
    """Minimise ‖right − A x‖ from x = 0, A symmetric and positive semidefinite.

    Conjugate residuals rather than gradients: on a singular system without solution they still settle.
    """
    first = apply(right)
    energy = jnp.sum(right * first)
    floor = 1e-32 * energy
    small = 1e-30 * jnp.sum(right * right)

    def unfinished(state: Any) -> Array:
        step, _, residual, _, _, energy = state
        return (step < limit) & (energy > floor) & (jnp.sum(residual * residual) > small)

    def advance(state: Any) -> Any:
        step, x, residual, search, image, energy = state
        squared = jnp.sum(image * image)
        length = jnp.where(squared > 0.0, energy / jnp.where(squared > 0.0, squared, 1.0), 0.0)
        x, residual = x + length * search, residual - length * image
        applied = apply(residual)
        after = jnp.sum(residual * applied)
        ratio = after / energy
        return step + 1.0, x, residual, residual + ratio * search, applied + ratio * image, after

    start = (jnp.zeros_like(limit), jnp.zeros_like(right), right, right, first, energy)
    return lax.while_loop(unfinished, advance, start)[1]
