"""What the loop on the host asks for, of features that stay in host memory or in a file: they pass slab by slab.

A pass over all samples is a fold over slabs of rows; a block of samples is gathered on the host. On the device lie, of
everything with d columns, two slabs (one in use and one on its way) or one block, which together with its copies in the
working precision takes no more than `SolverConfig.device_bytes` (64 rows if those are more); and beside that weights
[k, d] and what is kept per sample and class, some arrays [k, n]. Sweeps take slabs of pieces from all over the rows, so
that data that are sorted by class do no harm.

Source: for blocks that fit the memory, Yu et al., KDD 2010.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualxda_jax.svm import block, coordinate, driver, resident, surveys, working_set
from dualxda_jax.svm import rounds as rounds_of
from dualxda_jax.svm.config import SolverConfig
from dualxda_jax.svm.driver import Answer, Data, problem_from
from dualxda_jax.svm.inputs import Start, device_limit
from dualxda_jax.svm.problem import (
    Array,
    from_coefficients,
    normalised,
    one_hot_of,
    primal_and_gap,
    relative,
    to_coefficients,
    weights_of,
)
from dualxda_jax.svm.working_set import SolverState

# Rows that a slab takes from one place: as many as make reading from a file worth while.
PIECE = 256
# Bytes of a number in the two copies that Newton's method works with, at most.
COPIES = 16
LEAST_ROWS = 64

Places = np.ndarray


def most_rows(data: Data, config: SolverConfig) -> int:
    """Rows that a block may have."""
    d, item = data.features.shape[1], data.features.dtype.itemsize
    copies = COPIES * d if config.method == "newton" else block.row_bytes(d + 1, data.features.dtype)
    return _rows_for(data, config, item * d + copies)


def _rows_for(data: Data, config: SolverConfig, row_bytes: int) -> int:
    n, limit = data.features.shape[0], device_limit(config)
    return n if limit is None else min(n, max(limit // row_bytes, LEAST_ROWS))


def _slabs(data: Data, config: SolverConfig, *, spread: bool) -> Iterator[tuple[Array, Places]]:
    """All rows, as (features [m, d], places [m]); places of n fill up the last slab."""
    n = data.features.shape[0]
    rows = _rows_for(data, config, 2 * data.features.dtype.itemsize * data.features.shape[1])
    piece = min(PIECE, rows) if spread else rows
    pieces, each = -(-n // piece), rows // piece
    count = -(-pieces // each)
    for j in range(count):
        firsts = np.arange(j, pieces, count) if spread else np.arange(j * each, min((j + 1) * each, pieces))
        places = (firsts[:, None] * piece + np.arange(piece)[None, :]).reshape(-1)
        places = np.minimum(np.pad(places, (0, each * piece - places.size), constant_values=n), n).astype(np.int32)
        yield _to_device(data, places), places


def _to_device(data: Data, places: Places) -> Array:
    """Rows [m, d] on the device; for places of n any."""
    host: Any = data.features
    rows = np.take(host, np.minimum(places, host.shape[0] - 1), axis=0)
    # float64 rows where x64 is off.
    return jax.device_put(rows.astype(data.costs.dtype) if rows.dtype == np.float64 else rows)


def _fold(
    data: Data, config: SolverConfig, body: Callable[[Data, Places, Any], Any], carry: Any, *, spread: bool = False
) -> Any:
    """`body(data with the features of a slab, places, carry)` over all slabs, the next one read meanwhile."""
    slabs = _slabs(data, config, spread=spread)
    arriving = next(slabs, None)
    while arriving is not None:
        features, places = arriving
        carry = body(data._replace(features=features), places, carry)
        arriving = next(slabs, None)
        jax.block_until_ready(carry)
    return carry


def _part(slab: Data, places: Array) -> Data:
    """A slab with its own labels and costs; what fills it up has no cost."""
    n = slab.labels.shape[0]
    at = jnp.minimum(places, n - 1)
    costs = jnp.where(places < n, slab.costs[at], jnp.zeros((), slab.costs.dtype))
    return Data(slab.features, slab.labels[at], costs, slab.margin)


def _columns(q: Array, places: Array) -> Array:
    return q[:, jnp.minimum(places, q.shape[1] - 1)]


def sweep(data: Data, weights: Array, q: Array, *, num_classes: int, config: SolverConfig) -> coordinate.Swept:
    """A sweep over all samples, slab by slab."""
    none = jnp.zeros((), weights.dtype), jnp.asarray(0, jnp.int32)
    body = functools.partial(_sweep, num_classes=num_classes, config=config)
    return _fold(data, config, body, coordinate.Swept(weights, q, *none), spread=True)


@functools.partial(jax.jit, static_argnames=("num_classes", "config"), donate_argnames="carry")
def _sweep(
    slab: Data, places: Array, carry: coordinate.Swept, *, num_classes: int, config: SolverConfig
) -> coordinate.Swept:
    problem = problem_from(_part(slab, places), num_classes, config)
    swept = rounds_of.sweep_all(problem, carry.weights, _columns(carry.simplex, places))
    q = carry.simplex.at[:, places].set(swept.simplex, mode="drop")
    return coordinate.Swept(swept.weights, q, carry.slack + swept.slack, carry.moved + swept.moved)


def on_grid(data: Data, state: SolverState, *, num_classes: int, config: SolverConfig) -> SolverState:
    """The state with dual variables that the dtype of the result holds exactly."""
    return _fold(data, config, functools.partial(_on_grid, num_classes=num_classes, config=config), state)


@functools.partial(jax.jit, static_argnames=("num_classes", "config"))
def _on_grid(slab: Data, places: Array, state: SolverState, *, num_classes: int, config: SolverConfig) -> SolverState:
    problem = problem_from(_part(slab, places), num_classes, config)
    return rounds_of.on_grid(problem, state, slab.costs.dtype, places)


def weights(data: Data, q: Array, *, num_classes: int, config: SolverConfig) -> Array:
    """[k, D] W(α) in float64."""
    d = data.features.shape[1] + (config.intercept_scaling != 0.0)
    body = functools.partial(_weights, q, config=config)
    return _fold(data, config, body, jnp.zeros((num_classes, d), jnp.float64))


@functools.partial(jax.jit, static_argnames=("config",))
def _weights(q: Array, slab: Data, places: Array, total: Array, *, config: SolverConfig) -> Array:
    problem = problem_from(_part(slab, places), q.shape[0], config)
    return total + weights_of(problem, _columns(q, places))


def _survey(
    data: Data, weights: Array, q: Array, config: SolverConfig, *, assign: bool, exact: bool, precise: bool
) -> dict[str, Array]:
    """`surveys.survey`, and the norms."""
    n = q.shape[1]
    nothing = jnp.zeros_like(weights), jnp.zeros((), weights.dtype), jnp.zeros((), weights.dtype)
    first = q, jnp.zeros(n, jnp.float32), jnp.zeros(n, jnp.float32), *nothing
    body = functools.partial(_look, weights, config=config, assign=assign, exact=exact, precise=precise)
    q, lead, norms, made, loss, slack = _fold(data, config, body, first)
    primal = 0.5 * jnp.sum(weights * weights) + loss
    made = weights if exact else made
    return {"simplex": q, "lead": lead, "norms": norms, "made": made, "primal": primal, "slack": slack}


@functools.partial(jax.jit, static_argnames=("config", "assign", "exact", "precise"))
def _look(
    weights: Array, slab: Data, places: Array, carry: Any, *,
    config: SolverConfig, assign: bool, exact: bool, precise: bool,
) -> Any:  # fmt: skip
    q, lead, norms, made, loss, slack = carry
    problem = problem_from(_part(slab, places), q.shape[0], config)
    low = rounds_of.lowered(problem, None if precise else jnp.float32)
    seen = surveys.survey(low, weights, _columns(q, places), assign=assign, exact=exact)
    if assign:
        q = q.at[:, places].set(seen["simplex"], mode="drop")
    return (
        q,
        lead.at[places].set(seen["lead"], mode="drop"),
        norms.at[places].set(surveys.norms_of(low), mode="drop"),
        made if exact else made + seen["made"],
        loss + seen["primal"] - 0.5 * jnp.sum(weights * weights),
        slack + seen["slack"],
    )


def _begin(
    data: Data, q: Array, weights: Array, visits: Array, config: SolverConfig, penalty: Array | None, *,
    assign: bool, exact: bool, precise: bool = True,
) -> SolverState:  # fmt: skip
    """The state after a first survey, with the softest penalty where none is given."""
    seen = _survey(data, weights, q, config, assign=assign, exact=exact, precise=precise)
    curvature = jnp.max(data.costs.astype(jnp.float64) * seen["norms"].astype(jnp.float64) ** 2)
    soft = working_set.softest(curvature, config)
    penalty = soft if penalty is None else penalty
    first = penalty if config.method == "coordinate" else soft
    return SolverState(
        weights=weights,
        penalty=penalty,
        first_penalty=first,
        visits=visits + float(q.shape[1]),
        samples=jnp.full_like(visits, q.shape[1]),
        method=config.method,
        **seen,
    )


def state_at(
    data: Data, q: Array, visits: Array, *, num_classes: int, config: SolverConfig, precise: bool
) -> SolverState:
    """The state at q, surveyed in float64 or in float32."""
    q = normalised(q, jnp.float64)
    at = weights(data, q, num_classes=num_classes, config=config)
    none = jnp.zeros((), jnp.float64)
    return _begin(data, q, at, visits, config, none, assign=False, exact=True, precise=precise)


def refined(data: Data, state: SolverState, *, num_classes: int, config: SolverConfig) -> SolverState:
    """A state that float32 or Newton's method left, in float64 and with W(α)."""
    visits = state.visits + state.samples
    return state_at(data, state.simplex, visits, num_classes=num_classes, config=config, precise=True)


