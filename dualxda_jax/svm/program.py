"""The whole solve by block coordinate ascent as one program: numbers are traced, so that one serves all of a shape.

A round chooses a working set (the samples whose KKT slack is below a level, in golden-ratio order, as many as there is
room for), solves it (`ascent`, `free_set`), updates W in float64, and recomputes the margins of those samples whose
slack the move of W may have used up. At first every slack is unknown (−∞), so that the first rounds sweep over all
samples. The last round rounds the dual variables to the dtype of the result, one after another, so that each makes up
for what the ones before it lost, and what it recomputes is the certificate.

Source: Crammer & Singer, JMLR 2001; block coordinate ascent with shrinking: Keerthi et al., KDD 2008.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm import ascent, free_set
from dualxda_jax.svm.ascent import INT, columns, count_true, over, put_columns, put_rows, rows, true_indices
from dualxda_jax.svm.config import Heuristics
from dualxda_jax.svm.margins import WIDE, Problem, State, Static, one_hot, recompute, scores_of, take_rows
from dualxda_jax.svm.problem import Array, contract
from dualxda_jax.svm.rounding import coefficients_of, on_grid

RUNNING, ENDING, DONE = 0, 1, 2


def layout(n: int, k: int, block: int, chunk: int, heuristics: Heuristics) -> Static:
    """The sizes for n samples."""
    group = min(heuristics.group, n)
    room = min(max(math.ceil(heuristics.room * n), block), n)
    return Static(k, -(-room // group) * group, min(chunk, n), heuristics)


def bucket(n: int, heuristics: Heuristics) -> int:
    """N filled up to the next of a few sizes, so that another n is seldom another program."""
    step = max(1 << max(n.bit_length() - 1, 0), 2 * heuristics.buckets) // heuristics.buckets
    return -(-n // step) * step


@functools.partial(jax.jit, static_argnames=("static",))
def begin(problem: Problem, coefficients: Array | None, *, static: Static) -> State:
    """The state at dual variables [n, k], brought into the box, or at zero."""
    n, k, heuristics = problem.labels.shape[0], static.num_classes, static.heuristics
    at_label, size = one_hot(problem.labels, k), static.chunk
    simplex = at_label.astype(WIDE)
    if coefficients is not None:
        safe = jnp.where(problem.cost > 0.0, problem.cost, 1.0)
        others = jnp.where(at_label, 0.0, jnp.maximum(-coefficients.T.astype(WIDE), 0.0) / safe[None, :])
        total = jnp.sum(others, axis=0)
        others = others / jnp.maximum(total, 1.0)[None, :]
        warm = jnp.where(at_label, 1.0 - jnp.minimum(total, 1.0)[None, :], others)
        simplex = jnp.where((problem.cost > 0.0)[None, :], warm, simplex)

    def look(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        norms, weights = carry
        start = jnp.minimum(j * size, n - size)
        x = take_rows(problem.features, start + jnp.arange(size, dtype=INT))
        norms = lax.dynamic_update_slice_in_dim(norms, jnp.sqrt(jnp.sum(x * x, axis=1)).astype(jnp.float32), start, 0)
        if coefficients is not None:
            part = lambda a: lax.dynamic_slice_in_dim(a, start, size, a.ndim - 1)  # noqa: E731
            new = start + jnp.arange(size, dtype=INT) >= j * size
            alpha = jnp.where(new, part(problem.cost), 0.0)[None, :] * (part(at_label).astype(WIDE) - part(simplex))
            weights = weights + contract(alpha, x.astype(WIDE), 1, 0)
        return norms, weights

    blank = jnp.zeros(n, jnp.float32), jnp.zeros((k, problem.features.shape[1]), WIDE)
    norms, weights = over(-(-n // size), look, blank)
    number, infinite = jnp.ones((), WIDE), jnp.asarray(jnp.inf, WIDE)
    zero = jnp.asarray(0, INT)
    passes = zero + (heuristics.passes * -(-n // static.room) if coefficients is None else 0)
    return State(
        weights, simplex, jnp.full(n, -jnp.inf, jnp.float32), norms, infinite, number,
        heuristics.first_target * problem.tolerance, zero, passes, zero, zero, zero, zero, 0.0 * number,
        zero + RUNNING,
    )  # fmt: skip


def working_level(slack: Array, heuristics: Heuristics) -> Array:
    """The level of slack below which there are as many samples as the working set is to hold, by bisection."""
    violators = count_true(slack < 0.0, jnp.float32)
    wanted = heuristics.violators_times * violators + heuristics.least_rows

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        many = count_true(slack < jnp.exp2(middle), jnp.float32) > wanted
        return jnp.where(many, low, middle), jnp.where(many, middle, high)

    low, high = (jnp.asarray(float(x), jnp.float32) for x in heuristics.levels)
    return jnp.exp2(over(heuristics.level_steps, halve, (low, high))[0])


def choose(problem: Problem, state: State, rounding: Array, static: Static) -> tuple[Array, Array, Array, Array]:
    """[room] int32 indices of the working set, how many count, where the next begins, and how many qualify."""
    n, heuristics = problem.labels.shape[0], static.heuristics
    # Where rounding the free samples alone fell short, those that are nearly free absorb its error.
    join = jnp.where(state.roundings > 0, heuristics.join_rounding, 0.0)
    level = jnp.where(rounding, join, working_level(state.slack, heuristics))
    # A warm start begins with margins alone.
    known = (state.rounds > 0) | (state.passes > 0)
    chosen = ((state.passes > 0) | (state.slack < level)) & (problem.cost > 0.0) & known
    spread = max(int(n * 0.6180339), 1)
    stride = next(s for s in range(spread, n + 1) if math.gcd(s, n) == 1)
    return *true_indices(chosen, static.room, state.cursor, stride % n), jnp.sum(chosen, dtype=INT)


def gather(problem: Problem, state: State, index: Array, count: Array, precise: Array, group: int) -> ascent.Block:
    """The working set as a dense block, in groups."""
    k, room, width = state.simplex.shape[0], index.shape[0], problem.features.shape[1]
    dtype = WIDE if problem.features.dtype == WIDE else jnp.float32

    def lay(j: Array, carry: ascent.Block) -> ascent.Block:
        i = columns(index, j, group)
        there = j * group + jnp.arange(group, dtype=INT) < count
        x, at_label = take_rows(problem.features, i), one_hot(jnp.take(problem.labels, i, mode="clip"), k)
        old = jnp.take(state.simplex, i, axis=1, mode="clip")
        g = scores_of(problem, state.weights, x, at_label, precise) - problem.smoothing * old
        cost = jnp.where(there, jnp.take(problem.cost, i, mode="clip"), 0.0).astype(dtype)
        return carry._replace(
            features=put_rows(carry.features, x, j),
            cost=put_columns(carry.cost, cost, j),
            at_label=put_columns(carry.at_label, at_label, j),
            base=put_columns(carry.base, (g - jnp.max(g, axis=0)[None, :]).astype(dtype), j),
            start=put_columns(carry.start, old, j),
            gram=put_rows(carry.gram, contract(x, x, 1, 1), j),
        )

    groups, flat = (count + group - 1) // group, jnp.zeros((k, room), dtype)
    blank = ascent.Block(
        jnp.zeros((room, width), dtype), flat[0], flat > 0.0, flat, flat.astype(WIDE), jnp.zeros((room, group), dtype),
        groups, problem.smoothing,
    )  # fmt: skip
    return over(groups, lay, blank)


def settle(
    problem: Problem, state: State, block: ascent.Block, simplex: Array, index: Array, count: Array
) -> tuple[Array, Array, Array]:
    """W, q and slacks of all samples after q of the working set became `simplex`; W follows in float64."""
    n, group = state.slack.shape[0], block.gram.shape[1]

    def one(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        weights, q, slack = carry
        i, there = columns(index, j, group), j * group + jnp.arange(group, dtype=INT) < count
        cost = jnp.where(there, jnp.take(problem.cost, i, mode="clip"), 0.0)
        new = columns(simplex, j, group)
        x = rows(block.features, j, group).astype(WIDE)
        weights = weights + contract(cost[None, :] * (columns(block.start, j, group) - new), x, 1, 0)
        i = jnp.where(there, i, n)
        return weights, q.at[:, i].set(new, mode="drop"), slack.at[i].set(-jnp.inf, mode="drop")

    return over(block.groups, one, (state.weights, state.simplex, state.slack))


def one_round(problem: Problem, state: State, static: Static, dtype: Any) -> State:
    """One outer iteration: solve the working set of most violating samples, then recompute margins and gap."""
    heuristics, n = static.heuristics, problem.labels.shape[0]
    relative = state.gap / jnp.maximum(state.primal, float(jnp.finfo(WIDE).tiny))
    due = (state.left > 0) | (relative <= state.target) | (state.status == ENDING)
    rounding = (state.passes == 0) & due
    precise = (relative <= heuristics.precise_gap) | rounding
    index, count, cursor, wanted = choose(problem, state, rounding, static)
    # A rounding sweep visits all free samples, in as many rounds as that takes.
    whole = jnp.where(state.left > 0, state.left, jnp.maximum((wanted + static.room - 1) // static.room, 1))
    left = jnp.where(rounding, whole - 1, 0).astype(INT)
    block = gather(problem, state, index, count, precise, min(heuristics.group, n))
    goal = jnp.maximum(heuristics.aim * state.target * state.primal, heuristics.reduction * state.gap)
    affordable = (problem.max_epochs * problem.samples - state.visits) / jnp.maximum(count.astype(WIDE), 1.0)
    most = jnp.where(rounding, 1.0, jnp.clip(jnp.ceil(affordable), 1.0, heuristics.max_cycles)).astype(INT)
    to_grid = lambda q, cost, at: lax.cond(rounding, lambda: on_grid(q, cost, at, dtype), lambda: q)  # noqa: E731
    subspace = functools.partial(free_set.subspace_step, heuristics=heuristics)
    solved = ascent.solve_working_set(block, goal, most, to_grid, rounding, subspace, heuristics)
    weights, simplex, slack = settle(problem, state, block, solved.simplex, index, count)

    passes = jnp.maximum(state.passes - 1, 0)
    sweeping = passes > 0
    # While sweeps over all samples are left, no margins are recomputed.
    found = lax.cond(
        sweeping,
        lambda: (slack, jnp.asarray(jnp.inf, WIDE), jnp.asarray(0, INT)),
        lambda: recompute(problem, state, weights, simplex, slack, precise, static),
    )
    slack, gap, number = found
    mine = jnp.sum(jnp.where(one_hot(problem.labels, static.num_classes), simplex, 0.0), axis=0)
    square = problem.smoothing * 0.5 * (jnp.sum(simplex * simplex, axis=0) - 1.0)
    dual = jnp.sum(problem.cost * (1.0 - mine - square)) - 0.5 * jnp.sum(weights * weights)
    visits = (solved.cycles + solved.steps) * count + number
    moved = state._replace(
        weights=weights, simplex=simplex, slack=slack, gap=gap, primal=jnp.where(sweeping, 1.0, dual + gap),
        cursor=cursor, left=left, passes=passes, rounds=state.rounds + 1, visits=state.visits + visits.astype(WIDE),
    )  # fmt: skip
    return conclude(problem, state, moved, rounding, static)


def conclude(problem: Problem, before: State, state: State, rounding: Array, static: Static) -> State:
    """What comes next: another round, sweeps over all samples, or the end."""
    heuristics, n = static.heuristics, problem.labels.shape[0]
    violators = count_true(state.slack < 0.0, jnp.float32)
    # A warm start that leaves many violators is worse than none: it begins anew, by sweeps over all samples.
    warm = (before.rounds == 0) & (before.passes == 0)
    far = warm & (violators > heuristics.passes_from * problem.samples.astype(jnp.float32)) & (n > static.room)
    useless = warm & (state.dual <= 0.0)
    one = one_hot(problem.labels, static.num_classes).astype(WIDE)
    again = far | useless
    passes = jnp.where(again, heuristics.passes * -(-n // static.room), state.passes)
    met = state.gap <= problem.tolerance * state.primal
    rounded = rounding & (state.left == 0)
    roundings = state.roundings + rounded.astype(INT)
    rise = state.dual - before.dual
    poor = (before.passes == 0) & ~rounding & (before.rounds > 0) & (rise < heuristics.poor_rise * state.gap)
    poor &= (rise < heuristics.poor_rise * jnp.abs(state.dual)) & (state.gap > heuristics.poor_gap * before.gap)
    poor = before.poor + poor.astype(INT)
    epochs = state.visits / problem.samples
    stuck = (poor >= heuristics.poor_rounds) | (
        (epochs >= heuristics.long_epochs) & (state.gap > heuristics.far * state.primal)
    )
    # With smoothing no other method takes over, and what looks like stagnation passes.
    stuck &= problem.smoothing == 0.0
    stuck |= (roundings >= heuristics.max_roundings) | jnp.isnan(state.gap)
    ending = ~again & (stuck | (epochs >= problem.max_epochs))
    done = rounded & (met | ending | (before.status == ENDING)) | jnp.isnan(state.gap)
    status = jnp.where(done, DONE, jnp.where(ending, ENDING, RUNNING)).astype(INT)
    return state._replace(
        weights=jnp.where(again, 0.0, state.weights),
        simplex=jnp.where(again, one, state.simplex),
        gap=jnp.where(again, jnp.inf, state.gap),
        primal=jnp.where(again, 1.0, state.primal),
        passes=passes.astype(INT),
        target=jnp.where(rounded & ~met, 0.5 * before.target, before.target),
        roundings=roundings,
        poor=poor,
        status=status,
    )


@functools.partial(jax.jit, static_argnames=("static", "dtype"))
def advance(problem: Problem, state: State, rounds: Array, *, static: Static, dtype: Any) -> State:
    """Rounds until the solve has ended or this many are done."""
    going = lambda s: (s.status != DONE) & (s.rounds < rounds)  # noqa: E731
    return lax.while_loop(going, lambda s: one_round(problem, s, static, dtype), state)


@functools.partial(jax.jit, static_argnames=("dtype",))
def coefficients_at(problem: Problem, state: State, *, dtype: Any) -> Array:
    """[n, k] α of a state whose q is on the grid of `dtype`."""
    return coefficients_of(state.simplex, problem.cost, one_hot(problem.labels, state.simplex.shape[0]), dtype)
