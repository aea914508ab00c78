"""Solves by block coordinate ascent: the data filled up, the rounds, and the answer.

Outside of a trace, rows are filled up to one of a few sizes. Three programs do the work (begin, rounds,
result); all else is NumPy.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax.svm import program
from dualxda_jax.svm.config import SolverConfig
from dualxda_jax.svm.driver import Answer, Data, info_of
from dualxda_jax.svm.inputs import Start, result_dtype
from dualxda_jax.svm.margins import WIDE, Problem
from dualxda_jax.svm.problem import with_constant
from dualxda_jax.types import SolveInfo

FOREVER = 2**31 - 1


def solve_on_host(
    data: Data, start: Start | None, *, num_classes: int, config: SolverConfig, report: Callable[[float], None] | None
) -> Answer:
    """Solve outside of a trace, for features on one device.

    Args:
        data: the problem.
        start: dual variables to start from.
        num_classes: k.
        config: options.
        report: called with the relative gap after each round, or None.
    """
    features, labels, costs, _, given_smoothing = data
    smoothing: Any = 0.0 if given_smoothing is None else given_smoothing
    n, heuristics, dtype = features.shape[0], config.heuristics, result_dtype(features)
    large = features.nbytes > heuristics.fill_bytes
    size = n if large else program.bucket(n, heuristics)
    problem = Problem(
        jax.device_put(_filled_features(features, size, config.intercept_scaling)),
        jax.device_put(_filled(labels, size)),
        jax.device_put(_filled(costs, size).astype(np.float64)),
        *(jax.device_put(np.float64(v)) for v in (smoothing, config.tolerance, config.max_epochs, n)),
    )
    static = program.layout(size, num_classes, config.block, config.chunk, heuristics)
    coefficients = None if start is None else jax.device_put(_filled(start.coefficients, size))
    state = program.begin(problem, coefficients, static=static)
    run: dict[str, Any] = {"static": static, "dtype": jnp.dtype(dtype).name}
    if report is None:
        state = program.advance(problem, state, np.int32(FOREVER), **run)
    while int(state.status) != program.DONE:
        state = program.advance(problem, state, np.int32(int(state.rounds) + 1), **run)
        assert report is not None
        report(float(state.gap) / max(float(state.primal), 1e-300) if math.isfinite(float(state.gap)) else math.inf)
    found = np.asarray(program.coefficients_at(problem, state, dtype=run["dtype"]))[:n]
    primal, gap = np.asarray(state.primal), np.asarray(state.gap)
    info = _info(primal, gap, math.ceil(float(state.visits) / n), config, dtype)
    return Answer(jax.device_put(found), jax.device_put(np.asarray(state.weights).astype(dtype)), info)


def solve_in_trace(data: Data, start: Start | None, *, num_classes: int, config: SolverConfig) -> Answer:
    """Solve as a part of somebody's program."""
    features, labels, costs, _, smoothing = data
    dtype = result_dtype(features)
    numbers = (jnp.asarray(v, WIDE) for v in (smoothing, config.tolerance, config.max_epochs, features.shape[0]))
    extended = with_constant(features, config.intercept_scaling)
    problem = Problem(extended, labels, costs.astype(WIDE), *numbers)
    static = program.layout(features.shape[0], num_classes, config.block, config.chunk, config.heuristics)
    name = jnp.dtype(dtype).name
    state = program.begin(problem, None if start is None else start.coefficients, static=static)
    state = program.advance(problem, state, jnp.asarray(FOREVER, jnp.int32), static=static, dtype=name)
    epochs = jnp.ceil(state.visits / problem.samples)
    info = info_of(state.primal, state.gap, epochs, config, dtype)
    return Answer(program.coefficients_at(problem, state, dtype=name), state.weights.astype(dtype), info)


def _info(primal: np.ndarray, gap: np.ndarray, epochs: float, config: SolverConfig, dtype: Any) -> SolveInfo:
    """The public record, as `driver.info_of`, by NumPy; a gap that is no number is not converged."""
    ratio, put = gap / np.maximum(primal, 1e-30), jax.device_put
    first, second, third = (put(a.astype(dtype)) for a in (primal, primal - gap, ratio))
    return SolveInfo(first, second, third, put(np.int32(epochs)), put(ratio <= config.tolerance))


def _filled(values: Any, size: int) -> np.ndarray:
    """Values [n, …] with zeros appended up to `size` rows."""
    values = np.asarray(values)
    return np.pad(values, [(0, size - len(values))] + [(0, 0)] * (values.ndim - 1))


def _filled_features(features: Any, size: int, scaling: float) -> Any:
    """Features with the constant one behind them, and rows of zeros up to `size`."""
    n, d = features.shape
    if size == n and scaling == 0.0:
        return features
    values = np.asarray(features)
    filled = np.empty((size, d + (scaling != 0.0)), values.dtype)
    filled[:n, :d], filled[n:] = values, 0
    filled[:n, d:] = scaling
    return filled
