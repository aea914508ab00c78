"""The certified solver: `init` and `step` for loops of one's own, `solve` for everybody else."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualxda_jax import _check
from dualxda_jax.svm import ascend, driver, host, implicit, sharded, traced
from dualxda_jax.svm.config import DEFAULT, NotConvergedWarning, SolverConfig
from dualxda_jax.svm.inputs import in_trace, prepare, result_dtype, smoothing_of, start_of
from dualxda_jax.svm.problem import Array
from dualxda_jax.svm.working_set import SolverState
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
    features, labels, costs = prepare(features, labels, num_classes, cost, sample_weight, config)
    start = start_of(init, features, num_classes, config.intercept_scaling)
    with jax.enable_x64(True):
        data = driver.Data(features, labels, costs, jnp.ones((), jnp.float64))
        data, start, config, _ = _placed(data, start, config)
        return host.programs_for(data, config).first_state(data, start, num_classes=num_classes, config=config)


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
    """One round of the solver: solve for the samples that are least decided, then look at all of them.

    The info is a certificate too: its primal objective is taken at `state.weights` and its dual one at the state's
    coefficients. `finish` turns a state into a solution whose weights belong to its coefficients.

    Args:
        state: from `init` or the last `step`; every other argument as given to `init`.

    Returns:
        The new state and how far it is.
    """
    features, labels, costs = prepare(features, labels, num_classes, cost, sample_weight, config)
    with jax.enable_x64(True):
        data = driver.Data(features, labels, costs, jnp.ones((), jnp.float64))
        data, _, config, _ = _placed(data, None, _as_begun(config, state))
        target = jnp.asarray(config.tolerance, jnp.float64)
        run = host.programs_for(data, config)
        size = min(run.most_rows(data, config), driver.NEWTON_BLOCKS * config.block)
        state, *_ = run.one_round(data, state, target, size=size, config=config, precise=True)
        return state, driver.info_of(state.primal, state.gap, state.epochs, config, result_dtype(features))


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
    features, labels, costs = prepare(features, labels, num_classes, cost, sample_weight, config)
    with jax.enable_x64(True):
        data = driver.Data(features, labels, costs, jnp.ones((), jnp.float64))
        data, _, config, _ = _placed(data, None, _as_begun(config, state))
        answer = host.programs_for(data, config).certified(data, state, config=config)
        solution = _solution(answer, features, config)
    _warn(solution, config)
    return solution


def _as_begun(config: SolverConfig, state: SolverState) -> SolverConfig:
    """The config with the method of a state: "auto" may say another inside of a trace than outside."""
    if config.method not in ("auto", state.method):
        _check.fail("config.method", repr(config.method), f"{state.method!r}, which the state was begun with")
    return dataclasses.replace(config, method=state.method)


def solve(
    features: Array,
    labels: Array,
    *,
    num_classes: int,
    cost: Array | float,
    config: SolverConfig = DEFAULT,
    init: DualSolution | None = None,
    sample_weight: Array | None = None,
    smoothing: Array | float = 0.0,
    progress: Progress | None = None,
) -> DualSolution:
    """Fit the multi-class SVM of Crammer and Singer and certify the fit by its duality gap.

    Works in eager mode, under `jit` and under `vmap` (over cost or sample_weight; by coordinates, that is on a CPU, one
    problem after another), and inside of `jax.shard_map(..., check_vma=False)`, which spreads problems over devices.
    The solve and its certificate run in float64 whatever dtype comes in and whether or not x64 is enabled; features are
    cast chunk by chunk.

    Args:
        features: [n, d] floating point; float64 is rounded to float32 where x64 is off. NumPy arrays and memory-mapped
            files beyond `config.device_bytes` stay where they are and pass through the device in parts; there are no
            derivatives then.
        labels: [n] integers in 0..k-1.
        num_classes: k, 2 or more.
        cost: scalar C or one per sample [n]; 0 leaves a sample out.
        config: static options.
        init: a solution to start from, of another cost, other labels or fewer rows, too (the first rows are taken
            to be the same samples); what is infeasible here is brought into the box first.
        sample_weight: [n], multiplies the cost.
        smoothing: scalar γ, 0 or more. Above 0 the hinge is smoothed by a quadratic on the dual simplex; coefficients
            are unique then, derivatives exist but where an active class appears or leaves, and the gap is that of the
            smoothed problem. 0 is the paper's. Not for features over several devices or in host memory.
        progress: called on the host after every round with (digits of the gap gained, digits to gain) in thousandths;
            not under a trace.

    Returns:
        The solution. `info.converged` is False where `max_epochs` were not enough or where the features hold NaN;
        `info.gap` is what was reached. Derivatives pass through coefficients, weights and intercept; `info` has none.

    Raises:
        ValueError: shapes, dtypes, labels or costs that cannot be, and NaN or Inf in the features (outside of a trace).

    Source: Crammer & Singer, JMLR 2001; smoothing: Blondel, Martins & Niculae, JMLR 2020. The method is in `program`.
    """
    features, labels, costs = prepare(features, labels, num_classes, cost, sample_weight, config)
    gamma = smoothing_of(smoothing)
    start = start_of(init, features, num_classes, config.intercept_scaling)
    with jax.enable_x64(True):
        data = driver.Data(features, labels, costs, jnp.ones((), jnp.float64), gamma)
        if not isinstance(features, np.ndarray):
            data, start = lax.stop_gradient((data, start))
        data, start, config, rows = _placed(data, start, config)
        if gamma is not None and (rows is not None or isinstance(features, np.ndarray)):
            _check.fail("smoothing", "above 0 for features over several devices or in host memory", "0 there")
        if not in_trace(data, start):
            answer = _solve_on_host(data, start, num_classes, config, progress)
        elif progress is not None:
            _check.fail("progress", "a callback inside a trace", "None there")
        elif rows is not None:
            answer = sharded.solve_traced(rows, data, start, num_classes=num_classes, config=config)
        else:
            config = config if gamma is None else dataclasses.replace(config, method="coordinate")
            answer = traced.solve_traced(data, start, num_classes=num_classes, config=config)
    if not isinstance(features, np.ndarray) and in_trace(features, costs, gamma):
        coefficients = implicit.attach(
            answer.coefficients, features, labels, costs, 0.0 if gamma is None else smoothing,
            num_classes=num_classes, intercept_scaling=config.intercept_scaling,
        )  # fmt: skip
        answer = answer._replace(coefficients=coefficients)
    solution = _solution(answer, features, config)
    _warn(solution, config)
    return solution


def _solve_on_host(
    data: driver.Data, start: Any, num_classes: int, config: SolverConfig, progress: Progress | None
) -> driver.Answer:
    """Block coordinate ascent on one CPU, and the turns with Newton's method where it stagnates."""
    given: dict[str, Any] = {"num_classes": num_classes, "config": config}
    plain = config.method == "coordinate" and isinstance(data.features, jax.Array) and config.axis is None
    if not plain and data.smoothing is None:
        return host.solve_on_host(data, start, progress=progress, **given)
    answer = ascend.solve_on_host(
        data, start, report=None if progress is None else host.reporter(progress, config), **given
    )
    info = answer.info
    if data.smoothing is not None or bool(info.converged) or int(info.epochs) >= config.max_epochs:
        return answer
    other = host.solve_on_host(data, start, progress=progress, **given)
    epochs = info.epochs + other.info.epochs
    if float(other.info.gap) > float(info.gap):
        return answer._replace(info=dataclasses.replace(info, epochs=epochs))
    return other._replace(info=dataclasses.replace(other.info, epochs=epochs))


