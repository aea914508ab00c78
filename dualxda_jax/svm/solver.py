"""The certified solver: `init` and `step` for loops of one's own, `solve` for everybody else."""

import dataclasses
import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dualxda_jax import _check
from dualxda_jax.svm import implicit, newton, working_set
from dualxda_jax.svm.config import DEFAULT, NotConvergedWarning, SolverConfig
from dualxda_jax.svm.inputs import in_trace, prepare, result_dtype, start_coefficients
from dualxda_jax.svm.newton import SolverState
from dualxda_jax.svm.problem import (
    TINY,
    Array,
    Problem,
    from_coefficients,
    largest_curvature,
    primal_and_gap,
    problem_of,
    relative,
    to_coefficients,
    weights_of,
)
from dualxda_jax.types import DualSolution, Progress, SolveInfo


def init(
    features: Array,
    labels: Array,
    *,
    num_classes: int,
    cost: Array | float,
    config: SolverConfig = DEFAULT,
    init: DualSolution | None = None,
    sample_weight: Array | None = None,
) -> SolverState:
    """The state from which `step` starts. Arguments as `solve`'s."""
    features, labels, costs = prepare(features, labels, num_classes, cost, sample_weight)
    start = start_coefficients(init, features, num_classes)
    with jax.enable_x64(True):
        return _init(features, labels, costs, start, num_classes=num_classes, config=config)


def step(
    state: SolverState,
    features: Array,
    labels: Array,
    *,
    num_classes: int,
    cost: Array | float,
    config: SolverConfig = DEFAULT,
    sample_weight: Array | None = None,
) -> tuple[SolverState, SolveInfo]:
    """One step of the solver: a Newton step with its line search, or a move of the anchor.

    The info is a certificate too: its primal objective is taken at `state.weights` and its dual one at the state's
    coefficients. `finish` turns a state into a solution whose weights belong to its coefficients.

    Args:
        state: from `init` or the last `step`; every other argument as given to `init`.

    Returns:
        The new state and how far it is.
    """
    features, labels, costs = prepare(features, labels, num_classes, cost, sample_weight)
    with jax.enable_x64(True):
        target = jnp.asarray(config.tolerance, jnp.float64)
        return _step(state, features, labels, costs, target, config=config)


def finish(
    state: SolverState,
    features: Array,
    labels: Array,
    *,
    num_classes: int,
    cost: Array | float,
    config: SolverConfig = DEFAULT,
    sample_weight: Array | None = None,
) -> DualSolution:
    """The solution that a state stands for, certified with the weights that its coefficients make.

    Args:
        state: from `init` or `step`; every other argument as given to `init`.
    """
    features, labels, costs = prepare(features, labels, num_classes, cost, sample_weight)
    with jax.enable_x64(True):
        coefficients, info = _certified(state, features, labels, costs, config=config)
    return _solution(coefficients, features, info, config)


def solve(
    features: Array,
    labels: Array,
    *,
    num_classes: int,
    cost: Array | float,
    config: SolverConfig = DEFAULT,
    init: DualSolution | None = None,
    sample_weight: Array | None = None,
    progress: Progress | None = None,
) -> DualSolution:
    """Fit the multi-class SVM of Crammer and Singer and certify the fit by its duality gap.

    Works in eager mode, under `jit` and under `vmap` (over cost or sample_weight). The solve and its certificate run in
    float64 whatever dtype comes in and whether or not x64 is enabled; features are cast chunk by chunk.

    Args:
        features: [n, d] floating point.
        labels: [n] integers in 0..k-1.
        num_classes: k, 2 or more.
        cost: scalar C or one per sample [n]; 0 leaves a sample out.
        config: static options.
        init: a solution to start from, of another cost, other labels or fewer rows, too (the first rows are taken
            to be the same samples); what is infeasible here is brought into the box first.
        sample_weight: [n], multiplies the cost.
        progress: called on the host after every step with (digits of the gap gained, digits to gain) in thousandths;
            not under a trace.

    Returns:
        The solution. `info.converged` is False where `max_epochs` were not enough or where the features hold NaN;
        `info.gap` is what was reached.

    Raises:
        ValueError: shapes, dtypes, labels or costs that cannot be, and NaN or Inf in the features (outside of a trace).

    Source: Crammer & Singer, JMLR 2001; for the method see `newton`.
    """
    features, labels, costs = prepare(features, labels, num_classes, cost, sample_weight)
    start = start_coefficients(init, features, num_classes)
    frozen = [lax.stop_gradient(a) for a in (features, labels, costs, start)]
    if progress is None:
        coefficients, info = _forward(*frozen, num_classes=num_classes, config=config)
    else:
        if in_trace(*frozen):
            _check.fail("progress", "a callback inside a trace", "None there")
        coefficients, info = _watched(*frozen, num_classes=num_classes, config=config, progress=progress)
    coefficients = implicit.attach(
        coefficients, features, labels, costs, num_classes=num_classes, intercept_scaling=config.intercept_scaling
    )
    solution = _solution(coefficients, features, info, config)
    if not in_trace(solution) and not bool(info.converged):
        warnings.warn(
            f"svm.solve reached a relative duality gap of {float(info.gap):.2e}, not the tolerance of "
            f"{config.tolerance:.0e}, in {int(info.epochs)} epochs: raise config.max_epochs or config.tolerance",
            NotConvergedWarning,
            stacklevel=2,
        )
    return solution