def handed_over(data: Data, state: SolverState, *, num_classes: int, config: SolverConfig) -> SolverState:
    """A state by coordinates as Newton's method takes it."""
    return _begin(data, state.simplex, state.weights, state.visits, config, None, assign=False, exact=False)


def surveyed(
    data: Data, weights: Array, penalty: Array, visits: Array, *, num_classes: int, config: SolverConfig
) -> SolverState:
    """The state at W with every sample on the class that leads there."""
    q = jnp.zeros((num_classes, data.features.shape[0]), jnp.float64)
    return _begin(data, q, weights, visits, config, penalty, assign=True, exact=False)


def first_state(
    data: Data, start: Start | None, *, num_classes: int, config: SolverConfig, precise: bool = True
) -> SolverState:
    """From a solution (its dual variables or what its weights say, as in `driver`), or from zero; always in float64."""
    del precise
    d, none = data.features.shape[1], jnp.zeros((), jnp.float64)
    exact = config.method == "coordinate"
    if start is None:
        at = jnp.zeros((num_classes, d + (config.intercept_scaling != 0.0)), jnp.float64)
        q = one_hot_of(data.labels, num_classes, jnp.float64)
        return _begin(data, q, at, none, config, none if exact else None, assign=False, exact=exact)
    q = from_coefficients(start.coefficients.astype(jnp.float64), data.labels, data.costs.astype(jnp.float64))
    if exact:
        return state_at(data, q, none, num_classes=num_classes, config=config, precise=True)
    at = start.weights.astype(jnp.float64)
    kept = _begin(data, q, at, none, config, None, assign=False, exact=False)
    led = _begin(data, q, at, kept.visits, config, None, assign=True, exact=False)
    return led if float(led.gap) < float(kept.gap) else kept


