"""What every solve is made of: where it starts, its rounds, and the certificate; `host` and `traced` have the loops.

What is certified in the end is not what the rounds look at: they see (W, α) with W ≠ W(α), in float64. What is returned
is α rounded to its dtype, with W(α): certified anew, and solved further where that is not enough.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm import rounds as rounds_of
from dualxda_jax.svm import screening, working_set
from dualxda_jax.svm.config import SolverConfig
from dualxda_jax.svm.inputs import Start, in_trace, result_dtype
from dualxda_jax.svm.problem import (
    Array,
    Problem,
    from_coefficients,
    primal_and_gap,
    problem_of,
    relative,
    summed,
    to_coefficients,
    weights_of,
)
from dualxda_jax.svm.working_set import SolverState
from dualxda_jax.types import SolveInfo

# Certificates of rounded coefficients that may fall short before a solve gives up.
MAX_ROUNDS = 6
# The most that a margin is asked for above 1, in terms of the tolerance: twice as much would be all of it.
MOST_EXCESS = 0.45
# Newton's method takes blocks this much larger than coordinate ascent.
NEWTON_BLOCKS = 4


class Answer(NamedTuple):
    """What a solve ends with, in the dtype of the result: coefficients [n, k], W(α) [k, D] and the certificate."""

    coefficients: Array
    weights: Array
    info: SolveInfo


class Certificate(NamedTuple):
    """Coefficients [n, k] in the dtype of the result; W(α) [k, D], primal objective and absolute gap in float64."""

    coefficients: Array
    weights: Array
    primal: Array
    gap: Array

    @property
    def ratio(self) -> Array:
        """The relative gap."""
        return relative(self.gap, self.primal)

    def answer(self, epochs: Array, config: SolverConfig) -> Answer:
        """What is returned."""
        dtype = self.coefficients.dtype
        info = info_of(self.primal, self.gap, epochs, config, dtype)
        return Answer(self.coefficients, self.weights.astype(dtype), info)


class Data(NamedTuple):
    """What a solve is given: features [n, d], labels [n], costs [n], the margin to ask for, and γ (None: none)."""

    features: Array
    labels: Array
    costs: Array
    margin: Array
    smoothing: Array | None = None


def problem_from(data: Data, num_classes: int, config: SolverConfig) -> Problem:
    """The data of a solve as a problem."""
    problem = problem_of(data.features, data.labels, data.costs, num_classes, config)
    return dataclasses.replace(problem, margin=data.margin.astype(jnp.float64))


def resolved(config: SolverConfig, features: Any) -> SolverConfig:
    """The config with a method in the place of "auto"."""
    config = dataclasses.replace(config, axis=None)
    if config.method != "auto":
        return config
    if in_trace(features):
        # Where rows lie cannot be seen here: where there are several devices, they may lie on all of them, but not
        # within a `shard_map`, where each device has its own.
        devices, platform = (1 if _alone() else jax.device_count()), jax.default_backend()
    elif not isinstance(features, jax.Array):
        devices, platform = 1, jax.default_backend()
    else:
        places = features.devices()
        devices, platform = len(places), next(iter(places)).platform
    return dataclasses.replace(config, method="coordinate" if platform == "cpu" and devices == 1 else "newton")


def _alone() -> bool:
    """Whether the trace is of what one device does."""
    types = jax.sharding.get_abstract_mesh().axis_types
    return len(types) > 0 and all(kind == jax.sharding.AxisType.Manual for kind in types)


def least_block(config: SolverConfig) -> int:
    """Rows of the smallest block."""
    return config.block * (NEWTON_BLOCKS if config.method == "newton" else 1)


def margin_for(rounds: Array | int, config: SolverConfig, dtype: Any) -> Array:
    """The margin to ask for in the rounds after a certificate that fell short.

    Coefficients rounded to float32 move the scores of the free samples a little, and where the cost is large each
    little bit costs: C times the part by which a margin is missed. A margin asked for a little above 1 leaves room for
    that, and itself widens the gap by no more than about twice its excess.
    """
    if dtype == jnp.float64:
        return jnp.ones((), jnp.float64)
    rounds = jnp.asarray(rounds, jnp.int32)
    excess = jnp.minimum(0.1 * rounds.astype(jnp.float64), MOST_EXCESS)
    return 1.0 + config.tolerance * excess


def begin(data: Data, start: Start | None, num_classes: int, config: SolverConfig, low: Any = None) -> SolverState:
    """The first state, in a trace: from a solution, or from zero, by sweeps or a sample where there are many rows.

    After sweeps and from a solution, samples are looked at in the precision `low` if one is given.
    """
    problem = problem_from(data, num_classes, config)
    n, k = data.features.shape[0], num_classes
    none = jnp.zeros((), jnp.float64)
    if start is not None:
        return _warm(problem, start, config, low)
    nothing = from_coefficients(jnp.zeros((n, k), jnp.float64), problem.labels, problem.cost)
    by_newton = config.method == "newton"
    if problem.count <= least_block(config):
        penalty = working_set.first_penalty(problem, config) if by_newton else none
        return working_set.begin(
            problem, nothing, jnp.zeros_like(problem.offset), penalty, none, config, assign=False, exact=not by_newton
        )
    if by_newton:
        weights, penalty, visits = working_set.weights_from_sample(problem, least_block(config), config)
        return working_set.begin(problem, jnp.zeros((k, n), jnp.float64), weights, penalty, visits, config, assign=True)
    return swept(problem, jnp.zeros_like(problem.offset), nothing, none, config, low)


def swept(
    problem: Problem, weights: Array, simplex: Array, visits: Array, config: SolverConfig, low: Any = None
) -> SolverState:
    """The state after sweeps over all samples, as long as many of them move, looked at in the precision `low`."""
    n, dtype = problem.count, result_dtype(problem.features)
    most = jnp.maximum(config.max_epochs - jnp.ceil(visits / n), 1.0).astype(jnp.int32)

    def sweep(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        weights, q, _, i = carry
        swept = rounds_of.sweep_all(problem, weights, q)
        return swept.weights, swept.simplex, swept.moved, i + 1

    def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
        _, _, moved, i = carry
        many = ~rounds_of.few(moved, n) & (i < rounds_of.MOST_SWEEPS)
        return (many | (i < rounds_of.LEAST_SWEEPS)) & (i < most)

    first = (weights.astype(dtype), simplex.astype(dtype), jnp.int32(n), jnp.int32(0))
    _, q, _, i = lax.while_loop(unfinished, sweep, first)
    visits = visits + i.astype(jnp.float64) * n
    return rounds_of.state_at(problem, q, visits, config, low, screened=True)


def _warm(problem: Problem, start: Start, config: SolverConfig, low: Any) -> SolverState:
    """From a solution: its dual variables, brought into the box.

    Newton's method takes the classes that its weights put first instead where their gap is the smaller one: at the cost
    that it was found at, the dual variables are better; at another, most of them are at the wrong bound. To a method
    that goes by W(α), such classes are of no use: each sample may be right, and their sum is far off.
    """
    q = from_coefficients(start.coefficients.astype(jnp.float64), problem.labels, problem.cost)
    none = jnp.zeros((), jnp.float64)
    if config.method != "newton":
        return rounds_of.state_at(problem, q, none, config, low, screened=low is not None)
    data, given = rounds_of.lowered(problem, low), start.weights.astype(jnp.float64)
    penalty = working_set.first_penalty(problem, config)
    kept = working_set.begin(data, q, given, penalty, none, config, assign=False)
    led = working_set.begin(data, q, given, penalty, kept.visits, config, assign=True)
    kept = dataclasses.replace(kept, visits=led.visits)
    better = led.gap < kept.gap
    best: SolverState = jax.tree.map(lambda a, b: jnp.where(better, a, b), led, kept)
    return best


def info_of(primal: Array, gap: Array, epochs: Array, config: SolverConfig, dtype: Any) -> SolveInfo:
    """The public record of a primal objective and an absolute gap in float64."""
    ratio = relative(gap, primal)
    parts = [a.astype(dtype) for a in (primal, primal - gap, ratio)]
    return SolveInfo(parts[0], parts[1], parts[2], epochs.astype(jnp.int32), ratio <= config.tolerance)


def certificate(
    problem: Problem, state: SolverState, config: SolverConfig, dtype: Any, *, screened: bool = False
) -> Certificate:
    """The coefficients as they are returned, rounded to their dtype, and W(α), primal and gap of exactly those.

    Where `screened`, a look at the samples suffices that the leads of the state do not put beyond doubt.
    """
    plain = dataclasses.replace(problem, margin=jnp.ones_like(problem.margin))
    coefficients = to_coefficients(state.simplex, problem.labels, problem.cost, dtype)
    rounded = from_coefficients(coefficients.astype(problem.cost.dtype), problem.labels, problem.cost)
    if not screened:
        weights = weights_of(plain, rounded)
        return Certificate(coefficients, weights, *primal_and_gap(plain, weights, rounded))
    weights = screening.weights_of(plain, rounded)
    # The margin that the leads were found with is off by no more than the tolerance, see `margin_for`.
    lead = screening.aged(state, weights, config.tolerance)
    lead = jnp.where(jnp.any((rounded > 0.0) != (state.simplex > 0.0), axis=0), -jnp.inf, lead)
    gap = screening.slack_of(plain, weights, rounded, lead)
    return Certificate(coefficients, weights, screening.dual_of(plain, weights, rounded) + gap, gap)


def next_target(target: Any, config: SolverConfig) -> Any:
    """The gap to solve to after a certificate that fell short."""
    return jnp.maximum(0.25 * target, 0.2 * config.tolerance)


@functools.partial(jax.jit, static_argnames=("num_classes", "config", "precise"))
def first_state(
    data: Data, start: Start | None, *, num_classes: int, config: SolverConfig, precise: bool = True
) -> SolverState:
    """`begin` as a program of its own."""
    low = None if precise or config.method == "newton" else jnp.float32
    return begin(data, start, num_classes, config, low)


@functools.partial(jax.jit, static_argnames=("config", "size", "precise"))
def one_round(
    data: Data, state: SolverState, target: Array, *, size: int, config: SolverConfig, precise: bool
) -> tuple[SolverState, Array, Array]:
    """A round, and what the host decides by: the relative gap, and how many samples are undecided."""
    problem = problem_from(data, state.weights.shape[0], config)
    low = None if precise else jnp.float32
    state = rounds_of.step(problem, state, target, size, config, low, screened=True)
    return state, relative(state.gap, state.primal), summed(state.undecided, problem.axis)


@functools.partial(jax.jit, static_argnames=("config",))
def certified(data: Data, state: SolverState, *, config: SolverConfig) -> Answer:
    """The coefficients of a state with their certificate."""
    problem = problem_from(data, state.weights.shape[0], config)
    found = certificate(problem, state, config, result_dtype(data.features), screened=problem.axis is None)
    return found.answer(state.epochs + 2, config)
