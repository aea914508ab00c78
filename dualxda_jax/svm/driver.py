"""A solve inside a trace, and the certificate. `host` has the loop on the host.

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
MAX_ROUNDS = 5
# Newton's method takes blocks this much larger than coordinate ascent.
NEWTON_BLOCKS = 4


class Data(NamedTuple):
    """What a solve is given: features [n, d], labels [n], costs [n] and the margin to ask for."""

    features: Array
    labels: Array
    costs: Array
    margin: Array


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
        # Where rows lie cannot be seen here: where there are several devices, they may lie on all of them.
        devices, platform = jax.device_count(), jax.default_backend()
    elif not isinstance(features, jax.Array):
        devices, platform = 1, jax.default_backend()
    else:
        places = features.devices()
        devices, platform = len(places), next(iter(places)).platform
    return dataclasses.replace(config, method="coordinate" if platform == "cpu" and devices == 1 else "newton")


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
    excess = 0.1 * rounds.astype(jnp.float64)
    return 1.0 + config.tolerance * excess


def begin(data: Data, start: Start | None, num_classes: int, config: SolverConfig, low: Any = None) -> SolverState:
    """The first state, in a trace: from a solution, or from zero, by sweeps or a sample where there are many rows.

    From a solution, samples are looked at in the precision `low` if one is given.
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
    return _swept(problem, jnp.zeros_like(problem.offset), nothing, none, config)


