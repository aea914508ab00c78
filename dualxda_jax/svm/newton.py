"""The semismooth Newton method on the augmented Lagrangian.

The proximal point method on the dual keeps an anchor q̄ and a penalty r and minimises over W the smooth function

    φ(W) = ½‖W‖² + Σ_i C_i max_q [ q·z_i − z_{i y_i} − ‖q − q̄_i‖² / 2r ],       q_i = Proj(q̄_i + r z_i)

whose gradient is W − W(α(q)). Its generalised Hessian I + r Σ_i C_i J_i ⊗ φ_iφ_iᵀ with J_i = diag(s) − ssᵀ/|s|, s the
positive entries of q_i, counts only rows with two or more of them: few of all near the optimum. Newton's equation is
solved by conjugate gradients over those rows alone. Then the anchor moves to q and the penalty grows. Every q is
feasible, so that every step has an exact gap, and zeros are exact.

Source: Yan & Li, Efficient semismooth Newton for SVMs (2019), and Niu et al. (2019), for two classes; the multi-class
form replaces their scalar projection by the one onto the simplex.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm import simplex
from dualxda_jax.svm.config import SolverConfig
from dualxda_jax.svm.problem import Array, Chunk, Problem, columns, gather, outer, over_rows, places, scores

MAX_PENALTY = 1e8
FORCING = 0.1
FORCING_LATE = 0.01
MAX_CG = 500
SHORTEST_STEP = 1e-4
TRUST = 0.1
# Newton steps up to which an inner problem counts as easy.
EASY = 6
# Newton steps that no configuration allows: the next step moves the anchor.
NEVER = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one pass at W gives.

    Attributes:
        simplex: [k, n] q.
        made: [k, d + 1] W(α(q)); the gradient of φ is W less this.
        value: scalar φ(W).
        primal: scalar, primal objective at W.
        slack: scalar, the duality gap of (W, α(q)) less ½‖W − W(α)‖².
        lead: [n] by how much the only class of q_i is ahead of all others in z_i; −inf where q_i has more than one.
    """

    simplex: Array
    made: Array
    value: Array
    primal: Array
    slack: Array
    lead: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolverState:
    """Where a solve stands.

    Attributes:
        weights: [k, d + 1] the primal point, the last column for the constant feature.
        anchor: [k, n] proximal centre on the simplex.
        penalty: scalar r.
        newton_steps: scalar, Newton steps since the anchor moved.
        epochs: scalar, passes over the features so far.
        trust: scalar, the relative gap below which working sets are tried.
        at: what the pass at `weights` gave.
    """

    weights: Array
    anchor: Array
    penalty: Array
    newton_steps: Array
    epochs: Array
    trust: Array
    at: Evaluation

    @property
    def distance(self) -> Array:
        """½‖W − W(α)‖², at once half the squared gradient of φ and the other part of the gap."""
        return 0.5 * jnp.sum((self.weights - self.at.made) ** 2)

    @property
    def gap(self) -> Array:
        """The absolute duality gap of (weights, α)."""
        return self.at.slack + self.distance


def lead_of(q: Array, z: Array, cost: Array) -> Array:
    """See `Evaluation.lead`; rows without cost are ahead by infinity."""
    inside = q > 0.0
    single = jnp.sum(inside.astype(jnp.int32), axis=0, dtype=jnp.int32) == 1
    ahead = jnp.min(jnp.where(inside, z, jnp.inf), axis=0) - jnp.max(jnp.where(inside, -jnp.inf, z), axis=0)
    return jnp.where(cost > 0.0, jnp.where(single, ahead, -jnp.inf), jnp.inf)


def evaluate(problem: Problem, weights: Array, anchor: Array, penalty: Array) -> Evaluation:
    """φ, its gradient and the gap at W, in one pass over the features."""
    k = anchor.shape[0]
    scaling = problem.intercept_scaling

    def add(chunk: Chunk, start: Array, carry: Any) -> Any:
        q, made, lead, sums = carry
        plain = scores(chunk, weights, scaling)
        z = plain + problem.margin * (1.0 - chunk.one_hot)
        old = columns(anchor, start, chunk)
        new = simplex.project(old + penalty * z, axis=0)
        true = jnp.sum(plain * chunk.one_hot, axis=0)
        highest = jnp.max(z, axis=0)
        gain = jnp.sum(new * z - (new - old) ** 2 / (2.0 * penalty), axis=0) - true
        slack = jnp.sum(new * (highest[None, :] - z), axis=0)
        parts = [jnp.sum(chunk.cost * a) for a in (gain, highest - true, slack)]
        made = made + outer(chunk.cost[None, :] * (chunk.one_hot - new), chunk, scaling)
        q = lax.dynamic_update_slice_in_dim(q, new, start, 1)
        ahead = lead_of(new, z, lax.dynamic_slice_in_dim(problem.cost, start, chunk.cost.shape[0]))
        return q, made, lax.dynamic_update_slice_in_dim(lead, ahead, start, 0), sums + jnp.stack(parts)

    first = (anchor, problem.offset, jnp.full_like(problem.cost, jnp.inf), jnp.zeros(3, anchor.dtype))
    q, made, lead, sums = over_rows(problem, k, add, first)
    norm = 0.5 * jnp.sum(weights * weights)
    value = norm - jnp.sum(weights * problem.offset) + sums[0]
    return Evaluation(q, made, value, norm + sums[1], sums[2], lead)


