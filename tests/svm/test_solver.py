"""The solver certifies, keeps the box, and says what is wrong with bad input."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import svm


def make(rng, n=60, d=7, k=4, scale=1.0):
    labels = rng.integers(0, k, n).astype(np.int32)
    centres = rng.normal(size=(k, d))
    features = np.maximum(centres[labels] + 0.7 * rng.normal(size=(n, d)), 0.0) * scale
    return features.astype(np.float32), labels


def assert_feasible(coefficients, labels, cost):
    alpha = np.asarray(coefficients, np.float64)
    at = np.arange(len(labels))
    off = alpha.copy()
    off[at, labels] = 0.0
    cost = np.broadcast_to(np.float64(cost), len(labels))
    assert (off <= 0).all()
    assert (alpha[at, labels] >= 0).all() and (alpha[at, labels] <= cost * (1 + 1e-6)).all()
    np.testing.assert_allclose(alpha.sum(axis=1), 0.0, atol=1e-6 * max(cost.max(), 1e-30))


@pytest.mark.parametrize("cost", [1e-9, 1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize(("n", "d", "k"), [(60, 7, 4), (20, 50, 3), (40, 5, 2), (1, 3, 5)])
def test_certified_and_feasible(rng, cost, n, d, k):
    features, labels = make(rng, n, d, k)
    solution = svm.solve(features, labels, num_classes=k, cost=cost)
    assert bool(solution.info.converged)
    assert_feasible(solution.coefficients, labels, cost)
    primal, dual = svm.objectives(features, labels, solution.coefficients, num_classes=k, cost=cost)
    assert (primal - dual) <= 1.001e-4 * primal


def test_jit_and_vmap_agree_with_eager(rng):
    features, labels = make(rng)
    features = jnp.asarray(features)
    costs = jnp.asarray([1e-4, 1e-2], jnp.float32)
    fit = lambda cost: svm.solve(features, labels, num_classes=4, cost=cost).weights  # noqa: E731
    eager = np.stack([fit(c) for c in costs])
    for mapped in (jax.vmap(fit), jax.jit(jax.vmap(fit)), jax.vmap(jax.jit(fit))):
        np.testing.assert_allclose(mapped(costs), eager, rtol=0.05, atol=2e-2 * np.abs(eager).max())


def test_out_of_epochs_is_said(rng):
    features, labels = make(rng)
    config = svm.SolverConfig(tolerance=1e-6, max_epochs=3)
    with pytest.warns(svm.NotConvergedWarning, match="raise config.max_epochs"):
        solution = svm.solve(features, labels, num_classes=4, cost=1e-1, config=config)
    assert not bool(solution.info.converged)
    assert float(solution.info.gap) > 1e-6


def test_not_finite_features(rng):
    features, labels = make(rng)
    features[[3, 8], 2] = np.nan, np.inf
    with pytest.raises(ValueError, match="NaN or Inf in 2 of 60 rows, first in rows 3, 8"):
        svm.solve(features, labels, num_classes=4, cost=1e-3)
    solution = jax.jit(lambda f: svm.solve(f, labels, num_classes=4, cost=1e-3))(jnp.asarray(features))
    assert not bool(solution.info.converged)


def test_by_hand(rng):
    features, labels = make(rng)
    given = {"num_classes": 4, "cost": 1e-2}
    state = svm.init(features, labels, **given)
    for _ in range(100):
        state, info = svm.step(state, features, labels, **given)
        if float(info.gap) <= 2e-5:
            break
    solution = svm.finish(state, features, labels, **given)
    assert bool(solution.info.converged)


def test_path_is_in_the_order_of_the_costs(rng):
    features, labels = make(rng)
    costs = [1e-2, 1e-6, 1e-4]
    path = svm.solve_path(features, labels, num_classes=4, costs=costs)
    assert path.coefficients.shape == (3, 60, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, cost in enumerate(costs):
            primal, dual = svm.objectives(features, labels, path.coefficients[i], num_classes=4, cost=cost)
            assert primal - dual <= 1.001e-4 * primal