def _swept(problem: Problem, weights: Array, simplex: Array, visits: Array, config: SolverConfig) -> SolverState:
    """The state after sweeps over all samples, as long as many of them move."""
    n, dtype = problem.count, result_dtype(problem.features)

    def sweep(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        weights, q, _, i = carry
        swept = rounds_of.sweep_all(problem, weights, q)
        return swept.weights, swept.simplex, swept.moved, i + 1

    def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
        _, _, moved, i = carry
        many = ~rounds_of.few(moved, n) & (i < min(rounds_of.MOST_SWEEPS, config.max_epochs))
        return many | (i < min(rounds_of.LEAST_SWEEPS, config.max_epochs))

    first = (weights.astype(dtype), simplex.astype(dtype), jnp.int32(n), jnp.int32(0))
    _, q, _, i = lax.while_loop(unfinished, sweep, first)
    return rounds_of.state_at(problem, q, visits + i.astype(jnp.float64) * n, config)


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


def _swept_on(problem: Problem, state: SolverState, config: SolverConfig) -> SolverState:
    """A state from a solution, with sweeps over all samples where too many are undecided for a block."""
    if problem.count <= least_block(config):
        return state
    go_on = lambda: _swept(problem, *rounds_of.sweeps_from(state, problem.labels), state.visits, config)  # noqa: E731
    return lax.cond(rounds_of.few(state.undecided, problem.count), lambda: state, go_on)


def info_of(primal: Array, gap: Array, epochs: Array, config: SolverConfig, dtype: Any) -> SolveInfo:
    """The public record of a primal objective and an absolute gap in float64."""
    ratio = relative(gap, primal)
    parts = [a.astype(dtype) for a in (primal, primal - gap, ratio)]
    return SolveInfo(parts[0], parts[1], parts[2], epochs.astype(jnp.int32), ratio <= config.tolerance)


def certificate(
    problem: Problem, state: SolverState, config: SolverConfig, dtype: Any, *, screened: bool = False
) -> tuple[Array, Array, Array]:
    """The coefficients as they are returned, rounded to their dtype, and primal and gap of exactly those.

    Where `screened`, a look at the samples suffices that the leads of the state do not put beyond doubt.
    """
    plain = dataclasses.replace(problem, margin=jnp.ones_like(problem.margin))
    coefficients = to_coefficients(state.simplex, problem.labels, problem.cost, dtype)
    rounded = from_coefficients(coefficients.astype(problem.cost.dtype), problem.labels, problem.cost)
    if not screened:
        return coefficients, *primal_and_gap(plain, weights_of(plain, rounded), rounded)
    weights = screening.weights_of(plain, rounded)
    # The margin that the leads were found with is off by no more than the tolerance, see `margin_for`.
    lead = screening.aged(state, weights, config.tolerance)
    lead = jnp.where(jnp.any((rounded > 0.0) != (state.simplex > 0.0), axis=0), -jnp.inf, lead)
    gap = screening.slack_of(plain, weights, rounded, lead)
    return coefficients, screening.dual_of(plain, weights, rounded) + gap, gap


def next_target(target: Any, config: SolverConfig) -> Any:
    """The gap to solve to after a certificate that fell short."""
    return jnp.maximum(0.25 * target, 0.2 * config.tolerance)


def solve_traced(data: Data, start: Start | None, *, num_classes: int, config: SolverConfig) -> tuple[Array, SolveInfo]:
    """The whole solve as one program: (coefficients [n, k], info).

    Under `vmap`, coordinates solve one problem after another: side by side, each would wait for the slowest in every
    loop, and go both ways at every fork. Newton's method goes side by side, as its products are what takes time.
    """
    given = {"num_classes": num_classes, "config": config}
    if config.method != "coordinate":
        return _solve_traced(data, start, **given)
    solve = jax.custom_batching.custom_vmap(lambda data, start: _solve_traced(data, start, **given))

    @solve.def_vmap
    def _(size: int, batched: Any, data: Data, start: Start | None) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten((data, start))
        flags = tuple(jax.tree.leaves(batched))
        # A `jit` inside of the `vmap` has left the context that it was traced in.
        with jax.enable_x64(True):
            out = _one_by_one(leaves, flags=flags, tree=tree, **given)
        return out, jax.tree.map(lambda _: True, out)

    return solve(data, start)


@functools.partial(jax.jit, static_argnames=("flags", "tree", "num_classes", "config"))
def _one_by_one(
    leaves: list[Array], *, flags: tuple[bool, ...], tree: Any, num_classes: int, config: SolverConfig
) -> tuple[Array, SolveInfo]:
    """Solves for the entries along the leading axis of the leaves that have one, by their flags."""

    def one(mapped: list[Array]) -> tuple[Array, SolveInfo]:
        entry = iter(mapped)
        data, start = jax.tree.unflatten(tree, [next(entry) if f else a for a, f in zip(leaves, flags, strict=True)])
        return solve_traced(data, start, num_classes=num_classes, config=config)

    return lax.map(one, [a for a, f in zip(leaves, flags, strict=True) if f])


@functools.partial(jax.jit, static_argnames=("num_classes", "config"))
def _solve_traced(
    data: Data, start: Start | None, *, num_classes: int, config: SolverConfig
) -> tuple[Array, SolveInfo]:
    problem, screened = problem_from(data, num_classes, config), config.method == "coordinate"
    n, dtype = problem.count, result_dtype(data.features)
    size = min(n, max(NEWTON_BLOCKS * config.block, -(-n // 8)))
    state = begin(data, start, num_classes, config)
    if start is not None and config.method == "coordinate":
        state = _swept_on(problem, state, config)

    by_newton = dataclasses.replace(config, method="newton")
    none = jnp.asarray(0, jnp.int32)

    def unfinished(state: SolverState, target: Array) -> Array:
        far = relative(state.gap, state.primal) > target
        return far & ~jnp.isnan(state.gap) & (state.epochs < config.max_epochs)

    def solve_to(state: SolverState, target: Array, margin: Array) -> SolverState:
        asked, close = dataclasses.replace(problem, margin=margin), jnp.asarray(False)
        if config.method == "coordinate":

            def sweep_on(carry: tuple[SolverState, Array]) -> tuple[SolverState, Array]:
                new = rounds_of.step(asked, carry[0], target, size, config, screened=screened)
                poor = rounds_of.poor(carry[0].dual, carry[0].gap, new.dual, new.gap)
                return new, carry[1] + poor.astype(jnp.int32)

            well = lambda c: unfinished(c[0], target) & (c[1] < rounds_of.POOR_ROUNDS)  # noqa: E731
            state, _ = lax.while_loop(well, sweep_on, (state, none))
            soft = working_set.first_penalty(problem, config)
            state = dataclasses.replace(state, penalty=jnp.maximum(state.penalty, soft), first_penalty=soft)
            close = relative(state.gap, state.primal) <= rounds_of.CLOSE
        go_on = lambda s: rounds_of.step(asked, s, target, size, by_newton)  # noqa: E731
        return lax.while_loop(lambda s: unfinished(s, target) & ~close, go_on, state)

    def again(carry: Any) -> Array:
        state, _, (_, primal, gap), rounds = carry
        ratio = relative(gap, primal)
        short = (ratio > config.tolerance) & jnp.isfinite(ratio) & (state.epochs < config.max_epochs)
        return (rounds == 0) | (short & (rounds < MAX_ROUNDS))

    def refine(carry: Any) -> Any:
        state, target, found, rounds = carry
        # What a survey said holds for the margin that it was made with: another one asks for one more round.
        state = dataclasses.replace(state, slack=jnp.where(rounds < 1, state.slack, state.slack + 1e-3 * state.primal))
        state = solve_to(state, target, margin_for(rounds, config, dtype))
        new = certificate(problem, state, config, dtype, screened=screened)
        ratio, least = (relative(gap, primal) for _, primal, gap in (new, found))
        better = (rounds == 0) | (ratio < least)
        found = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, found)
        state = dataclasses.replace(state, visits=state.visits + 2.0 * n)
        return state, next_target(target, config), found, rounds + 1

    zero = jnp.zeros((), jnp.float64)
    nothing = (jnp.zeros((data.features.shape[0], num_classes), dtype), zero, zero)
    first = (state, jnp.asarray(config.tolerance, jnp.float64), nothing, none)
    state, _, (coefficients, primal, gap), _ = lax.while_loop(again, refine, first)
    return coefficients, info_of(primal, gap, state.epochs, config, dtype)


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
def certified(data: Data, state: SolverState, *, config: SolverConfig) -> tuple[Array, SolveInfo]:
    """The coefficients of a state with their certificate."""
    problem = problem_from(data, state.weights.shape[0], config)
    dtype = result_dtype(data.features)
    coefficients, primal, gap = certificate(problem, state, config, dtype, screened=problem.axis is None)
    return coefficients, info_of(primal, gap, state.epochs + 2, config, dtype)
