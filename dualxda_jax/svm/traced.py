"""A solve inside a trace: one program, with room for as many samples as may turn out to be undecided.

Coordinates and Newton's method take turns as in `host`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dualxda_jax.svm import ascend, block, screening, working_set
from dualxda_jax.svm import rounds as rounds_of
from dualxda_jax.svm.config import SolverConfig
from dualxda_jax.svm.driver import (
    MAX_ROUNDS,
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
    slack: Array
    precise: Array
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
    if data.smoothing is not None:
        return ascend.solve_in_trace(data, start, num_classes=num_classes, config=config)
    problem, by_coordinates = problem_from(data, num_classes, config), config.method == "coordinate"
    n, dtype = problem.count, result_dtype(data.features)
    size = min(n, max(least_block(config), -(-n // 8)))
    narrow = by_coordinates and dtype != jnp.float64
    low = jnp.float32 if narrow and (n > least_block(config) or start is not None) else None
    state = begin(data, start, num_classes, config, low)
    if start is not None and by_coordinates:
        state = _swept_on(problem, state, config, low)

    def refine(now: Standing) -> Standing:
        now, stuck = (_coordinates_or_newton if by_coordinates else _newton)(problem, now, size, config)
        state = now.state
        if narrow:
            asked = dataclasses.replace(problem, margin=margin_for(now.slack, config, dtype))
            state = lax.cond(
                (now.slack > 0) & ~now.by_newton, lambda: rounds_of.on_grid(asked, now.state, dtype), lambda: now.state
            )
        new = certificate(problem, state, config, dtype, screened=by_coordinates)
        better = ((now.rounds == 0) & (now.turns == 0)) | (new.ratio < now.found.ratio)
        found: Certificate = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, now.found)
        state = dataclasses.replace(state, visits=state.visits + 2.0 * n)
        turns, rise = now.turns + stuck.astype(jnp.int32), state.dual - now.before
        exhausted = ~now.by_newton & now.stalled & (rise < rounds_of.TURN_RISE * state.gap)
        hopeless = jnp.where(stuck, exhausted | (turns > rounds_of.TURNS), now.rounds + 1 >= MAX_ROUNDS)
        short = (new.ratio > config.tolerance) & jnp.isfinite(new.ratio) & (state.epochs < config.max_epochs)
        # Rounding the result may be all that it fell short by: first round it with care, at the same target.
        same = stuck | (now.slack < 1) if narrow else stuck
        return now._replace(
            state=state,
            target=jnp.where(same, now.target, next_target(now.target, config)),
            found=found,
            rounds=jnp.where(stuck, now.rounds, now.rounds + 1),
            slack=jnp.where(stuck, now.slack, now.slack + 1),
            turns=turns,
            by_newton=stuck & ~now.by_newton,
            before=jnp.where(stuck & ~now.by_newton, state.dual, now.before),
            stalled=jnp.where(now.by_newton, stuck, now.stalled),
            done=~short | hopeless,
        )

    zero, none, no = jnp.zeros((), jnp.float64), jnp.asarray(0, jnp.int32), jnp.asarray(False)
    nothing = Certificate(
        jnp.zeros((data.features.shape[0], num_classes), dtype), jnp.zeros_like(problem.offset), zero, zero
    )
    target, infinite = jnp.asarray(config.tolerance, jnp.float64), jnp.asarray(-jnp.inf, jnp.float64)
    begun = Standing(state, target, nothing, none, none, jnp.asarray(low is None), none, no, infinite, no, no)
    end = lax.while_loop(lambda now: ~now.done, refine, begun)
    return end.found.answer(end.state.epochs, config)


def _unfinished(state: SolverState, target: Array, config: SolverConfig) -> Array:
    far = relative(state.gap, state.primal) > target
    return far & ~jnp.isnan(state.gap) & (state.epochs < config.max_epochs)


def _coordinates_or_newton(problem: Problem, now: Standing, size: int, config: SolverConfig) -> tuple[Standing, Array]:
    """Rounds of whose turn it is until the target is reached, and whether they get nowhere."""
    turn, unfinished = now.by_newton, functools.partial(_unfinished, target=now.target, config=config)
    now, stuck = lax.cond(turn, lambda: (now, jnp.asarray(False)), lambda: _coordinates(problem, now, size, config))
    soft = working_set.first_penalty(problem, config)
    state = dataclasses.replace(now.state, penalty=jnp.maximum(now.state.penalty, soft), first_penalty=soft)
    asked = dataclasses.replace(problem, margin=margin_for(now.slack, config, result_dtype(problem.features)))
    by_newton = dataclasses.replace(config, method="newton")

    def go_on(carry: tuple[SolverState, Array, Array]) -> tuple[SolverState, Array, Array]:
        state, least, since = carry
        state = rounds_of.step(asked, state, now.target, size, by_newton)
        ratio = relative(state.gap, state.primal)
        fell = ratio < rounds_of.STALLED_FALL * least
        return state, jnp.where(fell, ratio, least), jnp.where(fell, 0, since + 1).astype(jnp.int32)

    going = lambda c: unfinished(c[0]) & turn & (c[2] < rounds_of.STALLED_ROUNDS)  # noqa: E731
    first = state, relative(state.gap, state.primal), jnp.asarray(0, jnp.int32)
    state, _, since = lax.while_loop(going, go_on, first)
    stuck = stuck | ((since >= rounds_of.STALLED_ROUNDS) & unfinished(state))
    return now._replace(state=state), stuck


class Turn(NamedTuple):
    """A turn of coordinates.

    Attributes:
        state: where it stands.
        poor: scalar int32, how many rounds were poor.
        precise: scalar bool, whether it looks in float64.
        slack: scalar int32, how much more than the margin is asked for, see `margin_for`.
        again: scalar bool, whether to make W(α) anew and look again before anything is solved for.
    """

    state: SolverState
    poor: Array
    precise: Array
    slack: Array
    again: Array


def _coordinates(problem: Problem, now: Standing, size: int, config: SolverConfig) -> tuple[Standing, Array]:
    """Rounds by coordinates, in float32 until that is not precise enough, as on the host."""
    dtype, begun = result_dtype(problem.features), now.state.epochs
    narrow, least = dtype != jnp.float64, least_block(config)

    def solved(asked: Problem, state: SolverState) -> SolverState:
        given = {"config": config, "dtype": block.sweep_dtype(problem, dtype)}
        solve = functools.partial(block.solve_block, asked, state, now.target, **given)
        if size <= 2 * least:
            return solve(size=size)
        # Room for what is not there takes time as well.
        few = block.ROOM * state.undecided.astype(jnp.float32) <= least
        return lax.cond(few, lambda: solve(size=least), lambda: solve(size=size))

    def tired(turn: Turn) -> Array:
        ratio = relative(turn.state.gap, turn.state.primal)
        return (turn.poor >= rounds_of.POOR_ROUNDS) | rounds_of.lengthy(turn.state.epochs - begun, ratio)

    def go_on(turn: Turn) -> Turn:
        old = turn.state
        asked = dataclasses.replace(problem, margin=margin_for(turn.slack, config, dtype))
        moved = lax.cond(turn.again, lambda: rounds_of.anew(asked, old), lambda: solved(asked, old))
        look = lambda low: screening.survey(rounds_of.lowered(asked, low), old, moved, config.tolerance)  # noqa: E731
        new = lax.cond(turn.precise, lambda: look(None), lambda: look(jnp.float32)) if narrow else look(None)
        poor = ~turn.again & turn.precise & rounds_of.poor(old.dual, old.gap, new.dual, new.gap)
        turn = turn._replace(state=new, poor=turn.poor + poor.astype(jnp.int32), again=jnp.asarray(False))
        if not narrow:
            return turn
        last, ratio = relative(old.gap, old.primal), relative(new.gap, new.primal)
        exhausted = rounds_of.exhausted(old.dual, last, new.dual, new.gap, ratio)
        change = ~turn.precise & (exhausted | tired(turn) | jnp.isnan(ratio)) & ~(ratio <= now.target)
        slack = jnp.where(change & exhausted, jnp.maximum(turn.slack, 1), turn.slack)
        return turn._replace(precise=turn.precise | change, slack=slack, again=change)

    # What overflows float32 is looked at in float64.
    again = (now.turns > 0) | (now.slack > 0) | (~now.precise & jnp.isnan(now.state.gap))
    unfinished = functools.partial(_unfinished, target=now.target, config=config)
    first = Turn(now.state, jnp.asarray(0, jnp.int32), now.precise | again, now.slack, again)
    turn = lax.while_loop(lambda t: t.again | (unfinished(t.state) & ~(tired(t) & t.precise)), go_on, first)
    stuck = tired(turn) & unfinished(turn.state)
    return now._replace(state=turn.state, precise=turn.precise, slack=turn.slack), stuck


def _newton(problem: Problem, now: Standing, size: int, config: SolverConfig) -> tuple[Standing, Array]:
    """Rounds by Newton's method alone until the target is reached."""
    # What a survey said holds for the margin that it was made with: another one asks for one more round.
    slack = jnp.where(now.slack < 1, now.state.slack, now.state.slack + 1e-3 * now.state.primal)
    asked = dataclasses.replace(problem, margin=margin_for(now.slack, config, result_dtype(problem.features)))
    state = lax.while_loop(
        functools.partial(_unfinished, target=now.target, config=config),
        lambda state: rounds_of.step(asked, state, now.target, size, config),
        dataclasses.replace(now.state, slack=slack),
    )
    return now._replace(state=state), jnp.asarray(False)


def _swept_on(problem: Problem, state: SolverState, config: SolverConfig, low: Any) -> SolverState:
    """A state from a solution, with sweeps over all samples where too many are undecided for a block."""
    if problem.count <= least_block(config):
        return state
    start = lambda: rounds_of.sweeps_from(state, problem.labels)  # noqa: E731
    go_on = lambda: swept(problem, *start(), state.visits, config, low)  # noqa: E731
    return lax.cond(rounds_of.few(state.undecided, problem.count), lambda: state, go_on)