def picked(data: Data, places: Places) -> Data:
    """Some rows, at costs scaled up to weigh as much as all of them."""
    features = _to_device(data, places)
    return _weighed(data._replace(features=features), jnp.asarray(places))


_weighed = jax.jit(lambda data, places: resident.weighed(data, data.features, places))


def sampled(data: Data, *, num_classes: int, config: SolverConfig, size: int) -> tuple[Array, Array, Array]:
    """W, penalty and visits from about `size` rows."""
    part = picked(data, working_set.sample_places(data.features.shape[0], size))
    return resident.sampled(part, num_classes=num_classes, config=config, size=size)


def one_round(
    data: Data, state: SolverState, target: Array, *, size: int, config: SolverConfig, precise: bool
) -> tuple[SolverState, Array, Array]:
    """A round, and what the host decides by: the relative gap, and how many samples are undecided."""
    index, there = _choose(data.costs, state, size=size, config=config)
    rows = data._replace(features=_to_device(data, np.asarray(index)))
    state = _settle(rows, state, index, there, target, config=config, precise=precise)
    del rows
    exact = config.method == "coordinate"
    seen = _survey(data, state.weights, state.simplex, config, assign=False, exact=exact, precise=precise)
    return _after(state, seen)


@functools.partial(jax.jit, static_argnames=("size", "config"))
def _choose(costs: Array, state: SolverState, *, size: int, config: SolverConfig) -> tuple[Array, Array]:
    if config.method == "coordinate":
        return block.choose(costs, state, size, config)
    return working_set.least_decided(costs, state, size)