def direction(problem: Problem, q: Array, penalty: Array, gradient: Array, forcing: Array) -> Array:
    """Minus the generalised Hessian's inverse times the gradient, by conjugate gradients over the free rows.

    Args:
        problem: the data.
        q: [k, n] on the simplex.
        penalty: scalar r.
        gradient: [k, d + 1].
        forcing: scalar, the residual to reach relative to the gradient; 1 or more returns zero.
    """
    k, n = q.shape
    size = min(problem.chunk, n)
    free = (jnp.sum(q > 0.0, axis=0, dtype=jnp.int32) > 1) & (problem.cost > 0.0)
    order = places(free, n, 0)
    total = jnp.sum(free, dtype=jnp.int32)
    order = jnp.pad(order, (0, size))

    def times(search: Array) -> Array:
        def add(i: Array, result: Array) -> Array:
            place = i * size + jnp.arange(size, dtype=jnp.int32)
            rows = lax.dynamic_slice_in_dim(order, i * size, size)
            chunk = gather(problem, rows, place < total, k)
            change = scores(chunk, search, problem.intercept_scaling)
            s = (q[:, rows] > 0.0).astype(q.dtype)
            mean = jnp.sum(s * change, axis=0, keepdims=True) / jnp.sum(s, axis=0, keepdims=True)
            return result + outer(penalty * chunk.cost[None, :] * s * (change - mean), chunk, problem.intercept_scaling)

        return lax.fori_loop(jnp.asarray(0, jnp.int32), (total + size - 1) // size, add, search)

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

    square = jnp.sum(gradient * gradient)
    goal = square * forcing * forcing
    start = (jnp.zeros_like(gradient), -gradient, -gradient, square, jnp.asarray(0, jnp.int32))
    return lax.while_loop(unfinished, iterate, start)[0]


def advance(problem: Problem, state: SolverState, enough: Array, config: SolverConfig) -> SolverState:
    """One Newton step with a line search or, where the inner problem is solved well enough, a move of the anchor.

    Args:
        problem: the data.
        state: where the solve stands.
        enough: scalar, a slack that needs no further move of the anchor: what is left is to bring W to W(α).
        config: static options.
    """
    close = state.at.slack <= enough
    settled = (state.distance <= config.accuracy * state.at.slack) & ~close
    settled = settled | (state.newton_steps == NEVER)
    hopeless = (state.newton_steps >= config.max_newton) & ~settled
    still = settled | hopeless
    anchor = jnp.where(settled, state.at.simplex, state.anchor)
    # The penalty grows while inner problems are easy. One that Newton's method cannot solve gets a softer penalty, and
    # keeps its anchor.
    hard = (state.newton_steps > EASY) & (state.newton_steps < NEVER)
    change = jnp.where(hopeless, config.growth**-2.0, jnp.where(settled & ~hard, config.growth, 1.0))
    penalty = jnp.minimum(state.penalty * change, MAX_PENALTY)
    gradient = state.weights - state.at.made
    forcing = jnp.where(still, 2.0, jnp.where(close, FORCING_LATE, FORCING))
    towards = direction(problem, state.at.simplex, penalty, gradient, forcing)
    slope = jnp.sum(gradient * towards)
    noise = 64.0 * jnp.finfo(gradient.dtype).eps * jnp.abs(state.at.value)

    def refused(trial: tuple[Array, Array, Array, Evaluation]) -> Array:
        length, passes, _, at = trial
        lower = at.value <= state.at.value + 1e-4 * length * slope + noise
        return (passes == 0) | (~(still | lower) & (length > SHORTEST_STEP))

    def shorten(trial: tuple[Array, Array, Array, Evaluation]) -> tuple[Array, Array, Array, Evaluation]:
        length, passes, _, _ = trial
        weights = state.weights + 0.5 * length * towards
        return 0.5 * length, passes + 1, weights, evaluate(problem, weights, anchor, penalty)

    # One place for the pass, before the first try as after a refusal: it is most of what there is to compile.
    first = (jnp.full((), 2.0, gradient.dtype), jnp.asarray(0, jnp.int32), state.weights, state.at)
    length, passes, weights, at = lax.while_loop(refused, shorten, first)
    # No step along this direction goes down: stay, and soften the penalty next.
    stuck = ~still & ~(at.value <= state.at.value + 1e-4 * length * slope + noise)
    weights = jnp.where(stuck, state.weights, weights)
    at = jax.tree.map(lambda old, new: jnp.where(stuck, old, new), state.at, at)
    newton_steps = jnp.where(still, 0, jnp.where(stuck, config.max_newton, state.newton_steps + 1))
    return SolverState(weights, anchor, penalty, newton_steps, state.epochs + passes, state.trust, at)


def start(problem: Problem, weights: Array, anchor: Array, penalty: Array) -> SolverState:
    """A state that nothing is known about yet: its gap is infinite and the first step evaluates it.

    Args:
        problem: the data.
        weights: [k, d + 1] where to start.
        anchor: [k, n] the dual variables to start from.
        penalty: scalar, what the first step grows into r.
    """
    unknown = jnp.full((), jnp.inf, anchor.dtype)
    at = Evaluation(anchor, weights, unknown, jnp.ones_like(unknown), unknown, jnp.full_like(problem.cost, -jnp.inf))
    trust = jnp.asarray(TRUST, anchor.dtype)
    return SolverState(weights, anchor, penalty, jnp.asarray(NEVER, jnp.int32), jnp.asarray(0, jnp.int32), trust, at)
