"""Many costs at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import svm


def example(rng):
    labels = rng.integers(0, 4, 60).astype(np.int32)
    features = np.maximum(rng.normal(size=(4, 7))[labels] + 0.7 * rng.normal(size=(60, 7)), 0.0)
    return features.astype(np.float32), labels


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_path_is_in_the_order_of_the_costs(rng, wrap):
    features, labels = example(rng)
    costs = [1e-2, 1e-6, 1e-1]
    path = wrap(lambda f: svm.solve_path(f, labels, num_classes=4, costs=costs))(jnp.asarray(features))
    assert path.coefficients.shape == (3, 60, 4) and path.info.gap.shape == (3,)
    assert np.asarray(path.info.converged).all()
    for i, cost in enumerate(costs):
        primal, dual = svm.objectives(features, labels, path.coefficients[i], num_classes=4, cost=cost)
        assert primal - dual <= 1.001e-4 * primal


def test_bad_costs(rng):
    features, labels = example(rng)
    for costs, message in ((0.1, "costs: got shape"), ([], "costs: got shape"), ([0.1, -1.0], "positive and finite")):
        with pytest.raises(ValueError, match=message):
            svm.solve_path(features, labels, num_classes=4, costs=costs)
