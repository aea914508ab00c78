"""Blocks by coordinate ascent, with steps on the face in between.

Sweeps decide which classes each q_i is on; once few samples change theirs in a sweep, a step on the face balances all
of them at once. Neither can lower the dual objective.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from dualxda_jax.svm import face, grouped, working_set
from dualxda_jax.svm.config import SolverConfig
from dualxda_jax.svm.problem import Array, Problem, places, weights_of, with_constant
from dualxda_jax.svm.working_set import SolverState

# Sweeps between steps on the face at most, fewer once so small a part of the free samples changes classes in one; and
# the part that may in the last of them.
SWEEPS, CALM, SETTLED = 2, 0.02, 0.25
# Cycles without a slack below FALL of the least so far after which the precision is taken to be exhausted.
PATIENCE, FALL = 8, 0.8
MAX_CYCLES = 100
# A sweep leaves alone what misses by this part of the mean over all costs of the slack asked for.
SKIP = 0.02
# A block leaves this part of the slack that it finds, less where it is calm: where hardly any of its samples has to
# leave the class that it is on, so that few others will. Where that is almost enough, it goes all the way.
REDUCTION, CALM_REDUCTION, ALMOST, ENOUGH = 0.3, 0.03, 4.0, 0.4
# Rows of a block for every undecided sample, and at least.
ROOM, LEAST = 1.2, 256
# Iterations of a step on the face: of the first one, at most, and the sweeps that the longest may be worth. A sweep is
# worth one iteration, and SLOWER / width more for all that is not in its products.
ITERATIONS, MOST_ITERATIONS, WORTH, SLOWER = 16, 300, 9, 5500.0


class Solved(NamedTuple):
    """Where a block stands.

    Attributes:
        change: [k, D] of W(α) since the block started.
        simplex: [k, m] q of the block.
        slack: scalar, what the last sweep saw.
        least: scalar, the least of those.
        since: scalar int32, cycles since that was found.
        visits: scalar, rows read; a step on the face counts as one time all.
        limit: scalar int32, iterations of the next step on the face.
        cycles: scalar int32.
    """

    change: Array
    simplex: Array
    slack: Array
    least: Array
    since: Array
    visits: Array
    limit: Array
    cycles: Array


def solve(block: Problem, weights: Array, simplex: Array, goal: Array, visits: Array) -> Solved:
    """Solve for a block.

    Args:
        block: dense rows [m, D] with the constant feature among them, in any order but sorted.
        weights: [k, D] W(α) of all samples, in the precision to take the first scores in.
        simplex: [k, m] q of the block, in that precision.
        goal: scalar, the slack to reach.
        visits: scalar, rows to read at most.
    """
    dtype, group = block.cost.dtype, grouped.block_of(block, weights)
    goal = goal.astype(dtype)
    # More than there are weights are of no use.
    most = min(round(WORTH * (1.0 + SLOWER / weights.shape[1])), MOST_ITERATIONS, weights.size)
    total = jnp.sum(block.cost.astype(dtype), dtype=dtype)
    skip = jnp.maximum(SKIP * goal / jnp.maximum(total, jnp.finfo(dtype).tiny), 0.0)
    rows = block.rows.astype(jnp.float32)
    none, zero = jnp.asarray(0, jnp.int32), jnp.zeros((), jnp.float32)

    def unfinished(state: Solved) -> Array:
        going = (state.slack > goal) & (state.since < PATIENCE) & (state.visits < visits)
        return (state.cycles == 0) | (going & (state.cycles < MAX_CYCLES))

    def cycle(state: Solved) -> Solved:
        def again(carry: Any) -> Array:
            *_, changed, free, i = carry
            return (i == 0) | ((i < SWEEPS) & (changed > CALM * free))

        def one(carry: Any) -> Any:
            change, q, _, _, _, i = carry
            swept = grouped.sweep(group, change, q, skip)
            return swept.weights, swept.simplex, swept.slack, *_stir(q, swept.simplex), i + 1

        start = (state.change, state.simplex, jnp.zeros((), dtype), zero, zero, none)
        change, q, slack, changed, free, sweeps = lax.while_loop(again, one, start)
        settled = (slack > goal) & (changed <= SETTLED * free)
        stay = lambda: (change, q, jnp.asarray(False))  # noqa: E731
        step = lambda: face.improve(group, change, q, state.limit)  # noqa: E731
        change, q, kept = lax.cond(settled, step, stay)
        # A step that others got in the way of was too long: most of its iterations were in vain.
        limit = jnp.clip(jnp.where(kept, 2 * state.limit, state.limit // 2), min(ITERATIONS, most), most)
        fell = slack < FALL * state.least
        return Solved(
            change,
            q,
            slack,
            jnp.minimum(slack, state.least),
            jnp.where(fell, 0, state.since + 1).astype(jnp.int32),
            state.visits + sweeps.astype(jnp.float32) * rows + jnp.where(settled, rows, 0.0),
            jnp.where(settled, limit, state.limit).astype(jnp.int32),
            state.cycles + 1,
        )

    infinite = jnp.asarray(jnp.inf, dtype)
    limit = jnp.asarray(min(ITERATIONS, most), jnp.int32)
    unmoved = jnp.zeros_like(weights, dtype)
    return lax.while_loop(unfinished, cycle, Solved(unmoved, simplex, infinite, infinite, none, zero, limit, none))


def _stir(before: Array, after: Array) -> tuple[Array, Array]:
    """How many samples changed their classes, and how many are on several, in float32."""
    changed = jnp.any((before > 0.0) != (after > 0.0), axis=0)
    free = jnp.sum(after > 0.0, axis=0, dtype=jnp.int32) > 1
    return jnp.sum(changed, dtype=jnp.float32), jnp.sum(free, dtype=jnp.float32)


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
    return settle(gather(problem, index, there, dtype), state, index, there, target, config)


def sweep_dtype(problem: Problem, dtype: Any) -> Any:
    """The precision to solve for a block in, where its first scores are in `dtype`: a change of them need not be."""
    return dtype if problem.features.dtype == jnp.float64 else jnp.float32


def row_bytes(width: int, dtype: Any) -> int:
    """What a row of a block takes: its features, those of the face with their Gram matrices, and that of its group."""
    return (3 * width + grouped.GROUP) * (8 if dtype == jnp.float64 else 4)


def choose(costs: Array, state: SolverState, size: int, config: SolverConfig) -> tuple[Array, Array]:
    """[size] places of the samples to solve for, and which of them count: the leading ones."""
    index, valid = working_set.least_decided(costs, state, size, ranked=True)
    wanted = jnp.minimum((ROOM * state.undecided.astype(jnp.float32)).astype(jnp.int32), size)
    valid = valid & (jnp.arange(size, dtype=jnp.int32) < jnp.maximum(wanted, min(config.block, size, LEAST)))
    # In no order: neighbours in rank want the same of W.
    shuffle = jnp.asarray(np.random.default_rng(0).permutation(size).astype(np.int32))
    index, valid = index[shuffle], valid[shuffle]
    return index[places(valid, size, 0)], jnp.arange(size, dtype=jnp.int32) < jnp.sum(valid, dtype=jnp.int32)


def settle(
    block: Problem, state: SolverState, index: Array, there: Array, target: Array, config: SolverConfig
) -> SolverState:
    """Solve for chosen samples.

    Args:
        block: their rows, in the precision to sweep in.
        state: where the solve stands.
        index: [size] their places among all.
        there: [size] bool, which of them count.
        target: scalar, the relative gap that the solve is after.
        config: static options.
    """
    n = state.norms.shape[0]
    mine = state.simplex[:, index]
    enough = ENOUGH * target * state.primal
    single = jnp.sum(mine > 0.0, axis=0, dtype=jnp.int32) == 1
    leaving = jnp.sum(there & single & (state.lead[index] < 0.0), dtype=jnp.int32)
    calm = leaving.astype(jnp.float32) <= CALM * state.undecided.astype(jnp.float32)
    left_over = jnp.where(calm, CALM_REDUCTION, REDUCTION) * state.slack
    goal = jnp.where(left_over <= ALMOST * enough, enough, left_over)
    left = jnp.maximum(config.max_epochs * float(n) - state.visits, 1.0).astype(jnp.float32)
    solved = solve(block, state.weights, mine, goal, left)
    # W(α) follows in the precision of the state, so that what sweeps lose to rounding does not add up.
    exact = dataclasses.replace(block, cost=block.cost.astype(state.weights.dtype), offset=state.weights)
    found = solved.simplex
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
