"""Working sets: the same answer from few samples at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import svm
from dualxda_jax.svm import working_set


@pytest.mark.parametrize("method", ["coordinate", "newton"])
def test_more_samples_than_are_solved_at_once(rng, method):
    n, config = 1300, svm.SolverConfig(method=method, block=64)
    labels = rng.integers(0, 3, n).astype(np.int32)
    centres = 1.5 * rng.normal(size=(3, 6))
    features = jnp.asarray(np.maximum(centres[labels] + 0.8 * rng.normal(size=(n, 6)), 0.0), jnp.float32)
    features = features.at[7].set(0.0)
    fit = lambda cost: svm.solve(features, labels, num_classes=3, cost=cost, config=config)  # noqa: E731
    for cost in (1e-6, 1e-3, 1e-1):
        for solve in (fit, jax.jit(fit)):
            solution = solve(jnp.float32(cost))
            assert bool(solution.info.converged)
            primal, dual = svm.objectives(features, labels, solution.coefficients, num_classes=3, cost=np.float32(cost))
            assert primal - dual <= 1.001e-4 * primal
            alpha = np.asarray(solution.coefficients, np.float64)
            at_label = alpha[np.arange(n), labels]
            assert (at_label >= 0).all() and (at_label <= cost * (1 + 1e-6)).all()
            np.testing.assert_allclose(alpha.sum(axis=1), 0.0, atol=1e-6 * cost)


def test_growing_samples_before_the_whole(rng):
    n, config = 3000, svm.SolverConfig(method="newton", block=64)
    labels = np.sort(rng.integers(0, 3, n)).astype(np.int32)
    features = (3.0 * np.eye(3, 5)[labels] + rng.normal(size=(n, 5))).astype(np.float32)
    solution = svm.solve(features, labels, num_classes=3, cost=1e-3, config=config)
    assert bool(solution.info.converged)


@pytest.mark.parametrize(("n", "size"), [(10, 10), (1000, 64), (60000, 4096)])
def test_a_sample_of_places_is_spread_evenly(n, size):
    places = working_set.sample_places(n, size)
    assert places.min() >= 0 and places.max() < n and len(np.unique(places)) == len(places) > 0.6 * size
    gaps = np.diff(np.concatenate([[0], places, [n]]))
    assert gaps.max() <= 4 * n / size
