"""Look again only at the samples that a move of W can have made to change their mind.

A sample on one class alone stays there as long as that class leads: it has no slack, and what it adds to the objectives
is known without its scores, as primal(W(α)) = dual(α) + slack. A move of W by Δ shifts two scores of a sample against
each other by at most ‖Δ_c − Δ_j‖‖φ‖; where the lead was larger, nobody needs to look. Near the solution that leaves a
few samples in a hundred.

Source: the bound is that of gap-safe screening (Ndiaye et al., JMLR 2017); here nothing is left out for good.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm import problem as problems
from dualxda_jax.svm import surveys
from dualxda_jax.svm.problem import Array, Chunk, Problem, alpha_of, one_hot_of, outer, places
from dualxda_jax.svm.working_set import SolverState

# Above this part of all samples, one pass over all of them in their order is the cheaper one.
MOST = 0.5
# Rounding: of norms and leads that are kept in float32, and of scores as so many units in the last place of ‖W‖‖φ‖, in
# addition to one for every so many features.
KEPT, UNITS, FEATURES = 1e-5, 16.0, 8.0


def aged(state: SolverState, weights: Array, allowance: Array | float = 0.0) -> Array:
    """[n] what is left of the leads of a state for certain when W has moved to `weights` [k, D].

    Args:
        state: with leads as its own weights made them.
        weights: the new W.
        allowance: scalar, what else scores may have moved against each other, such as by another margin.
    """
    # A sample is on one class and compared to another: the two rows that moved most.
    reach = jnp.sum(lax.top_k(_row_norms(weights - state.weights), 2)[0])
    size = jnp.sum(lax.top_k(_row_norms(weights), 2)[0])
    unit = float(jnp.finfo(jnp.float32).eps) * (UNITS + weights.shape[1] / FEATURES)
    taken = ((1.0 + KEPT) * reach + unit * size) * state.norms.astype(weights.dtype) + allowance
    lead = state.lead.astype(weights.dtype)
    return lead - KEPT * jnp.abs(lead) - taken


def _row_norms(weights: Array) -> Array:
    return jnp.sqrt(jnp.sum(weights * weights, axis=1))


def survey(problem: Problem, before: SolverState, moved: SolverState, allowance: Array | float = 0.0) -> SolverState:
    """The state after a survey of those that W's move, or a new q of their own, puts in doubt.

    Args:
        problem: the data; its `cost` has the precision that scores are taken in.
        before: the state with the leads that the last survey found.
        moved: the state with new weights W(α) and q, and a lead of -inf where q is new.
        allowance: scalar, as in `aged`.
    """
    kept = aged(dataclasses.replace(before, lead=moved.lead), moved.weights, allowance)
    doubtful = ~(kept > 0.0)
    count, n = jnp.sum(doubtful, dtype=jnp.int32), doubtful.shape[0]

    def everyone() -> tuple[Array, Array, Array]:
        seen = surveys.survey(problem, moved.weights, moved.simplex, assign=False, exact=True)
        return seen["lead"], seen["primal"], seen["slack"]

    def some() -> tuple[Array, Array, Array]:
        lead, slack = _visit(problem, moved.weights, moved.simplex, kept.astype(jnp.float32), doubtful)
        return lead, dual_of(problem, moved.weights, moved.simplex) + slack, slack

    many = count > round(MOST * n)
    lead, primal, slack = lax.cond(many, everyone, some)
    visits = moved.visits + jnp.where(many, moved.samples, count.astype(moved.visits.dtype))
    return dataclasses.replace(moved, lead=lead, primal=primal, slack=slack, visits=visits)


def dual_of(problem: Problem, weights: Array, simplex: Array) -> Array:
    """The dual objective at α, whose W(α) the weights are; without a look at the features."""
    cost = problem.cost.astype(weights.dtype)
    mine = jnp.take_along_axis(simplex, problem.labels[None, :], axis=0)[0]
    linear = problem.margin.astype(weights.dtype) * jnp.sum(cost * (1.0 - mine))
    return linear - 0.5 * jnp.sum(weights * weights)


def slack_of(problem: Problem, weights: Array, simplex: Array, lead: Array) -> Array:
    """The slack at W of all samples, of which those with a lead above 0 have none."""
    doubtful = ~(lead > 0.0)
    return _visit(problem, weights, simplex, lead.astype(jnp.float32), doubtful)[1]


def _visit(problem: Problem, weights: Array, simplex: Array, lead: Array, chosen: Array) -> tuple[Array, Array]:
    """Leads and slack of the samples that are chosen [n]; the other leads stay."""
    low = problem.cost.dtype
    weights_low, n = weights.astype(low), lead.shape[0]

    def add(chunk: Chunk, index: Array, there: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        lead, slack = carry
        mine = simplex[:, index].astype(low)
        at = surveys.standing(chunk, mine, weights_low, problem.margin, problem.intercept_scaling)
        lead = lead.at[jnp.where(there, index, n)].set(at.lead.astype(lead.dtype), mode="drop")
        return lead, slack + jnp.sum(chunk.cost * at.slack).astype(slack.dtype)

    lead, slack = _over_some(problem, simplex.shape[0], chosen, add, (lead, jnp.zeros((), weights.dtype)))
    return surveys.without_cost(problem, lead), slack


def weights_of(problem: Problem, simplex: Array) -> Array:
    """[k, D] = W(α), of the samples alone whose α is not zero where that is worth it."""
    mine = jnp.take_along_axis(simplex, problem.labels[None, :], axis=0)[0]
    chosen = (mine != 1.0) & (problem.cost != 0.0)

    def add(chunk: Chunk, index: Array, there: Array, total: Array) -> Array:
        alpha = alpha_of(simplex[:, index].astype(chunk.cost.dtype), chunk.one_hot, chunk.cost)
        return total + outer(alpha, chunk, problem.intercept_scaling).astype(total.dtype)

    def everyone() -> Array:
        return problems.weights_of(problem, simplex)

    def some() -> Array:
        return problem.offset + _over_some(problem, simplex.shape[0], chosen, add, jnp.zeros_like(problem.offset))

    many = jnp.sum(chosen, dtype=jnp.int32) > round(MOST * chosen.shape[0])
    return lax.cond(many, everyone, some)


def _over_some(problem: Problem, k: int, chosen: Array, body: Any, carry: Any) -> Any:
    """Fold `body(chunk, index, there, carry)` over the samples that are chosen [n], side by side in chunks."""
    n, dtype = chosen.shape[0], problem.cost.dtype
    size = min(problem.chunk, n)
    order, count = places(chosen, -(-n // size) * size, 0), jnp.sum(chosen, dtype=jnp.int32)

    def one(i: Array, carry: Any) -> Any:
        index = lax.dynamic_slice_in_dim(order, i * size, size)
        there = i * size + jnp.arange(size, dtype=jnp.int32) < count
        cost = jnp.where(there, problem.cost[index], 0.0)
        chunk = Chunk(problem.features[index].astype(dtype), cost, one_hot_of(problem.labels[index], k, dtype))
        return body(chunk, index, there, carry)

    return lax.fori_loop(jnp.asarray(0, jnp.int32), (count + size - 1) // size, one, carry)
