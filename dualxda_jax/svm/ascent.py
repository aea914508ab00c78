"""Block coordinate ascent over a working set, in groups whose Gram matrices are computed once.

The working set's scores are those at the W that it started from, in float64 and less the largest of each sample, plus
those of the change of W since then. Both are small near the solution, and so is what float32 loses on them: sweeps in
float32 refine a solution in float64.

A step for one sample maximises the dual over q_i on the simplex,

    q_i ← Proj(q_i + g_i / (C_i ‖φ_i‖² + γ)),    g_i = z_i − γ q_i,

where z_i are the scores with the margin and γ is the smoothing.

Source: Keerthi et al., A sequential dual method for large scale multi-class linear SVMs (2008), with groups in the
place of single samples.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm.config import Heuristics
from dualxda_jax.svm.problem import Array, contract

INT = jnp.int32


class Block(NamedTuple):
    """The working set, m samples in whole groups; the others are held fixed.

    Attributes:
        features: [m, D] with the constant feature among them, in the precision of the sweeps.
        cost: [m]; 0 beyond the samples that count.
        at_label: [k, m] bool, one-hot labels.
        base: [k, m] g where the working set starts, less the largest of each sample.
        start: [k, m] float64 q where it starts.
        gram: [m, group] products of the features within each group.
        groups: scalar int32, groups that hold any sample.
        smoothing: scalar γ.
    """

    features: Array
    cost: Array
    at_label: Array
    base: Array
    start: Array
    gram: Array
    groups: Array
    smoothing: Array


class Sweep(NamedTuple):
    """What a sweep leaves.

    Attributes:
        change: [k, D] of W since the working set started.
        simplex: [k, m] float64 q.
        gap: scalar, the Frank-Wolfe gap seen on the way, Σ C_i (max_c g_ic − q_i·g_i).
        changed: scalar, samples whose active classes changed.
        free: scalar, samples with several active classes.
    """

    change: Array
    simplex: Array
    gap: Array
    changed: Array
    free: Array


def over(count: Array | int, body: Any, carry: Any) -> Any:
    """Fold `body(i, carry)` for i in 0..count-1; the count is traced."""
    return lax.fori_loop(jnp.asarray(0, INT), jnp.asarray(count, INT), body, carry)


def columns(a: Array, j: Array, size: int) -> Array:
    """Slice j of the last axis, in slices of one size."""
    return lax.dynamic_slice_in_dim(a, j * size, size, a.ndim - 1)


def rows(a: Array, j: Array, size: int) -> Array:
    """Slice j of the first axis."""
    return lax.dynamic_slice_in_dim(a, j * size, size, 0)


def put_columns(a: Array, b: Array, j: Array) -> Array:
    """Write slice j of the last axis."""
    return lax.dynamic_update_slice_in_dim(a, b, j * b.shape[-1], a.ndim - 1)


def put_rows(a: Array, b: Array, j: Array) -> Array:
    """Write slice j of the first axis."""
    return lax.dynamic_update_slice_in_dim(a, b, j * b.shape[0], 0)


def true_indices(chosen: Array, room: int, start: Array | int = 0, stride: int = 1) -> tuple[Array, Array, Array]:
    """Indices of the true entries of [n], in the order start, start + stride, … modulo n.

    Args:
        chosen: [n] bool.
        room: indices to return at most.
        start: where to begin.
        stride: coprime to n.

    Returns:
        [room] int32 indices, how many of them count, and where the next call is to begin.
    """
    n = chosen.shape[0]

    # A loop of scalar steps: XLA:CPU compiles it as it is, at 5 ns a step; cumsum and scatter take longer to compile
    # and to run.
    def one(_: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        order, count, place, last = carry
        here = lax.dynamic_index_in_dim(chosen, place, keepdims=False) & (count < room)
        order = lax.dynamic_update_index_in_dim(order, place, count, 0)
        following = place + stride
        following = jnp.where(following >= n, following - n, following)
        return order, count + here.astype(INT), following, jnp.where(here, following, last)

    first = jnp.asarray(start, INT)
    order, count, _, last = over(n, one, (jnp.zeros(room + 1, INT), jnp.asarray(0, INT), first, first))
    return order[:room], count, last


def count_true(values: Array, dtype: Any, axis: int | None = None) -> Array:
    """How many are true, as a number of a dtype."""
    return jnp.sum(jnp.where(values, 1.0, 0.0).astype(dtype), axis=axis)


def step_on_simplex(q: Array, step: Array, heuristics: Heuristics) -> Array:
    """The point [k] of the simplex that is nearest to q + step, to as many digits of the change as the step has.

    The point is max(q + step − θ, 0), so that q changes by max(step − θ, −q). Any set of classes that stay above zero
    gives a lower bound of θ: (Σ step inside − Σ q outside) / their number.
    """
    k, before, step = q.shape[0], q.astype(step.dtype), step - jnp.max(step)
    if k <= heuristics.few_classes:
        # One of the sets that hold a class and those ahead of it is the right one.
        point = before + step
        inside = point[None, :] >= point[:, None]
        total = jnp.sum(jnp.where(inside, step[None, :], -before[None, :]), axis=1)
        theta = jnp.max(total / count_true(inside, step.dtype, axis=1))
    else:

        def climb(_: Array, theta: Array) -> Array:
            inside = step - theta > -before
            count = jnp.maximum(count_true(inside, step.dtype), 1.0)
            return jnp.maximum(theta, jnp.sum(jnp.where(inside, step, -before)) / count)

        theta = over(heuristics.projection_steps, climb, jnp.max(step) - 1.0)
    change = step - theta
    new = jnp.where(change > -before, jnp.maximum(q + change.astype(q.dtype), 0.0), 0.0)
    # Should the steps not have sufficed, the point is feasible all the same.
    total = jnp.sum(new)
    return jnp.where(total == 0.0, q, new / total)


def visit(
    block: Block, j: Array, scores: Array, q: Array, order: Array, steps: Array, rounding: Any, heuristics: Heuristics
) -> Array:
    """Steps for some samples of group j, one after another.

    Args:
        block: the working set.
        j: scalar, the group.
        scores: [k, group] g of its samples now.
        q: [k, group].
        order: [group] int32, whose turn it is.
        steps: scalar int32, how many of them have one.
        rounding: (q [k, 1], cost [1], at_label [k, 1]) -> q that the result's dtype holds.
        heuristics: constants.

    Returns:
        [k, group] q after the steps.
    """
    size, dtype = scores.shape[1], scores.dtype
    gram, cost, at_label = rows(block.gram, j, size), columns(block.cost, j, size), columns(block.at_label, j, size)
    curvature = cost * jnp.diagonal(gram) + block.smoothing.astype(dtype)
    # A sample without features moves no score: it goes all the way to the leading classes.
    pace = 1.0 / jnp.maximum(curvature, heuristics.least_curvature)
    # With few classes every step corrects the scores of all; with many, each sample corrects its own when visited.
    at_once = scores.shape[0] <= heuristics.few_classes

    def one(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        track, moved = carry
        i = lax.dynamic_index_in_dim(order, t, keepdims=False)
        at = lambda a, axis: lax.dynamic_index_in_dim(a, i, axis, keepdims=False)  # noqa: E731
        reach, old = at(gram, 0), at(q, 1)
        mine = at(track, 1) if at_once else at(scores, 1) - contract(reach, track, 0, 0)
        new = step_on_simplex(old, at(pace, 0) * mine, heuristics)
        new = rounding(new[:, None], at(cost, 0)[None], at(at_label, 1)[:, None])[:, 0]
        step = at(cost, 0) * (new - old).astype(dtype)
        put = lax.dynamic_update_index_in_dim
        track = track - step[:, None] * reach[None, :] if at_once else put(track, step, i, 0)
        return track, put(moved, new, i, 1)

    return over(steps, one, (scores if at_once else jnp.zeros_like(scores.T), q))[1]


def sweep(block: Block, change: Array, simplex: Array, skip: Array, rounding: Any, heuristics: Heuristics) -> Sweep:
    """Visit every sample of the working set once whose violation exceeds `skip`.

    Args:
        block: the working set.
        change: [k, D] of W since it started.
        simplex: [k, m] q.
        skip: scalar; negative visits all.
        rounding: as in `visit`.
        heuristics: constants.
    """
    size, dtype = block.gram.shape[1], block.features.dtype

    def one(j: Array, carry: Sweep) -> Sweep:
        x, cost, old = rows(block.features, j, size), columns(block.cost, j, size), columns(simplex, j, size)
        moved = (block.smoothing * (old - columns(block.start, j, size))).astype(dtype)
        g = columns(block.base, j, size) + contract(carry.change, x, 1, 1) - moved
        high = jnp.max(g, axis=0)
        violation = high - jnp.min(jnp.where(old > 0.0, g, jnp.inf), axis=0)
        violation = jnp.where(cost > 0.0, violation, -jnp.inf)
        order, count, _ = true_indices(violation > skip, size)

        def visited() -> tuple[Array, Array]:
            new = visit(block, j, g, old, order, count, rounding, heuristics)
            return carry.change + contract(cost[None, :] * (old - new).astype(dtype), x, 1, 0), new

        change, new = lax.cond(count > 0, visited, lambda: (carry.change, old))
        return Sweep(
            change,
            put_columns(carry.simplex, new, j),
            carry.gap + jnp.sum(cost * jnp.sum(old.astype(dtype) * (high[None, :] - g), axis=0)),
            carry.changed + count_true(jnp.any((new > 0.0) != (old > 0.0), axis=0), dtype),
            carry.free + count_true(count_true(new > 0.0, dtype, axis=0) > 1.0, dtype),
        )

    # What q was is read from outside of the loop: XLA:CPU copies whole what a loop both reads and updates.
    zero = jnp.zeros((), dtype)
    return over(block.groups, one, Sweep(change, simplex, zero, zero, zero))


class Solved(NamedTuple):
    """Where the ascent over a working set stands.

    Attributes:
        change: [k, D] of W since it started.
        simplex: [k, m] q.
        gap: scalar, what the last sweep saw.
        limit: scalar int32, conjugate gradient iterations of the next subspace step.
        cycles: scalar int32, sweeps so far.
        steps: scalar int32, subspace steps so far.
    """

    change: Array
    simplex: Array
    gap: Array
    limit: Array
    cycles: Array
    steps: Array


def solve_working_set(
    block: Block, goal: Array, most: Array, rounding: Any, rounded: Array, subspace: Any, heuristics: Heuristics
) -> Solved:
    """Sweeps over a working set, with subspace steps once few of its samples change their active classes.

    Args:
        block: the working set.
        goal: scalar, the gap to reach.
        most: scalar int32, cycles at most.
        rounding: as in `visit`.
        rounded: scalar bool, whether this is the rounding sweep, which visits all samples.
        subspace: (block, change, q, limit) -> (change, q, whether the whole step was taken).
        heuristics: constants.
    """
    dtype = block.features.dtype
    goal = goal.astype(dtype)
    total = jnp.maximum(jnp.sum(block.cost), float(jnp.finfo(dtype).tiny))
    skip = jnp.minimum(heuristics.skip_share * goal / total, heuristics.skip_margin)
    skip = jnp.where(rounded, -1.0, skip).astype(dtype)

    def unfinished(state: Solved) -> Array:
        return ((state.gap > goal) | (state.cycles == 0)) & (state.cycles < most)

    def cycle(state: Solved) -> Solved:
        swept = sweep(block, state.change, state.simplex, skip, rounding, heuristics)
        settled = (swept.gap > goal) & (swept.changed <= heuristics.settled * swept.free) & ~rounded
        step = lambda: subspace(block, swept.change, swept.simplex, state.limit)  # noqa: E731
        stay = lambda: (swept.change, swept.simplex, jnp.asarray(False))  # noqa: E731
        change, q, whole = lax.cond(settled, step, stay)
        # A step that was cut short had most of its iterations in vain.
        limit = jnp.where(whole, 2 * state.limit, state.limit // 2)
        limit = jnp.clip(limit, heuristics.cg_least, heuristics.cg_most).astype(INT)
        limit = jnp.where(settled, limit, state.limit)
        return Solved(change, q, swept.gap, limit, state.cycles + 1, state.steps + settled.astype(INT))

    zero, limit = jnp.asarray(0, INT), jnp.asarray(heuristics.cg_least, INT)
    change = jnp.zeros((block.base.shape[0], block.features.shape[1]), dtype)
    first = Solved(change, block.start, jnp.asarray(jnp.inf, dtype), limit, zero, zero)
    return lax.while_loop(unfinished, cycle, first)
