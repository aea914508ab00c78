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
# Classes up to which a projection looks at all pairs of them; beyond, steps of Michelot's method, which climbs to the
# threshold and hardly ever needs more than three.
FEW_CLASSES, CLIMBS = 16, 8
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
    """A chunk in the working precision: features [b, D], cost [b], margin [k, b], 0 at the label."""

    features: Array
    cost: Array
    margin: Array


def sweep(
    problem: Problem, weights: Array, simplex: Array, skip: Array, *, order: Array | None = None, grid: Any = None
) -> Swept:
    """Visit every sample once whose q could gain.

    Args:
        problem: the samples; the leading `problem.rows` of them count, or of their order.
        weights: [k, D] W(α) of all samples, in the precision that the sweep is to run in.
        simplex: [k, n] q, in the same precision.
        skip: scalar, leave a sample alone whose classes in q miss the highest score by no more than this.
        order: [n] int32, if given the order to take the samples in.
        grid: a dtype to round the dual variables to as they are set; then all that are on several classes are visited.

    Returns:
        Weights and q after the sweep, and what it saw.
    """
    n, k, size = problem.features.shape[0], simplex.shape[0], min(problem.chunk, problem.features.shape[0])

    def visit(i: Array, carry: Swept) -> Swept:
        start = jnp.minimum(i * size, n - size)
        if order is None:
            place = start + jnp.arange(size, dtype=jnp.int32)
            counts = (place >= i * size) & (place < problem.rows)
            take = lambda a: lax.dynamic_slice_in_dim(a, start, size)  # noqa: E731
        else:
            place = lax.dynamic_slice_in_dim(order, start, size)
            turn = start + jnp.arange(size, dtype=jnp.int32)
            counts = (turn >= i * size) & (turn < problem.rows)
            take = lambda a: a[place]  # noqa: E731
        rows = _rows(problem, take, counts, k, carry.weights.dtype)
        q = carry.simplex[:, place] if order is not None else lax.dynamic_slice_in_dim(carry.simplex, start, size, 1)
        weights, new, slack, moved = _chunk(rows, carry.weights, q, skip, grid)
        kept = carry.simplex.at[:, jnp.where(counts, place, n)].set(new, mode="drop")
        return Swept(weights, kept, carry.slack + slack, carry.moved + moved)

    first = Swept(weights, simplex, jnp.zeros((), weights.dtype), jnp.asarray(0, jnp.int32))
    return lax.fori_loop(jnp.asarray(0, jnp.int32), (problem.rows + size - 1) // size, visit, first)


def _rows(problem: Problem, take: Any, counts: Array, k: int, dtype: Any) -> _Rows:
    features = with_constant(take(problem.features).astype(dtype), problem.intercept_scaling)
    cost = jnp.where(counts, take(problem.cost).astype(dtype), 0.0)
    margin = problem.margin.astype(dtype) * (1.0 - one_hot_of(take(problem.labels), k, dtype))
    return _Rows(features, cost, margin)


def _chunk(rows: _Rows, weights: Array, q: Array, skip: Array, grid: Any) -> tuple[Array, Array, Array, Array]:
    """(weights, q, slack before, samples visited) of a chunk."""
    z = contract(weights, rows.features, 1, 1) + rows.margin
    slack, moving = movers(z, q, rows.cost, skip)
    if grid is not None:
        moving = moving | ((jnp.sum(q > 0.0, axis=0, dtype=jnp.int32) > 1) & (rows.cost > 0.0))
    size = moving.shape[0]
    count = jnp.sum(moving, dtype=jnp.int32)
    order, before = places(moving, -(-size // GROUP) * GROUP, 0), q

    def group(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        weights, q = carry
        local = lax.dynamic_slice_in_dim(order, j * GROUP, GROUP)
        steps = jnp.minimum(GROUP, count - j * GROUP)
        part = _Rows(rows.features[local], rows.cost[local], rows.margin[:, local])
        old = before[:, local]
        new = _group(part, weights, old, steps, grid)
        weights = weights + contract(part.cost[None, :] * (old - new), part.features, 1, 0)
        kept = jnp.where(jnp.arange(GROUP, dtype=jnp.int32) < steps, local, size)
        return weights, q.at[:, kept].set(new, mode="drop")

    groups = (count + GROUP - 1) // GROUP
    weights, q = lax.fori_loop(jnp.asarray(0, jnp.int32), groups, group, (weights, q))
    return weights, q, slack, count


def movers(z: Array, q: Array, cost: Array, skip: Array) -> tuple[Array, Array]:
    """The slack of samples with scores z [k, b], and which [b] of them are to be visited, see `sweep`."""
    highest = jnp.max(z, axis=0)
    slack = jnp.sum(cost * jnp.sum(q.astype(z.dtype) * (highest[None, :] - z), axis=0))
    behind = highest - jnp.min(jnp.where(q > 0.0, z, jnp.inf), axis=0)
    return slack, (behind > skip) & (cost > 0.0)


def _group(part: _Rows, weights: Array, q: Array, steps: Array, grid: Any) -> Array:
    """[k, GROUP] q after a step for each of the first samples of a group, one after another."""
    z = contract(weights, part.features, 1, 1) + part.margin
    gram, order = contract(part.features, part.features, 1, 1), jnp.arange(GROUP, dtype=jnp.int32)
    rounded = None if grid is None else lambda new, t: _rounded(new, part.cost[t], part.margin[:, t] == 0.0, grid)
    return visited(gram, part.cost, z, q, order, steps, rounded)


def visited(gram: Array, cost: Array, z: Array, q: Array, order: Array, steps: Array, rounded: Any = None) -> Array:
    """Take a step for some samples of a group, one after another.

    Args:
        gram: [b, b] products of their features.
        cost: [b].
        z: [k, b] scores with the margin; what is the same for all classes of a sample does not matter.
        q: [k, b], in this precision or a wider one.
        order: [b] int32, whose turn it is, each at most once.
        steps: scalar int32, how many of them have one.
        rounded: (new q [k], place) -> the one to take.

    Returns:
        [k, b] the new q.
    """
    # A sample without features moves no score: it goes all the way to the classes that lead.
    pace = 1.0 / jnp.maximum(cost * jnp.diagonal(gram), SMALLEST)
    # With few classes every step corrects all scores; with many, steps are kept, and scores corrected at their turn.
    at_once = z.shape[0] <= FEW_CLASSES

    def one(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        track, moved = carry
        # Slices, as every index is within bounds: to look whether it is takes longer than a step. The old q comes from
        # outside of the loop: what a loop both reads and updates is copied each time.
        i = lax.dynamic_index_in_dim(order, t, keepdims=False)
        at = lambda a, axis: lax.dynamic_index_in_dim(a, i, axis, keepdims=False)  # noqa: E731
        reach, old = at(gram, 0), at(q, 1)
        mine = at(track, 1) if at_once else at(z, 1) - contract(reach, track, 0, 0)
        new = _stepped(old, at(pace, 0) * mine)
        if rounded is not None:
            new = rounded(new, i)
        step = at(cost, 0) * (new - old).astype(z.dtype)
        put = lax.dynamic_update_index_in_dim
        track = track - step[:, None] * reach[None, :] if at_once else put(track, step, i, 0)
        return track, put(moved, new, i, 1)

    track = z if at_once else jnp.zeros_like(z.T)
    return lax.fori_loop(jnp.asarray(0, jnp.int32), steps, one, (track, q))[1]


def _stepped(q: Array, step: Array) -> Array:
    """The point [k] of the simplex that is nearest to q + step, as by `simplex.project`, from a q in a wider precision.

    It is max(q + step − θ, 0), and max(step − θ, −q) is what q changes by, which is known to as many digits as the step
    is. Any set of classes that are to stay above zero gives a lower bound of θ: (Σ step inside − Σ q outside) / their
    number. With few classes, all sets are tried that hold a class and those ahead of it, one of which is right; with
    many, Michelot's method starts from the classes of q, which are hardly ever far from right.
    """
    k, before, step = q.shape[0], q.astype(step.dtype), step - jnp.max(step)
    if k <= FEW_CLASSES:
        point = before + step
        inside = point[None, :] >= point[:, None]
        total = jnp.sum(jnp.where(inside, step[None, :], -before[None, :]), axis=1)
        # Not as a cast, which XLA gets wrong here where it does not optimise.
        theta = jnp.max(total / jnp.sum(jnp.where(inside, 1.0, 0.0).astype(step.dtype), axis=1))
    else:
        # Not -1: where steps are huge, the largest need not be exactly 0 once the compiler has fused the line above.
        theta, inside = jnp.max(step) - 1.0, before > 0.0
        for _ in range(CLIMBS):
            count = jnp.maximum(jnp.sum(jnp.where(inside, 1.0, 0.0).astype(step.dtype)), 1.0)
            theta = jnp.maximum(theta, jnp.sum(jnp.where(inside, step, -before)) / count)
            inside = step - theta > -before
    change = step - theta
    new = jnp.where(change > -before, jnp.maximum(q + change.astype(q.dtype), 0.0), 0.0)
    # Should the steps not have sufficed, the point is feasible all the same.
    total = jnp.sum(new)
    return jnp.where(total == 0.0, q, new / total)


def _rounded(q: Array, cost: Array, at_label: Array, grid: Any) -> Array:
    """The point [k] whose C q is of a dtype but at the label, which has what the others leave."""
    safe = jnp.where(cost > 0.0, cost, 1.0)
    others = jnp.where(at_label, 0.0, (cost * q).astype(grid).astype(q.dtype) / safe)
    return jnp.where(at_label, jnp.maximum(1.0 - jnp.sum(others), 0.0), others)
