"""Rows spread over a mesh: the same answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dualxda_jax import svm

N, D, K = 1600, 8, 3


def make(rng):
    labels = rng.integers(0, K, N).astype(np.int32)
    features = np.maximum(rng.normal(size=(K, D))[labels] + 0.7 * rng.normal(size=(N, D)), 0.0)
    return features.astype(np.float32), labels


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("wrap", ["eager", "jit"])
def test_equals_unsharded(rng, kind, wrap):
    features, labels = make(rng)
    config = svm.SolverConfig(tolerance=1e-6, block=64)
    fit = lambda f, y: svm.solve(f, y, num_classes=K, cost=1e-3, config=config)  # noqa: E731
    expected = fit(features, labels)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        spread = jax.device_put((features, labels), NamedSharding(mesh, PartitionSpec("data")))
        got = (jax.jit(fit) if wrap == "jit" else fit)(*spread)
    assert bool(got.info.converged)
    np.testing.assert_allclose(got.info.dual, expected.info.dual, rtol=3e-6)
    np.testing.assert_allclose(got.weights, expected.weights, atol=3e-3 * float(jnp.abs(expected.weights).max()))