@functools.partial(jax.jit, static_argnames=("config", "precise"))
def _settle(
    rows: Data, state: SolverState, index: Array, there: Array, target: Array, *, config: SolverConfig, precise: bool
) -> SolverState:
    problem = problem_from(_part(rows, index), state.weights.shape[0], config)
    every = jnp.arange(index.shape[0], dtype=jnp.int32)
    if config.method == "coordinate":
        dtype = block.sweep_dtype(problem, jnp.float64 if precise else jnp.float32)
        return block.settle(block.gather(problem, every, there, dtype), state, index, there, target, config)
    gathered = working_set.gather(problem, every, there, state.made)
    return working_set.settle(problem, gathered, state, index, target, config)


@jax.jit
def _after(state: SolverState, seen: dict[str, Array]) -> tuple[SolverState, Array, Array]:
    state = rounds_of.looked_at(state, seen)
    return state, relative(state.gap, state.primal), state.undecided


def certified(data: Data, state: SolverState, *, config: SolverConfig) -> Answer:
    """The coefficients of a state with their certificate."""
    dtype, k = data.costs.dtype, state.weights.shape[0]
    coefficients, q = _rounded(data.labels, data.costs, state.simplex, dtype=dtype)
    at = weights(data, q, num_classes=k, config=config)
    zero = jnp.zeros((), jnp.float64)
    plain = data._replace(margin=jnp.ones_like(data.margin))
    body = functools.partial(_certify, at, q, config=config)
    loss, gap = _fold(plain, config, body, (zero, zero))
    primal = 0.5 * jnp.sum(at * at) + loss
    return driver.Certificate(coefficients, at, primal, gap).answer(state.epochs + 2, config)


@functools.partial(jax.jit, static_argnames=("dtype",))
def _rounded(labels: Array, costs: Array, q: Array, *, dtype: Any) -> tuple[Array, Array]:
    costs = costs.astype(jnp.float64)
    coefficients = to_coefficients(q, labels, costs, dtype)
    return coefficients, from_coefficients(coefficients.astype(jnp.float64), labels, costs)


@functools.partial(jax.jit, static_argnames=("config",))
def _certify(
    weights: Array, q: Array, slab: Data, places: Array, carry: tuple[Array, Array], *, config: SolverConfig
) -> tuple[Array, Array]:
    problem = problem_from(_part(slab, places), q.shape[0], config)
    primal, gap = primal_and_gap(problem, weights, _columns(q, places))
    return carry[0] + primal - 0.5 * jnp.sum(weights * weights), carry[1] + gap
