"""One step of the semismooth Newton method on the augmented Lagrangian.

The proximal point method on the dual keeps an anchor q̄ and a penalty r and minimises over W the smooth function

    φ(W) = ½‖W‖² + Σ_i C_i max_q [ q·z_i − z_{i y_i} − ‖q − q̄_i‖² / 2r ],       q_i = Proj(q̄_i + r z_i)

whose gradient is W − W(α(q)). Its generalised Hessian I + r Σ_i C_i J_i ⊗ φ_iφ_iᵀ with J_i = diag(s) − ssᵀ/|s|, s the positive
entries of q_i, counts only rows with two or more of them: few of all near the optimum. Newton's equation is solved by
conjugate gradients over those rows alone. Then the anchor moves to q and the penalty grows. Every q is feasible, so that every
step has an exact gap, and zeros are exact.

Source: Yan & Li, Efficient semismooth Newton for SVMs (2019), and Niu et al. (2019), for two classes; the multi-class
form replaces their scalar projection by the one onto the simplex.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm import simplex
from dualxda_jax.svm.problem import (
    Array,
    Chunk,
    Problem,
    outer,
    over_rows,
    row_gap,
    rows_of,
    scores,
    weights_of,
)

MAX_PENALTY = 1e8
FORCING = 0.1
MAX_CG = 500


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evaluation:
    """φ and what else one pass at W gives.

    Attributes:
        simplex: [n, k] q.
        made: [k, d + 1] W(α(q)); the gradient of φ is W less this.
        value: scalar φ(W).
        primal: scalar, primal objective at W.
        slack: scalar, the duality gap of (W, α(q)) less ½‖W − W(α)‖².
    """

    simplex: Array
    made: Array
    value: Array
    primal: Array
    slack: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolverState:
    """Where a solve stands; pass it to `step`.

    Attributes:
        weights: [k, d + 1] the primal point, the last column for the constant feature.
        anchor: [n, k] proximal centre on the simplex.
        penalty: scalar r.
        newton_steps: scalar, Newton steps since the anchor moved.
        epochs: scalar, passes over the features so far.
        at: what the pass at `weights` gave.
    """

    weights: Array
    anchor: Array
    penalty: Array
    newton_steps: Array
    epochs: Array
    at: Evaluation

    @property
    def distance(self) -> Array:
        """½‖W − W(α)‖², at once half the squared gradient of φ and the other part of the gap."""
        return 0.5 * jnp.sum((self.weights - self.at.made) ** 2)

    @property
    def gap(self) -> Array:
        """The absolute duality gap of (weights, α)."""
        return self.at.slack + self.distance


def evaluate(problem: Problem, weights: Array, anchor: Array, penalty: Array) -> Evaluation:
    """φ, its gradient and the gap at W, in one pass over the features."""
    k = anchor.shape[1]
    dtype = anchor.dtype

    def add(chunk: Chunk, start: Array, carry: Any) -> Any:
        q, made, sums = carry
        plain = scores(chunk, weights, problem.intercept_scaling)
        margins = plain + (1.0 - chunk.one_hot)
        old = lax.dynamic_slice_in_dim(anchor, start, chunk.cost.shape[0])
        new = simplex.project(old + penalty * margins)
        true = jnp.sum(plain * chunk.one_hot, axis=1)
        gain = jnp.sum(new * margins, axis=1) - true - jnp.sum((new - old) ** 2, axis=1) / (2.0 * penalty)
        hinge = jnp.max(margins, axis=1) - true
        parts = [jnp.sum(chunk.cost * gain), jnp.sum(chunk.cost * hinge), jnp.sum(row_gap(chunk, margins, new))]
        made = made + outer(chunk.cost[:, None] * (chunk.one_hot - new), chunk, problem.intercept_scaling)
        return lax.dynamic_update_slice_in_dim(q, new, start, 0), made, sums + jnp.stack(parts)

    first = (jnp.zeros_like(anchor), jnp.zeros_like(weights), jnp.zeros(3, dtype))
    q, made, sums = over_rows(problem, k, add, first)
    norm = 0.5 * jnp.sum(weights * weights)
    return Evaluation(q, made, norm + sums[0], norm + sums[1], sums[2])


def newton_direction(
    problem: Problem, q: Array, penalty: Array, gradient: Array, *, forcing: Array, max_iterations: int
) -> Array:
    """Minus the generalised Hessian's inverse times the gradient, by conjugate gradients over the free rows.

    Args:
        problem: the data.
        q: [n, k] on the simplex.
        penalty: scalar r.
        gradient: [k, d + 1].
        forcing: scalar, the residual to reach relative to the gradient; 1 or more returns zero.
        max_iterations: cap on the iterations.
    """
    n, k = q.shape
    size = min(problem.chunk, n)
    free = (jnp.sum(q > 0.0, axis=1, dtype=jnp.int32) > 1) & (problem.cost > 0.0)
    index = jnp.arange(n, dtype=jnp.int32)
    order = lax.sort([(~free).astype(jnp.int32), index], num_keys=1)[1]
    total = jnp.sum(free, dtype=jnp.int32)

    def times(direction: Array) -> Array:
        def add(i: Array, result: Array) -> Array:
            places = i * size + jnp.arange(size, dtype=jnp.int32)
            rows = order[jnp.minimum(places, n - 1)]
            chunk = rows_of(problem, rows, places < total, k)
            change = scores(chunk, direction, problem.intercept_scaling)
            s = (q[rows] > 0.0).astype(q.dtype)
            mean = jnp.sum(s * change, axis=1, keepdims=True) / jnp.sum(s, axis=1, keepdims=True)
            return result + outer(penalty * chunk.cost[:, None] * s * (change - mean), chunk, problem.intercept_scaling)

        return lax.fori_loop(jnp.asarray(0, jnp.int32), (total + size - 1) // size, add, direction)

    def unfinished(state: tuple[Array, Array, Array, Array, Array]) -> Array:
        _, _, _, square, i = state
        return (square > goal) & (i < max_iterations)

    def iterate(state: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
        x, residual, search, square, i = state
        image = times(search)
        size_ = square / jnp.sum(search * image)
        x, residual = x + size_ * search, residual - size_ * image
        new = jnp.sum(residual * residual)
        return x, residual, residual + (new / square) * search, new, i + 1

    square = jnp.sum(gradient * gradient)
    goal = square * forcing * forcing
    start = (jnp.zeros_like(gradient), -gradient, -gradient, square, jnp.asarray(0, jnp.int32))
    return lax.while_loop(unfinished, iterate, start)[0]


def advance(problem: Problem, state: SolverState, *, accuracy: float, growth: float, max_newton: int) -> SolverState:
    """One Newton step with a line search or, where the inner problem is solved well enough, a move of the anchor."""
    settled = (state.distance <= accuracy * state.at.slack) | (state.newton_steps >= max_newton)
    anchor = jnp.where(settled, state.at.simplex, state.anchor)
    penalty = jnp.where(settled, jnp.minimum(state.penalty * growth, MAX_PENALTY), state.penalty)
    gradient = state.weights - state.at.made
    direction = newton_direction(
        problem,
        state.at.simplex,
        penalty,
        gradient,
        forcing=jnp.where(settled, 2.0, FORCING),
        max_iterations=MAX_CG,
    )
    slope = jnp.sum(gradient * direction)
    noise = 64.0 * jnp.finfo(gradient.dtype).eps * jnp.abs(state.at.value)

    def attempt(length: Array) -> tuple[Array, Evaluation]:
        weights = state.weights + length * direction
        return weights, evaluate(problem, weights, anchor, penalty)

    def refused(trial: tuple[Array, Array, Array, Evaluation]) -> Array:
        length, _, _, at = trial
        enough = at.value <= state.at.value + 1e-4 * length * slope + noise
        return ~(settled | enough) & (length > 1e-4)

    def shorten(trial: tuple[Array, Array, Array, Evaluation]) -> tuple[Array, Array, Array, Evaluation]:
        length, passes, _, _ = trial
        weights, at = attempt(0.5 * length)
        return 0.5 * length, passes + 1, weights, at

    one = jnp.ones((), gradient.dtype)
    weights, at = attempt(one)
    _, passes, weights, at = lax.while_loop(refused, shorten, (one, jnp.asarray(1, jnp.int32), weights, at))
    newton_steps = jnp.where(settled, 0, state.newton_steps + 1)
    return SolverState(weights, anchor, penalty, newton_steps, state.epochs + passes, at)


def start(problem: Problem, anchor: Array, penalty: float) -> SolverState:
    """The state of a solve that starts from the dual variables of `anchor` [n, k]."""
    weights = weights_of(problem, anchor)
    first = jnp.asarray(penalty, anchor.dtype)
    at = evaluate(problem, weights, anchor, first)
    return SolverState(weights, anchor, first, jnp.asarray(0, jnp.int32), jnp.asarray(2, jnp.int32), at)
