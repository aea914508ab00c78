"""What the loop on the host asks for, of features that are on the device: each one compiled program.

`streamed` answers the same for features that are not. Newton's method starts from samples of growing size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dualxda_jax.svm import coordinate, working_set
from dualxda_jax.svm import rounds as rounds_of
from dualxda_jax.svm.config import SolverConfig
from dualxda_jax.svm.driver import Data, certified, first_state, one_round, problem_from
from dualxda_jax.svm.inputs import result_dtype
from dualxda_jax.svm.problem import Array
from dualxda_jax.svm.working_set import SolverState

__all__ = [
    "certified", "first_state", "handed_over", "most_rows", "on_grid", "one_round", "picked", "refined", "sampled",
    "state_at", "surveyed", "sweep",
]  # fmt: skip


def most_rows(data: Data, config: SolverConfig) -> int:
    """Rows that a block may have."""
    return int(data.features.shape[0])


@functools.partial(jax.jit, static_argnames=("num_classes", "config"))
def sweep(data: Data, weights: Array, q: Array, *, num_classes: int, config: SolverConfig) -> coordinate.Swept:
    """A sweep over all samples."""
    return rounds_of.sweep_all(problem_from(data, num_classes, config), weights, q)


@functools.partial(jax.jit, static_argnames=("num_classes", "config", "precise"))
def state_at(
    data: Data, q: Array, visits: Array, *, num_classes: int, config: SolverConfig, precise: bool
) -> SolverState:
    """The state at q, surveyed in float64 or in float32."""
    problem = problem_from(data, num_classes, config)
    return rounds_of.state_at(problem, q, visits, config, None if precise else jnp.float32, screened=True)


@functools.partial(jax.jit, static_argnames=("num_classes", "config"))
def refined(data: Data, state: SolverState, *, num_classes: int, config: SolverConfig) -> SolverState:
    """A state that float32 or Newton's method left, in float64 and with W(α)."""
    return rounds_of.refined(problem_from(data, num_classes, config), state, config.tolerance)


@functools.partial(jax.jit, static_argnames=("num_classes", "config"))
def handed_over(data: Data, state: SolverState, *, num_classes: int, config: SolverConfig) -> SolverState:
    """A state by coordinates as Newton's method takes it."""
    problem = problem_from(data, num_classes, config)
    soft = working_set.first_penalty(problem, config)
    return working_set.begin(problem, state.simplex, state.weights, soft, state.visits, config, assign=False)


@functools.partial(jax.jit, static_argnames=("num_classes", "config"))
def on_grid(data: Data, state: SolverState, *, num_classes: int, config: SolverConfig) -> SolverState:
    """The state with dual variables that the dtype of the result holds exactly."""
    return rounds_of.on_grid(problem_from(data, num_classes, config), state, result_dtype(data.features))


@functools.partial(jax.jit, static_argnames=("num_classes", "config"))
def surveyed(
    data: Data, weights: Array, penalty: Array, visits: Array, *, num_classes: int, config: SolverConfig
) -> SolverState:
    """The state at W with every sample on the class that leads there."""
    problem = problem_from(data, num_classes, config)
    q = jnp.zeros((num_classes, data.features.shape[0]), jnp.float64)
    return working_set.begin(problem, q, weights, penalty, visits, config, assign=True)


@functools.partial(jax.jit, static_argnames=("num_classes", "config", "size"))
def sampled(data: Data, *, num_classes: int, config: SolverConfig, size: int) -> tuple[Array, Array, Array]:
    """W, penalty and visits from about `size` rows."""
    return working_set.weights_from_sample(problem_from(data, num_classes, config), size, config)


@jax.jit
def picked(data: Data, places: Any) -> Data:
    """Some rows, at costs scaled up to weigh as much as all of them."""
    return weighed(data, data.features[places], places)


def weighed(data: Data, features: Array, places: Any) -> Data:
    """The rows [m, d] that belong at these places, at costs scaled up to weigh as much as all."""
    costs = data.costs[places]
    scale = jnp.sum(data.costs) / jnp.maximum(jnp.sum(costs), jnp.finfo(costs.dtype).tiny)
    return Data(features, data.labels[places], costs * scale, data.margin)