def _warn(solution: DualSolution, config: SolverConfig) -> None:
    """Say so where a solution fell short of its tolerance, and what may help."""
    if in_trace(solution) or bool(solution.info.converged):
        return
    gap, epochs = float(solution.info.gap), int(solution.info.epochs)
    ended = epochs >= config.max_epochs
    advice = "raise config.max_epochs or" if ended else "it gets no further; raise"
    advice += " config.tolerance"
    if not ended and solution.coefficients.dtype != jnp.float64:
        advice += " or take float64 (jax_enable_x64)"
    warnings.warn(
        f"the SVM has a relative duality gap of {gap:.2e}, not the tolerance of {config.tolerance:.0e}, after "
        f"{epochs} epochs: {advice}",
        NotConvergedWarning,
        stacklevel=3,
    )


def _placed(
    data: driver.Data, start: Any, config: SolverConfig
) -> tuple[driver.Data, Any, SolverConfig, sharded.Rows | None]:
    """Everything where it belongs, and the config without "auto"."""
    rows = sharded.rows_of(data.features, config)
    if rows is None:
        return data, start, driver.resolved(config, data.features), None
    data, start = sharded.laid(rows, data, start)
    return data, start, sharded.resolved(config, rows), rows


def _solution(answer: driver.Answer, features: Array, config: SolverConfig) -> DualSolution:
    """The answer with weights [k, d] and intercept [k], which follow the coefficients and features in derivatives."""
    scaling, d = config.intercept_scaling, features.shape[1]
    if not in_trace(answer, features) and len(answer.weights.devices()) == 1:
        # Outside of a trace by NumPy, which has nothing to compile.
        made = np.asarray(answer.weights)
        column = scaling * made[:, d] if scaling else np.zeros_like(made[:, 0])
        put = jax.device_put
        return DualSolution(answer.coefficients, put(made[:, :d]), put(column), scaling, answer.info)
    weights = answer.weights[:, :d]
    intercept = scaling * answer.weights[:, d] if scaling else jnp.zeros_like(weights[:, 0])
    if not isinstance(features, np.ndarray):
        weights, intercept = implicit.attach_weights(weights, intercept, answer.coefficients, features, scaling)
    return DualSolution(answer.coefficients, weights, intercept, scaling, answer.info)
