"""The semismooth Newton method on the augmented Lagrangian, for as many rows as fit into one dense block.

The proximal point method on the dual keeps an anchor q̄ and a penalty r and minimises over W the smooth function

    φ(W) = ½‖W‖² + Σ_i C_i max_q [ q·z_i − z_{i y_i} − ‖q − q̄_i‖² / 2r ],       q_i = Proj(q̄_i + r z_i)

whose gradient is W − W(α(q)). Its generalised Hessian I + r Σ_i C_i J_i ⊗ φ_iφ_iᵀ with J_i = diag(s) − ssᵀ/|s|, s the
positive entries of q_i, counts only rows with two or more of them: few of all near the optimum. Newton's equation is
solved by conjugate gradients over those rows alone. Along the direction z changes linearly, so that the line search
needs projections but no product with the features. Then the anchor moves to q and the penalty grows. Every q is
feasible, so that every step has an exact gap, and zeros are exact.

A preconditioner from the covariance of the free rows, exact or of rank 64, took as many iterations as none: directions
that all classes of a row share cost nothing in the Hessian but much in the preconditioner.

Source: Yan & Li, Efficient semismooth Newton for SVMs (2019), and Niu et al. (2019), for two classes; the multi-class
form replaces their scalar projection by the one onto the simplex.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm import simplex
from dualxda_jax.svm.config import SolverConfig
from dualxda_jax.svm.problem import Array, alpha_of, contract, places

MAX_PENALTY = 1e8
FORCING = 0.1
FORCING_LATE = 0.03
MAX_CG = 100
FREE_AT_ONCE = 256
MAX_TRIALS = 10
# A trial ends the line search where this little of the slope is left.
SLOPE_LEFT = 0.4
# Newton steps up to which an inner problem counts as easy, and from which on as hard; and iterations in the last one.
EASY, HARD, EASY_CG = 6, 12, 25
NEAR = 3.0


class Rows(NamedTuple):
    """Some rows, all others held fixed.

    Attributes:
        features: [b, D] in the working precision, the constant feature among them.
        one_hot: [k, b] labels.
        cost: [b]; 0 for rows that do not count.
        offset: [k, D] what the rows held fixed add to W(α).
        margin: scalar, the margin asked for.
        low: [b, D] the features in the precision of Newton's directions, which may be inexact.
        norms: [b] norms of the features.
    """

    features: Array
    one_hot: Array
    cost: Array
    offset: Array
    margin: Array
    low: Array
    norms: Array


class Inner(NamedTuple):
    """Where the method stands.

    Attributes:
        weights: [k, D] the primal point.
        z: [k, b] its scores, plus the margin off the label.
        q: [k, b] on the simplex.
        anchor: [k, b] proximal centre.
        penalty: scalar r.
        made: [k, D] W(α(q)).
        primal: scalar, the primal objective of these rows alone.
        slack: scalar, the duality gap of (W, α(q)) less `distance`.
        distance: scalar, ½‖W − W(α)‖².
        reach: scalar, Σ C_i ‖φ_i‖ over the free rows: by how much of ‖W − W(α)‖ the slack at W(α) exceeds that at W.
        iterations: scalar, conjugate gradient iterations of the last Newton step.
        since: scalar, Newton steps since the anchor moved.
        steps: scalar, steps in all.
    """

    weights: Array
    z: Array
    q: Array
    anchor: Array
    penalty: Array
    made: Array
    primal: Array
    slack: Array
    distance: Array
    reach: Array
    iterations: Array
    since: Array
    steps: Array


class Goal(NamedTuple):
    """When to stop, all scalars.

    Attributes:
        absolute: the gap to reach, but for
        share: the part of the primal objective that is added to it.
        closeness: the part of that gap that ½‖W − W(α)‖² may be.
        tight: bool, W must be so close to W(α) that the gap there is about the same.
        max_steps: steps to take at most.
    """

    absolute: Array
    share: Array
    closeness: Array
    tight: Array
    max_steps: Array

    def gap(self, inner: Inner) -> Array:
        return self.absolute + self.share * inner.primal

    def distance(self, inner: Inner) -> Array:
        enough = self.gap(inner)
        # Where W moves by δ, slack grows by at most δ · reach; seldom by more than a tenth of it. Below lies rounding.
        apart = enough / jnp.maximum(inner.reach, 1e-30)
        floor = 16.0 * jnp.finfo(enough.dtype).eps * inner.reach
        tight = 0.5 * jnp.maximum(NEAR * apart, floor) ** 2
        return jnp.where(self.tight, jnp.minimum(tight, self.closeness * enough), self.closeness * enough)


def solve_rows(rows: Rows, weights: Array, q: Array, penalty: Array, goal: Goal, config: SolverConfig) -> Inner:
    """Solve for some rows.

    Args:
        rows: the rows.
        weights: [k, D] where to start.
        q: [k, b] the dual variables to start from.
        penalty: scalar, the first penalty.
        goal: when to stop.
        config: static options.
    """
    z = contract(weights, rows.features, 1, 1) + rows.margin * (1.0 - rows.one_hot)
    zero = jnp.asarray(0, jnp.int32)
    first = _look(rows, weights, z, q, penalty, (zero, zero, zero))

    def unfinished(inner: Inner) -> Array:
        far = (inner.slack + inner.distance > goal.gap(inner)) | (inner.distance > goal.distance(inner))
        return far & (inner.steps < goal.max_steps)

    return lax.while_loop(unfinished, lambda inner: _step(rows, inner, goal, config), first)


def _look(rows: Rows, weights: Array, z: Array, anchor: Array, penalty: Array, counts: tuple[Array, ...]) -> Inner:
    """All that is known at W: q, W(α(q)) and the gap; `counts` are the last three fields of `Inner`."""
    q = simplex.project(anchor + penalty * z, axis=0)
    made = rows.offset + contract(alpha_of(q, rows.one_hot, rows.cost), rows.features, 1, 0)
    highest = jnp.max(z, axis=0)
    slack = jnp.sum(rows.cost * jnp.sum(q * (highest[None, :] - z), axis=0))
    hinge = jnp.sum(rows.cost * (highest - jnp.sum(rows.one_hot * z, axis=0)))
    primal = 0.5 * jnp.sum(weights * weights) + hinge
    distance = 0.5 * jnp.sum((weights - made) ** 2)
    reach = jnp.sum(jnp.where(_free(rows, q), rows.cost * rows.norms, 0.0))
    return Inner(weights, z, q, anchor, penalty, made, primal, slack, distance, reach, *counts)


def _free(rows: Rows, q: Array) -> Array:
    """[b] rows on several classes at once."""
    return (jnp.sum(q > 0.0, axis=0, dtype=jnp.int32) > 1) & (rows.cost > 0.0)


def _step(rows: Rows, inner: Inner, goal: Goal, config: SolverConfig) -> Inner:
    """One Newton step with its line search or, where the inner problem is solved well enough, a move of the anchor."""
    close = inner.slack <= 0.5 * goal.gap(inner)
    solved = (inner.distance <= config.accuracy * inner.slack) & ~close
    hopeless = (inner.since >= config.max_newton) & ~solved
    settled = solved | hopeless
    anchor = jnp.where(solved, inner.q, inner.anchor)
    # The penalty grows while inner problems are easy. One that Newton's method can hardly solve gets a softer one, and
    # one that it cannot solve at all keeps its anchor.
    easy = (inner.since <= EASY) & (inner.iterations <= EASY_CG)
    hard = inner.since > HARD
    change = jnp.where(hard, 1.0 / config.growth, jnp.where(easy, config.growth, 1.0))
    change = jnp.where(hopeless, config.growth**-2.0, jnp.where(solved, change, 1.0))
    penalty = jnp.minimum(inner.penalty * change, MAX_PENALTY)
    gradient = inner.weights - inner.made
    forcing = jnp.where(settled, 2.0, jnp.where(close, FORCING_LATE, FORCING))
    towards, iterations = _direction(rows, inner.q, penalty, gradient, forcing)
    change_z = contract(towards, rows.features, 1, 1)
    length = _line_search(rows, inner, anchor, penalty, gradient, towards, change_z, settled)
    # No step along this direction goes down: stay, and move on with a softer penalty.
    stuck = ~settled & (length == 0.0)
    since = jnp.where(settled, 0, jnp.where(stuck, config.max_newton, inner.since + 1)).astype(jnp.int32)
    weights, z = inner.weights + length * towards, inner.z + length * change_z
    counts = (jnp.where(settled, inner.iterations, iterations), since, inner.steps + 1)
    return _look(rows, weights, z, anchor, penalty, counts)


def _line_search(
    rows: Rows, inner: Inner, anchor: Array, penalty: Array, gradient: Array, towards: Array, change_z: Array,
    skip: Array,
) -> Array:  # fmt: skip
    """How far to go: a root of φ's slope, roughly; regula falsi between a point that falls and one that rises.

    φ is convex, so wherever its slope is still negative it lies below where it was. A full step is taken as it is where
    it still falls.
    """
    at_label = jnp.sum(rows.one_hot * change_z, axis=0)
    flat = jnp.sum((inner.weights - rows.offset) * towards)
    square = jnp.sum(towards * towards)
    falling = jnp.sum(gradient * towards)

    def slope(length: Array) -> Array:
        q = simplex.project(anchor + penalty * (inner.z + length * change_z), axis=0)
        return flat + length * square + jnp.sum(rows.cost * (jnp.sum(q * change_z, axis=0) - at_label))

    def unfinished(state: Any) -> Array:
        *_, now, trials = state
        far = (now > 0.0) & (jnp.abs(now) > SLOPE_LEFT * jnp.abs(falling))
        return ~skip & (falling < 0.0) & ((trials == 0) | (far & (trials < MAX_TRIALS)))

    def attempt(state: Any) -> Any:
        length, low, high, at_low, at_high, _, trials = state
        share = jnp.clip(-at_low / (at_high - at_low), 0.1, 0.9)
        length = jnp.where(trials == 0, 1.0, low + (high - low) * share)
        now = slope(length)
        falls = now < 0.0
        low, at_low = jnp.where(falls, length, low), jnp.where(falls, now, at_low)
        high, at_high = jnp.where(falls, high, length), jnp.where(falls, at_high, now)
        return length, low, high, at_low, at_high, now, trials + 1

    zero = jnp.zeros_like(falling)
    first = (zero, zero, zero + 1.0, falling, falling, falling, jnp.asarray(0, jnp.int32))
    length, low, _, _, _, now, _ = lax.while_loop(unfinished, attempt, first)
    return jnp.where(jnp.abs(now) <= SLOPE_LEFT * jnp.abs(falling), length, low)


def _direction(rows: Rows, q: Array, penalty: Array, gradient: Array, forcing: Array) -> tuple[Array, Array]:
    """Minus the generalised Hessian's inverse times the gradient, by conjugate gradients over the free rows.

    Args:
        rows: the rows.
        q: [k, b] on the simplex.
        penalty: scalar r.
        gradient: [k, D].
        forcing: scalar, the residual to reach relative to the gradient; 1 or more returns zero.
    """
    b, dtype = q.shape[1], rows.low.dtype
    size = min(FREE_AT_ONCE, b)
    padded = -(-b // size) * size
    free = _free(rows, q)
    total = jnp.sum(free, dtype=jnp.int32)
    parts = jnp.where(forcing < 1.0, (total + size - 1) // size, 0)
    order = jnp.pad(places(free, b, 0), (0, padded - b))
    counts = jnp.arange(padded, dtype=jnp.int32) < total
    scale = jnp.where(counts, penalty * rows.cost[order], 0.0).astype(dtype)
    active = (q[:, order] > 0.0).astype(dtype)
    nothing = jnp.asarray(0, jnp.int32)

    # The free rows are laid side by side once: every iteration reads them twice.
    def lay(i: Array, buffer: Array) -> Array:
        mine = rows.low[lax.dynamic_slice_in_dim(order, i * size, size)]
        return lax.dynamic_update_slice_in_dim(buffer, mine, i * size, 0)

    dense = lax.fori_loop(nothing, parts, lay, jnp.zeros((padded, rows.low.shape[1]), dtype))

    def times(search: Array) -> Array:
        def add(i: Array, result: Array) -> Array:
            take = lambda a, axis: lax.dynamic_slice_in_dim(a, i * size, size, axis)  # noqa: E731
            x, s = take(dense, 0), take(active, 1)
            change = contract(search, x, 1, 1)
            mean = jnp.sum(s * change, axis=0, keepdims=True) / jnp.maximum(jnp.sum(s, axis=0, keepdims=True), 1.0)
            return result + contract(take(scale, 0)[None, :] * s * (change - mean), x, 1, 0)

        return lax.fori_loop(nothing, parts, add, search)

    def unfinished(state: tuple[Array, Array, Array, Array, Array]) -> Array:
        _, _, _, square, i = state
        return (square > goal) & (i < MAX_CG)

    def iterate(state: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
        x, residual, search, square, i = state
        image = times(search)
        length = square / jnp.sum(search * image)
        x, residual = x + length * search, residual - length * image
        new = jnp.sum(residual * residual)
        return x, residual, residual + (new / square) * search, new, i + 1

    # The gradient's size is taken out, so that float32 neither under- nor overflows.
    size_of = jnp.maximum(jnp.sqrt(jnp.sum(gradient * gradient)), jnp.finfo(gradient.dtype).tiny)
    right = (-gradient / size_of).astype(dtype)
    square = jnp.sum(right * right)
    goal = square * (forcing * forcing).astype(dtype)
    found, *_, iterations = lax.while_loop(unfinished, iterate, (jnp.zeros_like(right), right, right, square, nothing))
    return size_of * found.astype(gradient.dtype), iterations
