"""Coordinate ascent on the dual, one sample after another, with the products taken for many at a time.

With all others fixed, the best q_i on the simplex is the projection of q_i + z_i / (C_i ‖φ_i‖²): a few operations on k
numbers. What costs is z_i, which moves with every step. So samples are taken in chunks, whose z is one matrix product;
in a chunk only those whose best q_i differs are visited, in groups whose Gram matrix carries the effect of a step on
the rest of its group; and W follows once per group. The iterates are those of the sequential method.

Source: Keerthi et al., KDD 2008, for the sequential method; Yu et al., KDD 2010, for blocks.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm.problem import Array, Problem, contract, one_hot_of, places, with_constant

# Samples of a group: its Gram matrix costs as much per sample as the scores of this many classes.
GROUP = 64
# Steps of Michelot's method. It climbs to the threshold and hardly ever needs more than four.
CLIMBS = 8
# Curvature that counts as none.
SMALLEST = 1e-30


class Swept(NamedTuple):
    """What a sweep leaves.

    Attributes:
        weights: [k, D] W(α).
        simplex: [k, n] q.
        slack: scalar, Σ C_i Σ_c q_ic (m_i − z_ic) with every term as it was when its chunk came up.
        moved: scalar int32, samples that were visited.
    """

    weights: Array
    simplex: Array
    slack: Array
    moved: Array


class _Rows(NamedTuple):
    """A chunk in the working precision: features [b, D], cost and squared norm [b], margin [k, b], 0 at the label."""

    features: Array
    cost: Array
    square: Array
    margin: Array


def sweep(
    problem: Problem, weights: Array, simplex: Array, skip: Array, *, spread: Array | None = None, grid: Any = None
) -> Swept:
    """Visit every sample once whose q could gain.

    Args:
        problem: the samples; their leading `problem.rows` count.
        weights: [k, D] W(α) of all samples, in the precision that the sweep is to run in.
        simplex: [k, n] q, in the same precision.
        skip: scalar, leave a sample alone whose classes in q miss the highest score by no more than this.
        spread: scalar int64, if given the samples are taken in the order 0, spread, 2 spread, … modulo n: without a
            common divisor, every one comes up once, and each chunk is drawn from all over the data.
        grid: a dtype to round the dual variables to as they are set; then all that are on several classes are visited.

    Returns:
        Weights and q after the sweep, and what it saw.
    """
    n, k, size = problem.features.shape[0], simplex.shape[0], min(problem.chunk, problem.features.shape[0])

    def visit(i: Array, carry: Swept) -> Swept:
        if spread is None:
            start = jnp.minimum(i * size, n - size)
            place = start + jnp.arange(size, dtype=jnp.int32)
            counts = (place >= i * size) & (place < problem.rows)
            take = lambda a: lax.dynamic_slice_in_dim(a, start, size)  # noqa: E731
        else:
            turn = i * size + jnp.arange(size, dtype=jnp.int32)
            place = ((turn.astype(jnp.int64) * spread) % n).astype(jnp.int32)
            counts = turn < problem.rows
            take = lambda a: a[place]  # noqa: E731
        rows = _rows(problem, take, counts, k, carry.weights.dtype)
        q = carry.simplex[:, place] if spread is not None else lax.dynamic_slice_in_dim(carry.simplex, start, size, 1)
        weights, new, slack, moved = _chunk(rows, carry.weights, q, skip, grid)
        kept = carry.simplex.at[:, jnp.where(counts, place, n)].set(new, mode="drop")
        return Swept(weights, kept, carry.slack + slack, carry.moved + moved)

    first = Swept(weights, simplex, jnp.zeros((), weights.dtype), jnp.asarray(0, jnp.int32))
    return lax.fori_loop(jnp.asarray(0, jnp.int32), (problem.rows + size - 1) // size, visit, first)


def _rows(problem: Problem, take: Any, counts: Array, k: int, dtype: Any) -> _Rows:
    features = with_constant(take(problem.features).astype(dtype), problem.intercept_scaling)
    cost = jnp.where(counts, take(problem.cost).astype(dtype), 0.0)
    margin = problem.margin.astype(dtype) * (1.0 - one_hot_of(take(problem.labels), k, dtype))
    return _Rows(features, cost, jnp.sum(features * features, axis=1), margin)


def _chunk(rows: _Rows, weights: Array, q: Array, skip: Array, grid: Any) -> tuple[Array, Array, Array, Array]:
    """(weights, q, slack before, samples visited) of a chunk."""
    z = contract(weights, rows.features, 1, 1) + rows.margin
    highest = jnp.max(z, axis=0)
    slack = jnp.sum(rows.cost * jnp.sum(q * (highest[None, :] - z), axis=0))
    behind = highest - jnp.min(jnp.where(q > 0.0, z, jnp.inf), axis=0)
    moving = (behind > skip) & (rows.cost > 0.0)
    if grid is not None:
        moving = moving | ((jnp.sum(q > 0.0, axis=0, dtype=jnp.int32) > 1) & (rows.cost > 0.0))
    size = moving.shape[0]
    count = jnp.sum(moving, dtype=jnp.int32)
    order = places(moving, -(-size // GROUP) * GROUP, 0)

    def group(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        weights, q = carry
        local = lax.dynamic_slice_in_dim(order, j * GROUP, GROUP)
        steps = jnp.minimum(GROUP, count - j * GROUP)
        part = _Rows(rows.features[local], rows.cost[local], rows.square[local], rows.margin[:, local])
        old = q[:, local].T
        new = _group(part, weights, old, steps, grid)
        weights = weights + contract(part.cost[:, None] * (old - new), part.features, 0, 0)
        kept = jnp.where(jnp.arange(GROUP, dtype=jnp.int32) < steps, local, size)
        return weights, q.at[:, kept].set(new.T, mode="drop")

    groups = (count + GROUP - 1) // GROUP
    weights, q = lax.fori_loop(jnp.asarray(0, jnp.int32), groups, group, (weights, q))
    return weights, q, slack, count


def _group(part: _Rows, weights: Array, q: Array, steps: Array, grid: Any) -> Array:
    """[GROUP, k] q after a step for each of the first samples of a group, one after another."""
    gram = part.cost[:, None] * contract(part.features, part.features, 1, 1)
    z = contract(part.features, weights, 1, 1) + part.margin.T
    # A sample without features moves no score: it goes all the way to the classes that lead.
    pace = 1.0 / jnp.maximum(part.cost * part.square, SMALLEST)

    def one(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        z, q = carry
        new = _nearest(q[t] + pace[t] * z[t])
        if grid is not None:
            new = _rounded(new, part.cost[t], part.margin[:, t] == 0.0, grid)
        z = z - gram[t][:, None] * (new - q[t])[None, :]
        return z, q.at[t].set(new)

    return lax.fori_loop(jnp.asarray(0, jnp.int32), steps, one, (z, q))[1]


def _nearest(point: Array) -> Array:
    """The nearest point [k] of the simplex, as `simplex.project` but with a fixed number of steps, which fuse."""
    shifted = point - jnp.max(point)
    theta = jnp.maximum((jnp.sum(shifted) - 1.0) / point.shape[0], -1.0)
    for _ in range(CLIMBS):
        above = jnp.maximum(shifted - theta, 0.0)
        excess = jnp.sum(above) - 1.0
        theta = theta + jnp.maximum(excess, 0.0) / jnp.maximum(jnp.sum((above > 0.0).astype(point.dtype)), 1.0)
    q = jnp.maximum(shifted - theta, 0.0)
    # Should the steps not have sufficed, the point is feasible all the same.
    return q / jnp.sum(q)


def _rounded(q: Array, cost: Array, at_label: Array, grid: Any) -> Array:
    """The point [k] whose C q is of a dtype but at the label, which has what the others leave."""
    safe = jnp.where(cost > 0.0, cost, 1.0)
    others = jnp.where(at_label, 0.0, (cost * q).astype(grid).astype(q.dtype) / safe)
    return jnp.where(at_label, jnp.maximum(1.0 - jnp.sum(others), 0.0), others)
