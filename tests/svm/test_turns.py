"""Coordinates and Newton's method in turns: where one gets nowhere the other goes on, and none is given up too soon."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import svm
from dualxda_jax.svm import block


@functools.partial(jax.jit, static_argnames=("num_classes", "config"))
def compiled(features, labels, cost, init=None, *, num_classes, config):
    return svm.solve(features, labels, num_classes=num_classes, cost=cost, config=config, init=init)


def eager(features, labels, cost, init=None, **given):
    return svm.solve(features, labels, cost=cost, init=init, **given)


WAYS = pytest.mark.parametrize("solve", [eager, compiled], ids=["eager", "jit"])


def overlapping(n, d, k, seed, separation):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n).astype(np.int32)
    centres = rng.normal(size=(k, d)) * separation
    return (centres[labels] + rng.normal(size=(n, d))).astype(np.float32), labels


def true_gap(solution, features, labels, cost, weights):
    """The relative gap of the coefficients and any weights, in float64."""
    x, w = features.astype(np.float64), np.asarray(weights, np.float64)
    z = x @ w.T
    mine = z[np.arange(len(x)), labels]
    z += 1.0 - np.eye(w.shape[0])[labels]
    primal = 0.5 * np.sum(w**2) + cost * np.sum(z.max(axis=1) - mine)
    _, dual = svm.objectives(features, labels, solution.coefficients, num_classes=w.shape[0], cost=cost)
    return (primal - dual) / primal


@pytest.mark.usefixtures("x64")
def test_a_block_with_room_for_all_takes_the_least_decided():
    features, labels = overlapping(600, 5, 3, 0, 0.5)
    config = svm.SolverConfig(method="coordinate")
    state = svm.init(features, labels, num_classes=3, cost=0.1, config=config)
    lead = np.where(np.arange(600) < 550, 5.0, -1.0).astype(np.float32)
    state = dataclasses.replace(state, lead=jnp.asarray(lead))
    index, there = block.choose(jnp.full(600, 0.1), state, 600, config)
    chosen = np.asarray(index)[np.asarray(there)]
    assert set(range(550, 600)) <= set(chosen.tolist()) and len(chosen) == len(set(chosen.tolist())) < 600


@WAYS
def test_poor_rounds_near_the_solution_are_not_the_end(solve):
    # From ten times the cost: for four rounds W(α) only settles, at a gap of some 1e-3.
    features, labels = overlapping(1023, 8, 2, 1023, 0.5)
    given = {"num_classes": 2, "config": svm.SolverConfig(method="coordinate")}
    first = svm.solve(features, labels, cost=1.0, **given)
    assert bool(solve(features, labels, 0.1, first, **given).info.converged)


@WAYS
def test_coordinates_make_way_where_most_samples_are_free(solve):
    features, labels = overlapping(600, 20, 5, 1, 0.3)
    config = svm.SolverConfig(method="coordinate", max_epochs=1500)
    assert bool(solve(features, labels, 10.0, num_classes=5, config=config).info.converged)


def test_what_is_out_of_reach_ends_long_before_the_epochs_do():
    # In float32, and with costs at which each rounding of α counts ten thousandfold.
    features, labels = overlapping(200, 6, 3, 0, 0.5)
    config = svm.SolverConfig(method="coordinate", tolerance=1e-7, max_epochs=100_000)
    with pytest.warns(svm.NotConvergedWarning, match="gets no further"):
        solution = svm.solve(features, labels, num_classes=3, cost=1e4, config=config)
    assert float(solution.info.gap) < 1e-2 and int(solution.info.epochs) < 20_000


@WAYS
def test_the_weights_are_as_certain_as_the_coefficients(solve):
    cost, (features, labels) = 1000.0, overlapping(1100, 12, 3, 1100, 0.5)
    config = svm.SolverConfig(method="coordinate", max_epochs=4000)
    solution = solve(features, labels, cost, num_classes=3, config=config)
    assert bool(solution.info.converged)
    assert true_gap(solution, features, labels, cost, solution.weights) <= 1.5e-4
    # Rounding of what is at the labels, 1,000 at most, is all that the two may differ by.
    exact = np.asarray(solution.coefficients, np.float64).T @ features.astype(np.float64)
    np.testing.assert_allclose(solution.weights, exact, atol=5e-7 * cost)


def test_sweeps_of_a_warm_start_count():
    features, labels = overlapping(3000, 8, 4, 0, 0.5)
    given = {"num_classes": 4, "config": svm.SolverConfig(method="coordinate", max_epochs=2)}
    far = svm.solve(features, labels, num_classes=4, cost=1e-6)
    free = compiled(features, labels, 1.0, far, num_classes=4, config=svm.SolverConfig(method="coordinate"))
    with pytest.warns(svm.NotConvergedWarning, match="raise config.max_epochs"):
        few = svm.solve(features, labels, cost=1.0, init=far, **given)
    assert int(few.info.epochs) < int(free.info.epochs)
    assert int(compiled(features, labels, 1.0, far, **given).info.epochs) <= int(few.info.epochs) + 2


def test_by_hand_with_one_step_compiled():
    # "auto" is another method inside of a trace where there are several devices, as here.
    features, labels = overlapping(60, 7, 4, 0, 1.0)
    given = {"num_classes": 4, "cost": 0.1}
    state = svm.init(features, labels, **given)
    step = jax.jit(lambda state: svm.step(state, features, labels, **given))
    for _ in range(30):
        state, info = step(state)
    assert float(info.gap) <= 1e-4
    other = svm.SolverConfig(method="newton")
    with pytest.raises(ValueError, match=r"config\.method: got 'newton', must be 'coordinate'"):
        svm.step(state, features, labels, config=other, **given)


def test_a_state_far_from_the_solution_is_warned_of():
    features, labels = overlapping(60, 7, 4, 0, 1.0)
    given = {"num_classes": 4, "cost": 0.1}
    with pytest.warns(svm.NotConvergedWarning, match="relative duality gap"):
        svm.finish(svm.init(features, labels, **given), features, labels, **given)
