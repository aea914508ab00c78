"""Blocks by coordinate ascent, with steps on the face in between.

Sweeps decide which classes each q_i is on; once few samples change theirs in a sweep, a step on the face balances all
of them at once. Neither can lower the dual objective.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from dualxda_jax.svm import coordinate, face, working_set
from dualxda_jax.svm.config import SolverConfig
from dualxda_jax.svm.problem import Array, Problem, normalised, places, weights_of, with_constant
from dualxda_jax.svm.working_set import SolverState

# Sweeps between steps on the face, and the part of the free samples that may change classes in the last of them.
SWEEPS, SETTLED = 3, 0.25
# Cycles without a slack below FALL of the least so far after which the precision is taken to be exhausted.
PATIENCE, FALL = 8, 0.8
MAX_CYCLES = 100
# A sweep leaves alone what misses by this part of the mean over all costs of the slack asked for.
SKIP = 0.02
# A block leaves this part of the slack that it finds; where that is almost enough, it goes all the way.
REDUCTION, ALMOST, ENOUGH = 0.3, 4.0, 0.4
# Rows of a block for every undecided sample.
ROOM = 1.4
# Operations that the overhead of visiting one sample is worth; and sweeps that a step on the face may be worth.
OVERHEAD, WORTH, MOST_ITERATIONS, FIRST_ITERATIONS = 1.2e5, 14, 300, 16


class Solved(NamedTuple):
    """Where a block stands.

    Attributes:
        weights: [k, D] W(α) of all samples.
        simplex: [k, m] q of the block.
        slack: scalar, what the last sweep saw.
        least: scalar, the least of those.
        since: scalar int32, cycles since that was found.
        visits: scalar, rows read; a step on the face counts as one time all.
        limit: scalar int32, iterations of the next step on the face.
        cycles: scalar int32.
    """

    weights: Array
    simplex: Array
    slack: Array
    least: Array
    since: Array
    visits: Array
    limit: Array
    cycles: Array


def solve(block: Problem, weights: Array, simplex: Array, goal: Array, visits: Array, low: Any = None) -> Solved:
    """Solve for a block.

    Args:
        block: dense rows [m, D] with the constant feature among them, in any order but sorted.
        weights: [k, D] W(α) of all samples, in the precision to work in.
        simplex: [k, m] q of the block.
        goal: scalar, the slack to reach.
        visits: scalar, rows to read at most.
        low: the precision of directions; that of the weights if None.
    """
    dtype = weights.dtype
    goal = goal.astype(dtype)
    least, most = FIRST_ITERATIONS, _iterations(weights.shape[1], simplex.shape[0])
    total = jnp.sum(block.cost.astype(dtype), dtype=dtype)
    skip = jnp.maximum(SKIP * goal / jnp.maximum(total, jnp.finfo(dtype).tiny), 0.0)
    rows = block.rows.astype(jnp.float32)

    def unfinished(state: Solved) -> Array:
        going = (state.slack > goal) & (state.since < PATIENCE) & (state.visits < visits)
        return (state.cycles == 0) | (going & (state.cycles < MAX_CYCLES))

    def cycle(state: Solved) -> Solved:
        def one(i: Array, carry: Any) -> Any:
            weights, q, _, _ = carry
            swept = coordinate.sweep(block, weights, q, skip)
            return swept.weights, swept.simplex, swept.slack, _changed(q, swept.simplex)

        zero = jnp.zeros((), dtype)
        nothing = jnp.asarray(0, jnp.int32)
        start = (state.weights, state.simplex, zero, nothing)
        weights, q, slack, changed = lax.fori_loop(nothing, SWEEPS, one, start)
        free = jnp.sum(jnp.sum(q > 0.0, axis=0, dtype=jnp.int32) > 1, dtype=jnp.int32)
        settled = (slack > goal) & (changed.astype(jnp.float32) <= SETTLED * free.astype(jnp.float32))
        stay = lambda: (weights, q, jnp.asarray(False))  # noqa: E731
        weights, q, kept = lax.cond(settled, lambda: face.improve(block, weights, q, state.limit, low), stay)
        # A step that others got in the way of was too long: most of its iterations were in vain.
        limit = jnp.clip(jnp.where(kept, 2 * state.limit, state.limit // 2), min(least, most), most)
        fell = slack < FALL * state.least
        return Solved(
            weights,
            q,
            slack,
            jnp.minimum(slack, state.least),
            jnp.where(fell, 0, state.since + 1).astype(jnp.int32),
            state.visits + SWEEPS * rows + jnp.where(settled, rows, 0.0),
            jnp.where(settled, limit, state.limit).astype(jnp.int32),
            state.cycles + 1,
        )

    none, zero = jnp.asarray(0, jnp.int32), jnp.zeros((), jnp.float32)
    infinite, limit = jnp.asarray(jnp.inf, dtype), jnp.asarray(min(least, most), jnp.int32)
    return lax.while_loop(unfinished, cycle, Solved(weights, simplex, infinite, infinite, none, zero, limit, none))


def _changed(before: Array, after: Array) -> Array:
    return jnp.sum(jnp.any((before > 0.0) != (after > 0.0), axis=0), dtype=jnp.int32)


def _iterations(width: int, k: int) -> int:
    """Iterations on the face that take about as long as some sweeps."""
    sweep = OVERHEAD + width * (6 * k + 2 * coordinate.GROUP)
    # More than there are weights are of no use.
    return min(max(8, round(WORTH * sweep / (4 * width * k))), MOST_ITERATIONS, width * k)


def solve_block(
    problem: Problem, state: SolverState, target: Array, size: int, config: SolverConfig, dtype: Any
) -> SolverState:
    """Solve for the samples that are least decided.

    Args:
        problem: all samples.
        state: where the solve stands; its weights are W(α).
        target: scalar, the relative gap that the solve is after.
        size: static, rows that there is room for.
        config: static options.
        dtype: the precision to sweep in.

    Returns:
        The state with new q and its W(α), and a lead of -inf where q is new; what a survey tells is still that of
        before.
    """
    index, there = choose(problem.cost, state, size, config)
    low = direction_dtype(problem, dtype)
    return settle(gather(problem, index, there, dtype), state, index, there, target, config, low)


def direction_dtype(problem: Problem, dtype: Any) -> Any:
    """float32, but for float64 features: they come with tight tolerances and large costs."""
    return dtype if problem.features.dtype == jnp.float64 else jnp.float32


def choose(costs: Array, state: SolverState, size: int, config: SolverConfig) -> tuple[Array, Array]:
    """[size] places of the samples to solve for, and which of them count: the leading ones."""
    index, valid = working_set.least_decided(costs, state, size)
    wanted = jnp.minimum((ROOM * state.undecided.astype(jnp.float32)).astype(jnp.int32), size)
    valid = valid & (jnp.arange(size, dtype=jnp.int32) < jnp.maximum(wanted, min(config.block, size)))
    # In no order: neighbours in rank want the same of W.
    shuffle = jnp.asarray(np.random.default_rng(0).permutation(size).astype(np.int32))
    index, valid = index[shuffle], valid[shuffle]
    return index[places(valid, size, 0)], jnp.arange(size, dtype=jnp.int32) < jnp.sum(valid, dtype=jnp.int32)


def settle(
    block: Problem, state: SolverState, index: Array, there: Array, target: Array, config: SolverConfig, low: Any
) -> SolverState:
    """Solve for chosen samples.

    Args:
        block: their rows, in the precision to sweep in.
        state: where the solve stands.
        index: [size] their places among all.
        there: [size] bool, which of them count.
        target: scalar, the relative gap that the solve is after.
        config: static options.
        low: the precision of directions.
    """
    n, dtype = state.norms.shape[0], block.cost.dtype
    mine = state.simplex[:, index]
    enough = ENOUGH * target * state.primal
    goal = jnp.where(REDUCTION * state.slack <= ALMOST * enough, enough, REDUCTION * state.slack)
    left = jnp.maximum(config.max_epochs * float(n) - state.visits, 1.0).astype(jnp.float32)
    solved = solve(block, state.weights.astype(dtype), mine.astype(dtype), goal, left, low)
    # W(α) follows in the precision of the state, so that what sweeps lose to rounding does not add up.
    exact = dataclasses.replace(block, cost=block.cost.astype(state.weights.dtype), offset=state.weights)
    found = normalised(solved.simplex, mine.dtype)
    weights = weights_of(exact, found - mine)
    return dataclasses.replace(
        state,
        weights=weights,
        made=weights,
        simplex=state.simplex.at[:, jnp.where(there, index, n)].set(found, mode="drop"),
        lead=state.lead.at[jnp.where(there, index, n)].set(-jnp.inf, mode="drop"),
        visits=state.visits + solved.visits.astype(state.visits.dtype),
    )


def gather(problem: Problem, index: Array, there: Array, dtype: Any) -> Problem:
    """Rows [m] of a problem as a dense one of their own; those that are `there` [m], the leading ones, count."""
    features = with_constant(problem.features[index].astype(dtype), problem.intercept_scaling)
    cost = jnp.where(there, problem.cost[index].astype(dtype), 0.0)
    rows = jnp.sum(there, dtype=jnp.int32)
    return dataclasses.replace(
        problem, features=features, labels=problem.labels[index], cost=cost, rows=rows, intercept_scaling=0.0
    )
