"""The loop of a solve on the host, where sizes adapt to what is left to do and each program is compiled once.

By coordinates: sweeps over all samples, then rounds in float32 until that is not precise enough, then in float64, in
turns with Newton's method where they get nowhere. By Newton's method: from a small sample and then, if there are many
rows, from larger ones; surveys run in float32 while the gap is wide.
"""

import dataclasses
import math
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax.svm import resident, sharded, streamed, working_set
from dualxda_jax.svm import rounds as rounds_of
from dualxda_jax.svm.config import SolverConfig
from dualxda_jax.svm.driver import MAX_ROUNDS, Answer, Data, least_block, margin_for, next_target
from dualxda_jax.svm.inputs import Start
from dualxda_jax.svm.problem import Array, one_hot_of, relative
from dualxda_jax.svm.working_set import SolverState
from dualxda_jax.types import Progress

# Samples of growing size: each has this many times the rows of the one before and is solved to this gap.
LEVEL_GROWTH, LEVEL_GAP = 4, 0.1
# Newton's method surveys in float32 until the gap is this small.
PRECISE_GAP = 1e-2
# Its blocks hold this many times the samples that are undecided, and at most double from one round to the next.
ROOM = 1.5


class Standing(NamedTuple):
    """What the loop goes by, on the host: relative and absolute gap, dual objective, samples undecided, passes."""

    ratio: float
    gap: float
    dual: float
    undecided: float
    epochs: float


@jax.jit
def _numbers(state: SolverState) -> Array:
    ratio, counts = relative(state.gap, state.primal), (state.undecided, state.epochs)
    return jnp.stack([ratio, state.gap, state.dual, *(a.astype(state.primal.dtype) for a in counts)])


def standing(state: SolverState) -> Standing:
    """Where a state stands, in one transfer."""
    return Standing(*np.asarray(_numbers(state)).tolist())


def programs_for(data: Data, config: SolverConfig) -> ModuleType:
    """Where what the loop asks for is: by where the features are."""
    if isinstance(data.features, np.ndarray):
        return streamed
    return resident if config.axis is None else sharded


def solve_on_host(
    data: Data, start: Start | None, *, num_classes: int, config: SolverConfig, progress: Progress | None
) -> Answer:
    """The solve with its loop on the host."""
    by_newton = config.method == "newton"
    report, run = reporter(progress, config), programs_for(data, config)
    if start is not None or data.features.shape[0] <= least_block(config):
        precise = start is None or data.features.dtype == jnp.float64
        state = run.first_state(data, start, num_classes=num_classes, config=config, precise=precise)
        if start is not None and not by_newton and _many(data, state, config):
            state = _swept(data, *rounds_of.sweeps_from(state, data.labels), float(state.visits), config)
    else:
        state = (_sampled_start if by_newton else _swept_start)(data, num_classes, config)
    size = min(run.most_rows(data, config), least_block(config))
    target, slack, rounds, turns, before, stalled = config.tolerance, 0, 0, 0, -math.inf, False
    now, best = config, None
    while True:
        to_gap = _by_newton if now.method == "newton" else _by_coordinates
        state, size, slack, stuck = to_gap(data, state, target, size, now, report, slack, turns > 0)
        if slack > 0 and now.method != "newton" and data.costs.dtype != jnp.float64:
            state = run.on_grid(_with_slack(data, slack, config), state, num_classes=num_classes, config=config)
        found = run.certified(data, state, config=config)
        info = found.info
        if best is None or float(info.gap) < float(best.info.gap):
            best = found
        state = dataclasses.replace(state, visits=state.visits + 2.0 * data.features.shape[0])
        if bool(info.converged) or not math.isfinite(float(info.gap)) or int(state.epochs) >= config.max_epochs:
            break
        stalled = stuck if now is not config else stalled
        if stuck:
            seen, turns = standing(state), turns + 1
            exhausted = now is config and stalled and seen.dual - before < rounds_of.TURN_RISE * seen.gap
            if exhausted or turns > rounds_of.TURNS:
                break
            before, now = (seen.dual if now is config else before), _other(now, config)
            if now is not config:
                asked = _with_slack(data, slack, config)
                state = run.handed_over(asked, state, num_classes=num_classes, config=now)
            continue
        now, rounds = config, rounds + 1
        if rounds == MAX_ROUNDS:
            break
        # Rounding the result to float32 may be all that it fell short by: first round it with care, at the same target.
        if slack > 0 or by_newton or data.costs.dtype == jnp.float64:
            target = float(next_target(target, config))
        slack += 1
    report(float(best.info.gap))
    return best._replace(info=dataclasses.replace(best.info, epochs=info.epochs))


def _other(now: SolverConfig, config: SolverConfig) -> SolverConfig:
    """Newton's method after coordinates, and the other way round."""
    return dataclasses.replace(config, method="newton") if now is config else config


def _many(data: Data, state: SolverState, config: SolverConfig) -> bool:
    """Whether so many samples are undecided that sweeps over all come before the first block."""
    n = data.features.shape[0]
    return n > least_block(config) and not rounds_of.few(int(state.undecided), n)


def _with_slack(data: Data, slack: int, config: SolverConfig) -> Data:
    return data._replace(margin=margin_for(slack, config, data.costs.dtype))


def _swept_start(data: Data, num_classes: int, config: SolverConfig) -> SolverState:
    d = data.features.shape[1] + (config.intercept_scaling != 0.0)
    return _swept(data, jnp.zeros((num_classes, d)), one_hot_of(data.labels, num_classes, jnp.float32), 0.0, config)