def _start(problem: Problem, start: Array, config: SolverConfig) -> SolverState:
    anchor = from_coefficients(start.astype(jnp.float64), problem.labels, problem.cost)
    # At a large cost the first inner problem would be as hard as the last: begin with a softer one.
    stiffness = jnp.minimum(1.0, STIFF / jnp.maximum(largest_curvature(problem), TINY))
    penalty = config.penalty / config.growth * stiffness
    return newton.start(problem, weights_of(problem, anchor), anchor, penalty)


@functools.partial(jax.jit, static_argnames=("num_classes", "config"))
def _init(
    features: Array, labels: Array, costs: Array, start: Array, *, num_classes: int, config: SolverConfig
) -> SolverState:
    return _start(problem_of(features, labels, costs, num_classes, config), start, config)


@functools.partial(jax.jit, static_argnames=("config",))
def _step(
    state: SolverState, features: Array, labels: Array, costs: Array, target: Array, *, config: SolverConfig
) -> tuple[SolverState, SolveInfo]:
    problem = problem_of(features, labels, costs, state.weights.shape[0], config)
    state = working_set.step(problem, state, target, config)
    return state, _info(state.at.primal, state.gap, state.epochs, config, result_dtype(features))


@functools.partial(jax.jit, static_argnames=("config",))
def _certified(
    state: SolverState, features: Array, labels: Array, costs: Array, *, config: SolverConfig
) -> tuple[Array, SolveInfo]:
    problem = problem_of(features, labels, costs, state.weights.shape[0], config)
    dtype = result_dtype(features)
    coefficients, primal, gap = _certificate(problem, state, dtype)
    return coefficients, _info(primal, gap, state.epochs + 2, config, dtype)


def _certificate(problem: Problem, state: SolverState, dtype: Any) -> tuple[Array, Array, Array]:
    """The coefficients as they are returned, rounded to their dtype, and what is true of exactly those."""
    coefficients = to_coefficients(state.at.simplex, problem.labels, problem.cost, dtype)
    rounded = from_coefficients(coefficients.astype(problem.cost.dtype), problem.labels, problem.cost)
    primal, gap = primal_and_gap(problem, weights_of(problem, rounded), rounded)
    return coefficients, primal, gap


def _reached(state: SolverState, target: Array | float) -> Array:
    """Whether the gap of (W, α) is small, and W so close to W(α) that the gap there will be as well."""
    scale = target * jnp.abs(state.at.primal)
    return (state.gap <= scale) & (state.distance <= working_set.CLOSENESS * scale)


def _margin(rounds: Array, config: SolverConfig) -> Array:
    """The margin to ask for in the rounds after a certificate that fell short.

    Coefficients rounded to float32 move the scores of the free samples a little, and where the cost is large each
    little bit costs: C times the part by which a margin is missed. A margin asked for a little above 1 leaves room for
    that, and itself widens the gap by no more than about twice its excess.
    """
    excess = jnp.where(rounds < 2, 0.0, 0.1 * 2.0 ** (rounds.astype(jnp.float64) - 2.0))
    return 1.0 + config.tolerance * excess


def _info(primal: Array, gap: Array, epochs: Array, config: SolverConfig, dtype: Any) -> SolveInfo:
    ratio = relative(gap, primal)
    parts = [a.astype(dtype) for a in (primal, primal - gap, ratio)]
    return SolveInfo(parts[0], parts[1], parts[2], epochs.astype(jnp.int32), ratio <= config.tolerance)


