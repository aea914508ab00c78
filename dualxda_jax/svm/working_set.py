"""Working sets: solve for the samples that are least decided, the others held where they are.

A sample whose q_i is a vertex of the simplex stays there unless W moves its scores by more than the lead of that class
in z_i; a move of W by Δ changes scores by at most ‖Δ‖‖φ_i‖ each. So the samples with the smallest lead / ‖φ_i‖ are the
ones to solve for next: near the optimum a few hundred of 60,000 are free. Held fixed, the others add a constant to
W(α), and what is left is the same problem over few rows: block coordinate ascent on the dual, which cannot lose ground.
A survey of all samples afterwards finds those that changed their mind, and the gap.

Newton's method has its first W from a sample of the rows, at a cost scaled up to weigh as much as all of them.

What lost is in benchmarks/README.md. Surveying at W(α) in place of W left the gap between 8e-3 and 1e-1, since slack
grows with the distance of the two, times the cost.

Source: the idea is LIBLINEAR's shrinking (Keerthi et al., KDD 2008) with another method inside; the bound on scores is
that of gap-safe screening (Ndiaye et al., JMLR 2017).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualxda_jax.svm import newton, surveys
from dualxda_jax.svm.config import SolverConfig
from dualxda_jax.svm.problem import (
    Array,
    Axis,
    Problem,
    alpha_of,
    contract,
    largest_curvature,
    one_hot_of,
    place_of,
    relative,
    summed,
    taken,
    with_constant,
)

# A block leaves this part of the gap that it finds; where that is almost enough, it goes all the way.
REDUCTION, ALMOST = 0.1, 4.0
# How far the first sample is solved; its W is far from that of all rows in any case.
SAMPLE_GAP = 0.3
# Penalties that a round starts from, by the relative gap: what the round before ended with is too stiff for new rows.
MAX_START, START_BY_GAP = 1e3, 0.5
# Costs times squared norms above this start from a softer penalty.
STIFF = 1e3
# Part of the gap that ½‖W − W(α)‖² may be after a block.
CLOSENESS = 0.05
# Norms below this count as this where leads are divided by them.
SHORTEST = 1e-20
GOLDEN = 0.5 * (math.sqrt(5.0) - 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolverState:
    """Where a solve stands.

    Attributes:
        weights: [k, D] the primal point W, with the constant feature's column last where there is one.
        simplex: [k, n] q, the dual variables as points of the simplex: α_i = C_i (e_{y_i} − q_i).
        made: [k, D] W(α).
        penalty: scalar, of the augmented Lagrangian.
        first_penalty: scalar, the one that the solve began with.
        primal: scalar, primal objective at W.
        slack: scalar, the duality gap of (W, α) less ½‖W − W(α)‖².
        lead: [n] by how much the only class of q_i leads all others in z_i, or a lower bound of that where nobody has
            looked since W moved; where q_i has several, minus what the last of them is behind the first, and always
            below 0.
        norms: [n] ‖(φ_i, b)‖.
        visits: scalar, samples looked at so far.
        samples: scalar, how many there are.
        method: static, that of the config that it began with, "auto" resolved.
    """

    weights: Array
    simplex: Array
    made: Array
    penalty: Array
    first_penalty: Array
    primal: Array
    slack: Array
    lead: Array
    norms: Array
    visits: Array
    samples: Array
    method: str = dataclasses.field(default="newton", metadata={"static": True})

    @property
    def distance(self) -> Array:
        """½‖W − W(α)‖²."""
        return 0.5 * jnp.sum((self.weights - self.made) ** 2)

    @property
    def gap(self) -> Array:
        """The absolute duality gap of (W, α)."""
        return self.slack + self.distance

    @property
    def dual(self) -> Array:
        """The dual objective at α."""
        return self.primal - self.gap

    @property
    def undecided(self) -> Array:
        """How many samples are on several classes, or on one that does not lead."""
        return jnp.sum(self.lead < 0.0, dtype=jnp.int32)

    @property
    def epochs(self) -> Array:
        """Samples looked at, in passes over all of them."""
        return jnp.ceil(self.visits / self.samples).astype(jnp.int32)


def gather(problem: Problem, index: Array, valid: Array, offset: Array) -> newton.Rows:
    """Rows [b] of a problem as a dense block; those that are not valid [b] get no cost."""
    dtype = problem.offset.dtype
    features = with_constant(taken(problem.features, index, problem.axis).astype(dtype), problem.intercept_scaling)
    one_hot = one_hot_of(taken(problem.labels, index, problem.axis), problem.offset.shape[0], dtype)
    cost = jnp.where(valid, taken(problem.cost, index, problem.axis).astype(dtype), 0.0)
    # float64 features come with problems that need it: tight tolerances, large costs.
    low = features if problem.features.dtype == jnp.float64 else features.astype(jnp.float32)
    norms = jnp.sqrt(jnp.sum(features * features, axis=1))
    return newton.Rows(features, one_hot, cost, offset, problem.margin, low, norms)


def sample_places(n: int, size: int) -> np.ndarray:
    """[<= size] ascending places, spread over 0..n-1 as multiples of the golden ratio are: no period deceives them."""
    return np.unique((np.arange(size) * GOLDEN % 1.0 * n).astype(np.int32))


def first_penalty(problem: Problem, config: SolverConfig) -> Array:
    """At a large cost the first inner problem would be as hard as the last: begin with a softer one."""
    return softest(largest_curvature(problem).astype(problem.offset.dtype), config)


def softest(curvature: Array, config: SolverConfig) -> Array:
    """The first penalty for the largest cost times squared norm."""
    return config.penalty * jnp.minimum(1.0, STIFF / jnp.maximum(curvature, 1e-30))


def weights_from_sample(problem: Problem, size: int, config: SolverConfig) -> tuple[Array, Array, Array]:
    """W, penalty and visits from solving for some rows only, whose costs are scaled to weigh as much as all."""
    n = problem.features.shape[0]
    places = jnp.asarray(sample_places(n, -(-size * n // problem.count)))
    if problem.axis is not None:
        mine = places + lax.axis_index(problem.axis).astype(places.dtype) * n
        places = lax.all_gather(mine, problem.axis, tiled=True)
    rows = gather(problem, places, places >= 0, problem.offset)
    total = summed(jnp.sum(problem.cost, dtype=problem.cost.dtype), problem.axis).astype(rows.cost.dtype)
    rows = rows._replace(cost=rows.cost * (total / jnp.maximum(jnp.sum(rows.cost), 1e-30)))
    zero = jnp.zeros((), rows.cost.dtype)
    goal = newton.Goal(zero, zero + SAMPLE_GAP, zero + 1.0, zero > 0.0, jnp.asarray(config.max_newton, jnp.int32))
    penalty = first_penalty(problem, config)
    inner = newton.solve_rows(rows, jnp.zeros_like(problem.offset), rows.one_hot, penalty, goal, config)
    # A sample that made nothing of itself (no cost in it, NaN) leaves the start at zero.
    good = jnp.isfinite(inner.primal)
    weights = jnp.where(good, inner.weights, 0.0)
    return weights, jnp.where(good, inner.penalty, penalty), inner.steps.astype(inner.primal.dtype) * float(len(places))


def begin(
    problem: Problem,
    q: Array,
    weights: Array,
    penalty: Array,
    visits: Array,
    config: SolverConfig,
    *,
    assign: bool,
    exact: bool = False,
) -> SolverState:
    """The state after a first survey."""
    seen = surveys.survey(problem, weights, q, assign=assign, exact=exact)
    n = float(problem.count)
    softest = penalty if config.method == "coordinate" else first_penalty(problem, config)
    return SolverState(
        weights=weights,
        penalty=penalty,
        first_penalty=softest,
        norms=surveys.norms_of(problem),
        visits=visits + n,
        samples=jnp.full_like(visits, n),
        method=config.method,
        **seen,
    )


def least_decided(
    costs: Array, state: SolverState, size: int, axis: Axis = None, *, ranked: bool = False
) -> tuple[Array, Array]:
    """[size] places of the samples with the smallest lead for their norm, and which of them can move.

    They are in that order where they are a part of all samples of one device, or `ranked`.
    """
    n = state.norms.shape[0]
    # What has no cost has no say, what has no features needs to find its class once, and NaN must not hide the others.
    settled = (state.norms == 0.0) & (state.lead >= -2.0 * surveys.BARELY)
    fixed = settled | (costs == 0.0) | jnp.isnan(state.lead)
    order = jnp.where(fixed, jnp.inf, state.lead / jnp.maximum(state.norms, SHORTEST))
    if axis is not None:
        return _least_of_all(order, size, axis)
    some = ranked or size < n
    index = lax.top_k(-order, size)[1].astype(jnp.int32) if some else jnp.arange(n, dtype=jnp.int32)
    return index, jnp.isfinite(order[index])


def _least_of_all(order: Array, size: int, axis: Axis) -> tuple[Array, Array]:
    """[size] places of the least entries of all devices, in no order, and which are finite; only counts travel."""
    n = order.shape[0]
    bits = lax.bitcast_convert_type(order, jnp.int32)
    key = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits).astype(
        jnp.int64
    )  # as whole numbers, in the same order

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) // 2
        enough = summed(jnp.sum(key <= middle, dtype=jnp.int32), axis) >= size
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    ends = jnp.asarray(-(2**31), jnp.int64), jnp.asarray(2**31 - 1, jnp.int64)
    border, _ = lax.fori_loop(jnp.asarray(0, jnp.int32), jnp.asarray(32, jnp.int32), halve, ends)
    below, at = key < border, key == border
    counts = jnp.stack([jnp.sum(below, dtype=jnp.int32), jnp.sum(at, dtype=jnp.int32)])
    every, me = lax.all_gather(counts, axis), lax.axis_index(axis)
    before = jnp.sum(
        jnp.where(jnp.arange(every.shape[0], dtype=jnp.int32)[:, None] < me.astype(jnp.int32), every, 0),
        axis=0,
        dtype=jnp.int32,
    )
    before = before.at[1].add(jnp.sum(every[:, 0], dtype=jnp.int32))
    slots = [first + jnp.cumsum(which, dtype=jnp.int32) - 1 for first, which in zip(before, (below, at), strict=True)]
    slot = jnp.where(below, slots[0], jnp.where(at, slots[1], size))
    mine = jnp.stack([jnp.arange(n, dtype=jnp.int32) + me.astype(jnp.int32) * n, jnp.isfinite(order).astype(jnp.int32)])
    index, finite = summed(jnp.zeros((2, size), jnp.int32).at[:, slot].set(mine, mode="drop"), axis)
    return index, finite > 0


def solve_block(problem: Problem, state: SolverState, target: Array, size: int, config: SolverConfig) -> SolverState:
    """Solve for the `size` samples that are least decided.

    Args:
        problem: all samples.
        state: where the solve stands.
        target: scalar, the relative gap that the solve is after.
        size: static, rows to solve for.
        config: static options.

    Returns:
        The state with new weights, q and penalty; what a survey tells is still that of before.
    """
    index, valid = least_decided(problem.cost, state, size, problem.axis)
    return settle(problem, gather(problem, index, valid, state.made), state, index, target, config)


def settle(
    problem: Problem, rows: newton.Rows, state: SolverState, index: Array, target: Array, config: SolverConfig
) -> SolverState:
    """Solve for chosen samples, whose rows these are and whose places among all are `index` [size]."""
    n, size = state.norms.shape[0], index.shape[0]
    mine = taken(state.simplex, index, problem.axis, 1)
    held = state.made - contract(alpha_of(mine, rows.one_hot, rows.cost), rows.features, 1, 0)
    rows = rows._replace(offset=held)
    enough = 0.4 * target * state.primal
    last = REDUCTION * state.gap <= ALMOST * enough
    gap = jnp.where(last, enough, REDUCTION * state.gap)
    zero = jnp.zeros_like(gap)
    left = jnp.maximum(config.max_epochs * state.samples - state.visits, float(size)) / float(size)
    steps = jnp.minimum(left, float(config.max_newton)).astype(jnp.int32)
    goal = newton.Goal(gap, zero, zero + CLOSENESS, last, steps)
    start = jnp.minimum(MAX_START, START_BY_GAP / relative(state.gap, state.primal))
    penalty = jnp.minimum(state.penalty, jnp.maximum(start, state.first_penalty))
    inner = newton.solve_rows(rows, state.weights, mine, penalty, goal, config)
    place, here = place_of(index, n, problem.axis)
    return dataclasses.replace(
        state,
        weights=inner.weights,
        simplex=state.simplex.at[:, jnp.where(here, place, n)].set(inner.q, mode="drop"),
        penalty=inner.penalty,
        visits=state.visits + inner.steps.astype(state.visits.dtype) * float(size),
    )