def _swept(data: Data, weights: Array, q: Array, visits: float, config: SolverConfig) -> SolverState:
    """The state after sweeps over all samples in float32, as long as many of them move."""
    n, run = data.features.shape[0], programs_for(data, config)
    given = {"num_classes": q.shape[0], "config": config}
    weights, q, sweeps = weights.astype(jnp.float32), q.astype(jnp.float32), 0
    most = max(config.max_epochs - math.ceil(visits / n), 1)
    for sweeps in range(1, min(rounds_of.MOST_SWEEPS, most) + 1):
        weights, q, _, moved = run.sweep(data, weights, q, **given)
        if sweeps >= rounds_of.LEAST_SWEEPS and rounds_of.few(int(moved), n):
            break
    return run.state_at(data, q, jnp.asarray(visits + sweeps * n), **given, precise=False)


def _by_coordinates(
    data: Data, state: SolverState, target: float, size: int, config: SolverConfig, report: Any, slack: int, anew: bool
) -> tuple[SolverState, int, int, bool]:
    """Rounds until the relative gap is reached, passes run out or they get nowhere (the last that is returned).

    Also returned are the block's size and the slack at the end: how much more than the margin is asked for, see
    `margin_for`. Where float32 does not get there, rounding the result to float32 will not do without. `anew` says that
    Newton's method had its turn.
    """
    precise, plain = anew or slack > 0, data
    data = _with_slack(plain, slack, config)
    goal, run = jnp.asarray(target, jnp.float64), programs_for(data, config)
    most = run.most_rows(data, config)
    given = {"num_classes": state.weights.shape[0], "config": config}

    def exactly(state: SolverState) -> SolverState:
        return run.refined(data, state, **given)

    if precise:
        state = exactly(state)
    seen, exhausted, poor = standing(state), False, 0
    begun = seen.epochs
    while True:
        report(seen.ratio)
        lost = math.isnan(seen.ratio)
        tired = poor >= rounds_of.POOR_ROUNDS or rounds_of.lengthy(seen.epochs - begun, seen.ratio)
        stuck = tired and precise
        if seen.ratio <= target or seen.epochs >= config.max_epochs or (lost and precise) or stuck:
            return state, size, slack, stuck and seen.ratio > target
        if not precise and (lost or exhausted or tired):
            slack = max(slack, int(exhausted))
            data = _with_slack(plain, slack, config)
            # What overflows float32 starts anew.
            state = run.first_state(data, None, **given) if lost else exactly(state)
            seen, precise = standing(state), True
            continue
        size, last = _next_size(seen.undecided, most, config.block), seen
        state, *_ = run.one_round(data, state, goal, size=size, config=config, precise=precise)
        seen = standing(state)
        poor += precise and rounds_of.poor(last.dual, last.gap, seen.dual, seen.gap)
        exhausted = rounds_of.exhausted(last.dual, last.ratio, seen.dual, seen.gap, seen.ratio)


def _sampled_start(data: Data, num_classes: int, config: SolverConfig) -> SolverState:
    n, run = data.features.shape[0], programs_for(data, config)
    given = {"num_classes": num_classes, "config": config}
    least = min(least_block(config), run.most_rows(data, config))
    weights, penalty, visits = run.sampled(data, **given, size=least)
    rows, alone = LEVEL_GROWTH * least, dataclasses.replace(config, axis=None)
    while rows * LEVEL_GROWTH <= n and rows <= run.most_rows(data, config):
        part = run.picked(data, working_set.sample_places(n, rows))
        state = resident.surveyed(
            part, weights, penalty, jnp.zeros((), jnp.float64), num_classes=num_classes, config=alone
        )
        state, *_ = _by_newton(part, state, LEVEL_GAP, least, alone, lambda ratio: None, 0, False)
        weights, penalty, visits = state.weights, state.penalty, visits + state.visits
        rows *= LEVEL_GROWTH
    return run.surveyed(data, weights, penalty, visits, **given)


def _by_newton(
    data: Data, state: SolverState, target: float, size: int, config: SolverConfig, report: Any, slack: int, turn: bool
) -> tuple[SolverState, int, int, bool]:
    """As `_by_coordinates`; they get nowhere only where this is a `turn` between coordinates."""
    data = _with_slack(data, slack, config)
    ratio = float(relative(state.gap, state.primal))
    run = programs_for(data, config)
    most = run.most_rows(data, config)
    goal = jnp.asarray(target, jnp.float64)
    always = data.features.dtype == jnp.float64
    precise, at_least = True, int(slack > 0)
    least, since = ratio, 0
    while True:
        report(ratio)
        if (
            math.isnan(ratio)
            or int(state.epochs) >= config.max_epochs
            or (ratio <= target and precise and at_least <= 0)
        ):
            return state, size, slack, False
        if turn and since >= rounds_of.STALLED_ROUNDS:
            return state, size, slack, True
        precise = always or ratio <= PRECISE_GAP
        state, seen, undecided = run.one_round(data, state, goal, size=size, config=config, precise=precise)
        ratio, at_least = float(seen), at_least - 1
        fell = ratio < rounds_of.STALLED_FALL * least
        least, since = (ratio, 0) if fell else (least, since + 1)
        size = min(_next_size(int(undecided), most, least_block(config)), max(2 * size, 1))


def _next_size(undecided: float, most: int, least: int) -> int:
    """Rows that the next block has room for: a power of two times `least`, so that few programs are compiled."""
    wanted = least
    while wanted < ROOM * undecided:
        wanted *= 2
    return min(wanted, most)


def reporter(progress: Progress | None, config: SolverConfig) -> Any:
    """Digits of the gap gained and to gain, in thousandths."""
    goal = max(round(-1000.0 * math.log10(config.tolerance)), 1)

    def report(ratio: float) -> None:
        if progress is not None:
            digits = -1000.0 * math.log10(max(ratio, 1e-300)) if math.isfinite(ratio) else 0.0
            progress(min(max(round(digits), 0), goal), goal)

    return report