def _forward(
    features: Array, labels: Array, costs: Array, start: Array, *, num_classes: int, config: SolverConfig
) -> tuple[Array, SolveInfo]:
    """The pure solve: (coefficients [n, k], info). Never differentiated: its inputs carry no gradient."""
    with jax.enable_x64(True):
        return _compiled(features, labels, costs, start, num_classes=num_classes, config=config)


@functools.partial(jax.jit, static_argnames=("num_classes", "config"))
def _compiled(
    features: Array, labels: Array, costs: Array, start: Array, *, num_classes: int, config: SolverConfig
) -> tuple[Array, SolveInfo]:
    problem = problem_of(features, labels, costs, num_classes, config)
    dtype = result_dtype(features)
    state = _start(problem, start, config)

    def solve_to(state: SolverState, target: Array, margin: Array) -> SolverState:
        asked = dataclasses.replace(problem, margin=margin)

        def unfinished(state: SolverState) -> Array:
            return ~_reached(state, target) & ~jnp.isnan(state.gap) & (state.epochs < config.max_epochs)

        return lax.while_loop(unfinished, lambda s: working_set.step(asked, s, target, config), state)

    # The steps certify (W, α) with W ≠ W(α). What is returned is α with W(α), rounded: certified anew, and
    # solved further where that is not enough.
    def again(carry: Any) -> Array:
        state, _, (_, primal, gap), rounds = carry
        ratio = relative(gap, primal)
        unfinished = (ratio > config.tolerance) & jnp.isfinite(ratio) & (state.epochs < config.max_epochs)
        return (rounds == 0) | (unfinished & (rounds < MAX_ROUNDS))

    def refine(carry: Any) -> Any:
        state, target, _, rounds = carry
        state = solve_to(state, target, _margin(rounds, config))
        certificate = _certificate(problem, state, dtype)
        again = newton.start(problem, state.weights, state.at.simplex, state.penalty / config.growth**2)
        return (
            dataclasses.replace(again, epochs=state.epochs + 2),
            jnp.maximum(0.25 * target, 0.2 * config.tolerance),
            certificate,
            rounds + 1,
        )

    zero = jnp.zeros((), jnp.float64)
    nothing = (jnp.zeros(start.shape, dtype), zero, zero)
    first = (state, jnp.asarray(config.tolerance, jnp.float64), nothing, jnp.asarray(0, jnp.int32))
    state, _, (coefficients, primal, gap), _ = lax.while_loop(again, refine, first)
    return coefficients, _info(primal, gap, state.epochs, config, dtype)


MAX_ROUNDS = 6
STIFF = 1e3


def _watched(
    features: Array,
    labels: Array,
    costs: Array,
    start: Array,
    *,
    num_classes: int,
    config: SolverConfig,
    progress: Progress,
) -> tuple[Array, SolveInfo]:
    """The same solve with the loop on the host, so that it can be watched."""
    with jax.enable_x64(True):
        state = _init(features, labels, costs, start, num_classes=num_classes, config=config)
        goal = max(round(-1000.0 * math.log10(config.tolerance)), 1)
        target = config.tolerance
        for _ in range(MAX_ROUNDS):
            while int(state.epochs) < config.max_epochs:
                ratio = float(relative(state.gap, state.at.primal))
                digits = -1000.0 * math.log10(max(ratio, 1e-300)) if math.isfinite(ratio) else 0.0
                progress(min(max(round(digits), 0), goal), goal)
                if bool(_reached(state, target)) or math.isnan(ratio):
                    break
                state, _ = _step(state, features, labels, costs, jnp.asarray(target, jnp.float64), config=config)
            coefficients, info = _certified(state, features, labels, costs, config=config)
            state = dataclasses.replace(state, epochs=state.epochs + 2)
            if bool(info.converged) or int(state.epochs) >= config.max_epochs:
                break
            target *= 0.25
    return coefficients, info


def _solution(coefficients: Array, features: Array, info: SolveInfo, config: SolverConfig) -> DualSolution:
    weights = jnp.einsum(
        "nk,nd->kd", coefficients, features.astype(coefficients.dtype), precision=lax.Precision.HIGHEST
    )
    intercept = config.intercept_scaling**2 * jnp.sum(coefficients, axis=0)
    return DualSolution(coefficients, weights, intercept, config.intercept_scaling, info)
