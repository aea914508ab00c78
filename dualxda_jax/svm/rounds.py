"""A round: a block of the least decided samples is solved for, then all samples are surveyed. And what precedes them.

Blocks by coordinates start from sweeps over all samples, as long as many of them move; blocks by Newton's method from
a sample of the rows (`working_set.weights_from_sample`).
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from dualxda_jax.svm import block, coordinate, screening, surveys, working_set
from dualxda_jax.svm.config import SolverConfig
from dualxda_jax.svm.problem import Array, Problem, normalised, one_hot_of, places, weights_of
from dualxda_jax.svm.working_set import GOLDEN, SolverState

# A round by coordinates is poor where the dual rises by less than this part of itself and of the gap, and more than
# another part of the gap is left; after some, Newton's method is the better one: the problem is so stiff that hardly a
# sample can move by itself. So it is after so many passes that have not brought the relative gap below this.
POOR_RISE, SETTLING, POOR_ROUNDS = 0.02, 0.5, 4
LONG, FAR = 300, 1e-2
# Newton's method hands back to coordinates once so many rounds have not brought its gap below this part of the least:
# its W is better than its W(α), and the latter is what is certified. So many turns get nowhere at most; and where both
# methods' last ones did, and the dual has risen by less than this part of the gap, the precision is exhausted.
STALLED_ROUNDS, STALLED_FALL, TURNS, TURN_RISE = 6, 0.5, 100, 1e-2
# A round in float32 has reached what float32 can tell where the dual rose by less than this part of the gap, or where,
# below the second, more than half of the gap is left; a block aims at 0.3 of it.
FLOAT32_RISE, FLOAT32_GAP, FLOAT32_FALL = 1e-3, 1e-3, 0.5
# Samples that lead by less, where the margin is 1, have a say in how the others are rounded.
HARDLY = 0.1
# Sweeps over all samples end once fewer than this part of them moves.
FEW, LEAST_SWEEPS, MOST_SWEEPS = 0.17, 2, 8
# They leave alone what violates its margin by less.
SKIP = 1e-3


def step(
    problem: Problem, state: SolverState, target: Array, size: int, config: SolverConfig, low: Any = None,
    *, screened: bool = False,
) -> SolverState:  # fmt: skip
    """A round.

    Args:
        problem: all samples.
        state: where the solve stands.
        target: scalar, the relative gap that the solve is after.
        size: static, rows of a block.
        config: static options; `method` is not "auto".
        low: the precision of the survey and, by coordinates, of the block; that of the problem's costs if None.
        screened: survey only what may have changed its mind; by coordinates only, and not under `vmap`, where both ways
            would be gone.
    """
    data = lowered(problem, low)
    if config.method == "coordinate":
        dtype = block.sweep_dtype(problem, data.cost.dtype)
        moved = block.solve_block(problem, state, target, size, config, dtype)
    else:
        moved = working_set.solve_block(problem, state, target, size, config)
    exact = config.method == "coordinate"
    if exact and screened:
        return screening.survey(data, state, moved)
    seen = surveys.survey(data, moved.weights, moved.simplex, assign=False, exact=exact)
    return looked_at(moved, seen)


def lowered(problem: Problem, low: Any) -> Problem:
    """The problem in another working precision, if one is given."""
    return problem if low is None else dataclasses.replace(problem, cost=problem.cost.astype(low))


def looked_at(state: SolverState, seen: dict[str, Any]) -> SolverState:
    """The state after a survey."""
    return dataclasses.replace(state, visits=state.visits + state.samples, **seen)


def sweep_all(problem: Problem, weights: Array, simplex: Array) -> coordinate.Swept:
    """One sweep over all samples with a cost, in the precision of the weights, each chunk from all over the data."""
    n = simplex.shape[1]
    spread = max(round(n * GOLDEN), 1)
    while math.gcd(spread, n) != 1:
        spread += 1
    order = (jnp.arange(n, dtype=jnp.int64) * spread % n).astype(jnp.int32)
    some, rows = _those(problem.cost[order] != 0.0)
    low = dataclasses.replace(problem, cost=problem.cost.astype(weights.dtype), rows=rows)
    return coordinate.sweep(low, weights, simplex, jnp.asarray(SKIP, weights.dtype), order=order[some])


def _those(chosen: Array) -> tuple[Array, Array]:
    """[n] places of those that are chosen [n] and then anything, and how many they are."""
    return places(chosen, chosen.shape[0], 0), jnp.sum(chosen, dtype=jnp.int32)


def on_grid(problem: Problem, state: SolverState, grid: Any, part: Array | None = None) -> SolverState:
    """The state with dual variables that `grid`, a narrower dtype, holds exactly; of the samples at `part` if given.

    Rounding each by itself moves the scores of all free samples, and where costs are large every little counts. A sweep
    that rounds as it goes lets every sample make up for what the ones before it lost.
    """
    none = jnp.zeros((), state.weights.dtype)
    if part is None:
        # Where a sample is on one class, its dual variables are zero or its cost, and there is nothing to round; but
        # those that hardly lead may have to make up for the others.
        order, rows = _those(state.lead < HARDLY)
        few = dataclasses.replace(problem, rows=rows)
        swept = coordinate.sweep(few, state.weights, state.simplex, none, order=order, grid=grid)
        simplex, visits = swept.simplex, state.visits + rows.astype(state.visits.dtype)
    else:
        q = state.simplex[:, jnp.minimum(part, state.norms.shape[0] - 1)]
        swept = coordinate.sweep(problem, state.weights, q, none, grid=grid)
        simplex, visits = state.simplex.at[:, part].set(swept.simplex, mode="drop"), state.visits + q.shape[1]
    moved = dataclasses.replace(state, weights=swept.weights, made=swept.weights, simplex=simplex, visits=visits)
    if part is not None:  # whoever puts the parts together surveys them anew
        return moved
    lead = screening.aged(state, swept.weights).astype(state.lead.dtype)
    return dataclasses.replace(moved, lead=jnp.where(jnp.any(simplex != state.simplex, axis=0), -jnp.inf, lead))


def refined(problem: Problem, state: SolverState, allowance: float) -> SolverState:
    """A state that rounds in a lower precision left, or Newton's method, in that of the problem, with W(α) made anew.

    Its leads may be those of a margin that was less by no more than the allowance.
    """
    return screening.survey(problem, state, anew(problem, state), allowance)


def anew(problem: Problem, state: SolverState) -> SolverState:
    """The state with W(α) made anew in the precision of the problem; what a survey tells is still that of before."""
    weights = screening.weights_of(problem, state.simplex)
    return dataclasses.replace(state, weights=weights, made=weights, visits=state.visits + state.samples)


def exhausted(dual_before: Any, ratio_before: Any, dual: Any, gap: Any, ratio: Any) -> Any:
    """Whether a round in float32 reached what float32 can tell, by dual, absolute and relative gap."""
    stuck = dual - dual_before < FLOAT32_RISE * gap
    return stuck | ((ratio < FLOAT32_GAP) & (ratio > FLOAT32_FALL * ratio_before))


def poor(dual_before: Any, gap_before: Any, dual: Any, gap: Any) -> Any:
    """Whether a round by coordinates was a poor one, by the dual objective and the absolute gap before and after it.

    At a large cost the gap is no measure of what the dual has left to gain: far from the solution the primal objective
    at W(α) is out of all proportion, and near it W(α) goes on settling when the dual has next to nothing to gain.
    """
    rise = dual - dual_before
    return (rise < POOR_RISE * gap) & (rise < POOR_RISE * abs(dual)) & (gap > SETTLING * gap_before)


def lengthy(epochs: Any, ratio: Any) -> Any:
    """Whether coordinates take too long, by the passes that they took and the relative gap that is left."""
    return (epochs >= LONG) & (ratio > FAR)


def sweeps_from(state: SolverState, labels: Array) -> tuple[Array, Array]:
    """W and q for sweeps over all samples to go on from: those of a state, unless zero is the better start."""
    useful = state.dual > 0.0
    zero = one_hot_of(labels, state.simplex.shape[0], state.simplex.dtype)
    return jnp.where(useful, state.weights, 0.0), jnp.where(useful, state.simplex, zero)


def few(moved: Any, n: int) -> Any:
    """Whether so few samples moved in a sweep over all that blocks are the better way."""
    return moved <= round(FEW * n)


def state_at(
    problem: Problem, simplex: Array, visits: Array, config: SolverConfig, low: Any = None, *, screened: bool = False
) -> SolverState:
    """The state at q, with W(α) made anew; where `screened`, from the samples alone whose α is not zero."""
    data = lowered(problem, low)
    simplex = normalised(simplex, problem.offset.dtype)
    none = jnp.zeros((), problem.offset.dtype)
    weights = (screening.weights_of if screened else weights_of)(data, simplex)
    return working_set.begin(data, simplex, weights, none, visits, config, assign=False, exact=True)
