"""The objectives: float64 whatever comes in, and derivatives by everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import svm

N, D, K = 1500, 5, 3


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, K, N).astype(np.int32)
    alpha = -rng.random((N, K))
    alpha[np.arange(N), labels] = 0.0
    alpha[np.arange(N), labels] = -alpha.sum(axis=1)
    return rng.normal(size=(N, D)), labels, 1e-3 * alpha


def test_float64_of_numpy_stays_float64(given):
    features, labels, alpha = given
    features = features + 1e4
    primal, dual = svm.objectives(features, labels, alpha, num_classes=K, cost=0.1)
    z = features @ (alpha.T @ features).T
    hinge = (z + 1.0 - np.eye(K)[labels]).max(axis=1) - z[np.arange(N), labels]
    norm = 0.5 * np.sum((alpha.T @ features) ** 2)
    np.testing.assert_allclose(primal, norm + 0.1 * hinge.sum(), rtol=1e-10)
    np.testing.assert_allclose(dual, -norm - (alpha.sum() - alpha[np.arange(N), labels].sum()), rtol=1e-10)


@pytest.mark.parametrize("scaling", [0.0, 2.0])
def test_inside_a_trace_as_outside(given, scaling):
    features, labels, alpha = (jnp.asarray(a.astype(t)) for a, t in zip(given, "fif", strict=True))
    objectives = lambda a: svm.objectives(  # noqa: E731
        features, labels, a, num_classes=K, cost=0.1, intercept_scaling=scaling
    )
    np.testing.assert_allclose(jax.jit(objectives)(alpha), objectives(alpha), rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scaling", [0.0, 2.0])
def test_derivatives_by_central_differences(given, scaling):
    features, labels, alpha = map(jnp.asarray, given)
    cost = jnp.asarray(0.1)

    def mixed(features, alpha, cost):
        primal, dual = svm.objectives(features, labels, alpha, num_classes=K, cost=cost, intercept_scaling=scaling)
        return primal - 0.3 * dual

    at = (features, alpha, cost)
    rng = np.random.default_rng(1)
    for i, found in enumerate(jax.grad(mixed, argnums=(0, 1, 2))(*at)):
        along = jnp.asarray(rng.normal(size=at[i].shape)) * (1.0 if i == 0 else 1e-3)
        high, low = (jax.jit(mixed)(*at[:i], at[i] + h * along, *at[i + 1 :]) for h in (1e-6, -1e-6))
        np.testing.assert_allclose(jnp.sum(found * along), (high - low) / 2e-6, rtol=1e-5)


def test_derivatives_where_x64_is_off(given):
    features, labels, alpha = (jnp.asarray(a.astype(t)) for a, t in zip(given, "fif", strict=True))
    by_cost = jax.grad(lambda cost: svm.objectives(features, labels, alpha, num_classes=K, cost=cost)[0])
    found = jax.vmap(by_cost)(jnp.asarray([0.1, 0.2]))
    primal, dual = svm.objectives(features, labels, alpha, num_classes=K, cost=0.1)
    norm = 0.5 * float(jnp.sum((alpha.T @ features) ** 2))
    np.testing.assert_allclose(found, (primal - norm) / 0.1, rtol=1e-4)
    assert found.dtype == jnp.float32 and dual < primal
