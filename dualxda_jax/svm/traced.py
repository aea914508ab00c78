"""A solve inside a trace: one program, with room for as many samples as may turn out to be undecided.

Coordinates and Newton's method take turns as in `host`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm import rounds as rounds_of
from dualxda_jax.svm import working_set
from dualxda_jax.svm.config import SolverConfig
from dualxda_jax.svm.driver import (
    MAX_ROUNDS,
    NEWTON_BLOCKS,
    Answer,
    Certificate,
    Data,
    begin,
    certificate,
    least_block,
    margin_for,
    next_target,
    problem_from,
    swept,
)
from dualxda_jax.svm.inputs import Start, result_dtype
from dualxda_jax.svm.problem import Array, Problem, relative
from dualxda_jax.svm.working_set import SolverState


class Standing(NamedTuple):
    """Where a solve in a trace stands; in turns with Newton's method as in `host`."""

    state: SolverState
    target: Array
    found: Certificate
    rounds: Array
    turns: Array
    by_newton: Array
    before: Array
    stalled: Array
    done: Array


def solve_traced(data: Data, start: Start | None, *, num_classes: int, config: SolverConfig) -> Answer:
    """The whole solve as one program.

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
) -> Answer:
    """Solves for the entries along the leading axis of the leaves that have one, by their flags."""

    def one(mapped: list[Array]) -> Answer:
        entry = iter(mapped)
        data, start = jax.tree.unflatten(tree, [next(entry) if f else a for a, f in zip(leaves, flags, strict=True)])
        return solve_traced(data, start, num_classes=num_classes, config=config)

    return lax.map(one, [a for a, f in zip(leaves, flags, strict=True) if f])


@functools.partial(jax.jit, static_argnames=("num_classes", "config"))
def _solve_traced(data: Data, start: Start | None, *, num_classes: int, config: SolverConfig) -> Answer:
    problem, screened = problem_from(data, num_classes, config), config.method == "coordinate"
    n, dtype = problem.count, result_dtype(data.features)
    size = min(n, max(NEWTON_BLOCKS * config.block, -(-n // 8)))
    state = begin(data, start, num_classes, config)
    if start is not None and config.method == "coordinate":
        state = _swept_on(problem, state, config)

    def refine(now: Standing) -> Standing:
        # What a survey said holds for the margin that it was made with: another one asks for one more round.
        slack = jnp.where(now.rounds < 1, now.state.slack, now.state.slack + 1e-3 * now.state.primal)
        state = dataclasses.replace(now.state, slack=slack)
        margin = margin_for(now.rounds, config, dtype)
        state, stuck = _solve_to(problem, now._replace(state=state), margin, size, config)
        new = certificate(problem, state, config, dtype, screened=screened)
        better = ((now.rounds == 0) & (now.turns == 0)) | (new.ratio < now.found.ratio)
        found: Certificate = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, now.found)
        state = dataclasses.replace(state, visits=state.visits + 2.0 * n)
        turns, rise = now.turns + stuck.astype(jnp.int32), state.dual - now.before
        exhausted = ~now.by_newton & now.stalled & (rise < rounds_of.TURN_RISE * state.gap)
        hopeless = jnp.where(stuck, exhausted | (turns > rounds_of.TURNS), now.rounds + 1 >= MAX_ROUNDS)
        short = (new.ratio > config.tolerance) & jnp.isfinite(new.ratio) & (state.epochs < config.max_epochs)
        return Standing(
            state,
            jnp.where(stuck, now.target, next_target(now.target, config)),
            found,
            jnp.where(stuck, now.rounds, now.rounds + 1),
            turns,
            stuck & ~now.by_newton,
            jnp.where(stuck & ~now.by_newton, state.dual, now.before),
            jnp.where(now.by_newton, stuck, now.stalled),
            ~short | hopeless,
        )

    zero, none, no = jnp.zeros((), jnp.float64), jnp.asarray(0, jnp.int32), jnp.asarray(False)
    nothing = Certificate(
        jnp.zeros((data.features.shape[0], num_classes), dtype), jnp.zeros_like(problem.offset), zero, zero
    )
    target, infinite = jnp.asarray(config.tolerance, jnp.float64), jnp.asarray(-jnp.inf, jnp.float64)
    begun = Standing(state, target, nothing, none, none, no, infinite, no, no)
    end = lax.while_loop(lambda now: ~now.done, refine, begun)
    return end.found.answer(end.state.epochs, config)


def _solve_to(
    problem: Problem, now: Standing, margin: Array, size: int, config: SolverConfig
) -> tuple[SolverState, Array]:
    """Rounds of whose turn it is until the target is reached, and whether they get nowhere."""
    asked, state, stuck = dataclasses.replace(problem, margin=margin), now.state, jnp.asarray(False)
    target, least, since = now.target, relative(now.state.gap, now.state.primal), jnp.asarray(0, jnp.int32)
    coordinate, by_newton = config.method == "coordinate", dataclasses.replace(config, method="newton")

    def unfinished(state: SolverState) -> Array:
        far = relative(state.gap, state.primal) > target
        return far & ~jnp.isnan(state.gap) & (state.epochs < config.max_epochs)

    if coordinate:

        def sweep_on(carry: tuple[SolverState, Array]) -> tuple[SolverState, Array]:
            new = rounds_of.step(asked, carry[0], target, size, config, screened=True)
            poor = rounds_of.poor(carry[0].dual, carry[0].gap, new.dual, new.gap)
            return new, carry[1] + poor.astype(jnp.int32)

        # Newton's method leaves a W that is not W(α).
        anew = lambda: rounds_of.state_at(asked, state.simplex, state.visits, config)  # noqa: E731
        state = lax.cond(~now.by_newton & (now.turns > 0), anew, lambda: state)
        begun = state.epochs

        def tired(carry: tuple[SolverState, Array]) -> Array:
            ratio = relative(carry[0].gap, carry[0].primal)
            return (carry[1] >= rounds_of.POOR_ROUNDS) | rounds_of.lengthy(carry[0].epochs - begun, ratio)

        well = lambda c: unfinished(c[0]) & ~tired(c) & ~now.by_newton  # noqa: E731
        swept_so_far = lax.while_loop(well, sweep_on, (state, jnp.asarray(0, jnp.int32)))
        state, stuck = swept_so_far[0], tired(swept_so_far) & unfinished(swept_so_far[0]) & ~now.by_newton
        soft = working_set.first_penalty(problem, config)
        state = dataclasses.replace(state, penalty=jnp.maximum(state.penalty, soft), first_penalty=soft)

    def go_on(carry: tuple[SolverState, Array, Array]) -> tuple[SolverState, Array, Array]:
        state, least, since = carry
        state = rounds_of.step(asked, state, target, size, by_newton)
        ratio = relative(state.gap, state.primal)
        fell = ratio < rounds_of.STALLED_FALL * least
        return state, jnp.where(fell, ratio, least), jnp.where(fell, 0, since + 1).astype(jnp.int32)

    def going(carry: tuple[SolverState, Array, Array]) -> Array:
        if not coordinate:
            return unfinished(carry[0])
        return unfinished(carry[0]) & now.by_newton & (carry[2] < rounds_of.STALLED_ROUNDS)

    state, _, since = lax.while_loop(going, go_on, (state, least, since))
    return state, stuck | ((since >= rounds_of.STALLED_ROUNDS) & unfinished(state) & coordinate)


def _swept_on(problem: Problem, state: SolverState, config: SolverConfig) -> SolverState:
    """A state from a solution, with sweeps over all samples where too many are undecided for a block."""
    if problem.count <= least_block(config):
        return state
    go_on = lambda: swept(problem, *rounds_of.sweeps_from(state, problem.labels), state.visits, config)  # noqa: E731
    return lax.cond(rounds_of.few(state.undecided, problem.count), lambda: state, go_on)
