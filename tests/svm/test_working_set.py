"""Working sets: the same answer from few samples at a time."""

import jax.numpy as jnp
import numpy as np

from dualxda_jax import svm
from dualxda_jax.svm import working_set


def test_more_samples_than_are_solved_at_once(rng):
    n = working_set.SMALL + 900
    labels = rng.integers(0, 3, n).astype(np.int32)
    centres = 1.5 * rng.normal(size=(3, 6))
    features = jnp.asarray(np.maximum(centres[labels] + 0.8 * rng.normal(size=(n, 6)), 0.0), jnp.float32)
    for cost in (1e-6, 1e-3, 1e-1):
        solution = svm.solve(features, labels, num_classes=3, cost=cost)
        assert bool(solution.info.converged)
        primal, dual = svm.objectives(features, labels, solution.coefficients, num_classes=3, cost=cost)
        assert primal - dual <= 1.001e-4 * primal
        alpha = np.asarray(solution.coefficients, np.float64)
        at_label = alpha[np.arange(n), labels]
        assert (at_label >= 0).all() and (at_label <= cost * (1 + 1e-6)).all()
        np.testing.assert_allclose(alpha.sum(axis=1), 0.0, atol=1e-6 * cost)
