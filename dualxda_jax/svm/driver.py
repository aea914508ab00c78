"""The loops around the rounds of `working_set`: one on the host, one inside a trace.

On the host a solve starts from a small sample and then, if there are many rows, from larger ones; surveys run in
float32 while the gap is wide; and working sets grow and shrink with the number of undecided samples. Inside a trace the
same rounds run with one size, in float64.

What is certified in the end is not what the rounds look at: they see (W, α) with W ≠ W(α), in float64. What is returned
is α rounded to its dtype, with W(α): certified anew, and solved further where that is not enough.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm import working_set
from dualxda_jax.svm.config import SolverConfig
from dualxda_jax.svm.inputs import Start, result_dtype
from dualxda_jax.svm.problem import (
    Array,
    Problem,
    from_coefficients,
    primal_and_gap,
    problem_of,
    relative,
    to_coefficients,
    weights_of,
)
from dualxda_jax.svm.working_set import SolverState
from dualxda_jax.types import Progress, SolveInfo

# Certificates of rounded coefficients that may fall short before a solve gives up.
MAX_ROUNDS = 5
# Samples of growing size: each has this many times the rows of the one before and is solved to this gap.
LEVEL_GROWTH, LEVEL_GAP = 4, 0.1
# Surveys in float32 until the gap is this small.
PRECISE_GAP = 1e-2
# Working sets hold this many times the samples that are undecided, and at most double from one round to the next.
ROOM = 1.5


class Data(NamedTuple):
    """What a solve is given: features [n, d], labels [n], costs [n] and the margin to ask for."""

    features: Array
    labels: Array
    costs: Array
    margin: Array


def _problem(data: Data, num_classes: int, config: SolverConfig) -> Problem:
    problem = problem_of(data.features, data.labels, data.costs, num_classes, config)
    return dataclasses.replace(problem, margin=data.margin.astype(jnp.float64))


def margin_for(rounds: Array | int, config: SolverConfig, dtype: Any) -> Array:
    """The margin to ask for in the rounds after a certificate that fell short.

    Coefficients rounded to float32 move the scores of the free samples a little, and where the cost is large each
    little bit costs: C times the part by which a margin is missed. A margin asked for a little above 1 leaves room for
    that, and itself widens the gap by no more than about twice its excess.
    """
    if dtype == jnp.float64:
        return jnp.ones((), jnp.float64)
    rounds = jnp.asarray(rounds, jnp.int32)
    excess = jnp.where(rounds < 1, 0.0, 0.1 * 2.0 ** (rounds.astype(jnp.float64) - 1.0))
    return 1.0 + config.tolerance * excess


def begin(data: Data, start: Start | None, num_classes: int, config: SolverConfig) -> SolverState:
    """The first state, in a trace: from a solution if there is one, from a sample of many rows, from zero else."""
    problem = _problem(data, num_classes, config)
    n, k = data.features.shape[0], num_classes
    none = jnp.zeros((), jnp.float64)
    if start is not None:
        return _warm(problem, start, config)
    if n <= config.block:
        q = from_coefficients(jnp.zeros((n, k), jnp.float64), problem.labels, problem.cost)
        penalty = working_set.first_penalty(problem, config)
        return working_set.begin(problem, q, jnp.zeros_like(problem.offset), penalty, none, config, assign=False)
    weights, penalty, visits = working_set.weights_from_sample(problem, config.block, config)
    return working_set.begin(problem, jnp.zeros((k, n), jnp.float64), weights, penalty, visits, config, assign=True)


def _warm(problem: Problem, start: Start, config: SolverConfig) -> SolverState:
    """From a solution: its dual variables or the classes that its weights put first, whichever have the smaller gap.

    At the cost that it was found at, the dual variables are better; at another, most of them are at the wrong bound.
    """
    q = from_coefficients(start.coefficients.astype(jnp.float64), problem.labels, problem.cost)
    penalty = working_set.first_penalty(problem, config)
    given, none = start.weights.astype(jnp.float64), jnp.zeros((), jnp.float64)
    kept = working_set.begin(problem, q, given, penalty, none, config, assign=False)
    led = working_set.begin(problem, q, given, penalty, kept.visits, config, assign=True)
    kept = dataclasses.replace(kept, visits=led.visits)
    better = led.gap < kept.gap
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), led, kept)


def info_of(primal: Array, gap: Array, epochs: Array, config: SolverConfig, dtype: Any) -> SolveInfo:
    """The public record of a primal objective and an absolute gap in float64."""
    ratio = relative(gap, primal)
    parts = [a.astype(dtype) for a in (primal, primal - gap, ratio)]
    return SolveInfo(parts[0], parts[1], parts[2], epochs.astype(jnp.int32), ratio <= config.tolerance)


def certificate(problem: Problem, q: Array, dtype: Any) -> tuple[Array, Array, Array]:
    """The coefficients as they are returned, rounded to their dtype, and primal and gap of exactly those."""
    plain = dataclasses.replace(problem, margin=jnp.ones_like(problem.margin))
    coefficients = to_coefficients(q, problem.labels, problem.cost, dtype)
    rounded = from_coefficients(coefficients.astype(problem.cost.dtype), problem.labels, problem.cost)
    primal, gap = primal_and_gap(plain, weights_of(plain, rounded), rounded)
    return coefficients, primal, gap


def next_target(target: Any, config: SolverConfig) -> Any:
    """The gap to solve to after a certificate that fell short."""
    return jnp.maximum(0.25 * target, 0.2 * config.tolerance)


@functools.partial(jax.jit, static_argnames=("num_classes", "config"))
def solve_traced(data: Data, start: Start | None, *, num_classes: int, config: SolverConfig) -> tuple[Array, SolveInfo]:
    """The whole solve as one program: (coefficients [n, k], info)."""
    problem = _problem(data, num_classes, config)
    n, dtype = data.features.shape[0], result_dtype(data.features)
    size = min(n, max(config.block, -(-n // 8)))
    state = begin(data, start, num_classes, config)

    def solve_to(state: SolverState, target: Array, margin: Array) -> SolverState:
        asked = dataclasses.replace(problem, margin=margin)

        def unfinished(state: SolverState) -> Array:
            return (
                (relative(state.gap, state.primal) > target)
                & ~jnp.isnan(state.gap)
                & (state.epochs < config.max_epochs)
            )

        return lax.while_loop(unfinished, lambda s: working_set.step(asked, s, target, size, config), state)

    def again(carry: Any) -> Array:
        state, _, (_, primal, gap), rounds = carry
        ratio = relative(gap, primal)
        unfinished = (ratio > config.tolerance) & jnp.isfinite(ratio) & (state.epochs < config.max_epochs)
        return (rounds == 0) | (unfinished & (rounds < MAX_ROUNDS))

    def refine(carry: Any) -> Any:
        state, target, _, rounds = carry
        # What a survey said holds for the margin that it was made with: another one asks for one more round.
        state = dataclasses.replace(state, slack=jnp.where(rounds < 1, state.slack, state.slack + 1e-3 * state.primal))
        state = solve_to(state, target, margin_for(rounds, config, dtype))
        found = certificate(problem, state.simplex, dtype)
        state = dataclasses.replace(state, visits=state.visits + 2.0 * n)
        return state, next_target(target, config), found, rounds + 1

    zero = jnp.zeros((), jnp.float64)
    nothing = (jnp.zeros((n, num_classes), dtype), zero, zero)
    first = (state, jnp.asarray(config.tolerance, jnp.float64), nothing, jnp.asarray(0, jnp.int32))
    state, _, (coefficients, primal, gap), _ = lax.while_loop(again, refine, first)
    return coefficients, info_of(primal, gap, state.epochs, config, dtype)


@functools.partial(jax.jit, static_argnames=("num_classes", "config"))
def first_state(data: Data, start: Start | None, *, num_classes: int, config: SolverConfig) -> SolverState:
    """`begin` as a program of its own."""
    return begin(data, start, num_classes, config)


@functools.partial(jax.jit, static_argnames=("num_classes", "config", "assign"))
def _surveyed(
    data: Data, weights: Array, penalty: Array, visits: Array, *, num_classes: int, config: SolverConfig, assign: bool
) -> SolverState:
    problem = _problem(data, num_classes, config)
    q = jnp.zeros((num_classes, data.features.shape[0]), jnp.float64)
    return working_set.begin(problem, q, weights, penalty, visits, config, assign=assign)


@functools.partial(jax.jit, static_argnames=("config", "num_classes"))
def _sampled(data: Data, *, num_classes: int, config: SolverConfig) -> tuple[Array, Array, Array]:
    return working_set.weights_from_sample(_problem(data, num_classes, config), config.block, config)


@functools.partial(jax.jit, static_argnames=("config", "size", "precise"))
def one_round(
    data: Data, state: SolverState, target: Array, *, size: int, config: SolverConfig, precise: bool
) -> tuple[SolverState, Array, Array]:
    """A round, and what the host decides by: the relative gap, and how many samples are undecided."""
    problem = _problem(data, state.weights.shape[0], config)
    state = working_set.step(problem, state, target, size, config, None if precise else jnp.float32)
    return state, relative(state.gap, state.primal), state.undecided


@functools.partial(jax.jit, static_argnames=("config",))
def certified(data: Data, state: SolverState, *, config: SolverConfig) -> tuple[Array, SolveInfo]:
    """The coefficients of a state with their certificate."""
    problem = _problem(data, state.weights.shape[0], config)
    dtype = result_dtype(data.features)
    coefficients, primal, gap = certificate(problem, state.simplex, dtype)
    return coefficients, info_of(primal, gap, state.epochs + 2, config, dtype)


@jax.jit
def _subset(data: Data, places: Array) -> Data:
    """Some rows, at costs scaled up to weigh as much as all of them."""
    costs = data.costs[places]
    scale = jnp.sum(data.costs) / jnp.maximum(jnp.sum(costs), jnp.finfo(costs.dtype).tiny)
    return Data(data.features[places], data.labels[places], costs * scale, data.margin)


def solve_on_host(
    data: Data, start: Start | None, *, num_classes: int, config: SolverConfig, progress: Progress | None
) -> tuple[Array, SolveInfo]:
    """The solve with its loop on the host: (coefficients [n, k], info)."""
    state = _first_on_host(data, start, num_classes, config)
    size = min(data.features.shape[0], config.block)
    target, dtype = config.tolerance, result_dtype(data.features)
    report = _reporter(progress, config)
    for rounds in range(MAX_ROUNDS):
        asked = data._replace(margin=margin_for(rounds, config, dtype))
        state, size = _to_gap(asked, state, target, size, config, report, at_least=1 if rounds else 0)
        coefficients, info = certified(data, state, config=config)
        state = dataclasses.replace(state, visits=state.visits + 2.0 * data.features.shape[0])
        if bool(info.converged) or not math.isfinite(float(info.gap)) or int(state.epochs) >= config.max_epochs:
            break
        target = float(next_target(target, config))
    report(float(info.gap))
    return coefficients, info


def _first_on_host(data: Data, start: Start | None, num_classes: int, config: SolverConfig) -> SolverState:
    n = data.features.shape[0]
    given = {"num_classes": num_classes, "config": config}
    if start is not None or n <= config.block:
        return first_state(data, start, **given)
    weights, penalty, visits = _sampled(data, **given)
    rows = LEVEL_GROWTH * config.block
    while rows * LEVEL_GROWTH <= n:
        part = _subset(data, jnp.asarray(working_set.sample_places(n, rows)))
        state = _surveyed(part, weights, penalty, jnp.zeros((), jnp.float64), **given, assign=True)
        state, _ = _to_gap(part, state, LEVEL_GAP, config.block, config, lambda ratio: None)
        weights, penalty, visits = state.weights, state.penalty, visits + state.visits
        rows *= LEVEL_GROWTH
    return _surveyed(data, weights, penalty, visits, **given, assign=True)


def _to_gap(
    data: Data, state: SolverState, target: float, size: int, config: SolverConfig, report: Any, at_least: int = 0
) -> tuple[SolverState, int]:
    """Rounds until the relative gap is reached, or passes run out; the working set's size at the end, too."""
    ratio = float(relative(state.gap, state.primal))
    n = data.features.shape[0]
    goal = jnp.asarray(target, jnp.float64)
    always = data.features.dtype == jnp.float64
    precise = True
    while True:
        report(ratio)
        if (
            math.isnan(ratio)
            or int(state.epochs) >= config.max_epochs
            or (ratio <= target and precise and at_least <= 0)
        ):
            return state, size
        precise = always or ratio <= PRECISE_GAP
        state, seen, undecided = one_round(data, state, goal, size=size, config=config, precise=precise)
        ratio, at_least = float(seen), at_least - 1
        size = _next_size(size, int(undecided), n, config.block)


def _next_size(size: int, undecided: int, n: int, least: int) -> int:
    """Rows of the next working set: a power of two times `least`, so that few programs are compiled."""
    wanted = least
    while wanted < ROOM * undecided and wanted < 2 * size:
        wanted *= 2
    return min(wanted, n)


def _reporter(progress: Progress | None, config: SolverConfig) -> Any:
    """Digits of the gap gained and to gain, in thousandths."""
    goal = max(round(-1000.0 * math.log10(config.tolerance)), 1)

    def report(ratio: float) -> None:
        if progress is not None:
            digits = -1000.0 * math.log10(max(ratio, 1e-300)) if math.isfinite(ratio) else 0.0
            progress(min(max(round(digits), 0), goal), goal)

    return report
