"""The smoothed problem: by hand, against another solver, certified, and differentiable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from dualxda_jax import svm

N, D, K = 60, 7, 4


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, K, N).astype(np.int32)
    return rng.normal(size=(K, D))[labels] + 0.7 * rng.normal(size=(N, D)), labels


@pytest.mark.usefixtures("x64")
def test_one_sample_by_hand():
    # Two classes and one sample: q at the other class is (1 + γ) / (2 γ + 2 C ‖φ‖²), cut to 0..1.
    features, cost, gamma = np.array([[1.0, 2.0]]), 0.3, 0.8
    given = {"num_classes": 2, "cost": cost, "smoothing": gamma}
    solution = svm.solve(features, np.array([0]), config=svm.SolverConfig(tolerance=1e-10), **given)
    q = (1.0 + gamma) / (2.0 * gamma + 2.0 * cost * 5.0)
    np.testing.assert_allclose(solution.coefficients, [[cost * q, -cost * q]], rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("gamma", [0.1, 1.0])
def test_against_scipy_on_the_primal(problem, gamma):
    features, labels = problem
    config = svm.SolverConfig(tolerance=1e-10)
    solution = svm.solve(features, labels, num_classes=K, cost=0.1, smoothing=gamma, config=config)
    assert bool(solution.info.converged)

    def primal(flat):
        weights = flat.reshape(K, D)
        z = features @ weights.T
        mine = z[np.arange(N), labels]
        z = z + 1.0 - np.eye(K)[labels]
        ordered = -np.sort(-z / gamma, axis=1)
        shifts = (np.cumsum(ordered, axis=1) - 1.0) / np.arange(1, K + 1)
        last = (ordered > shifts).sum(axis=1) - 1
        p = np.maximum(z / gamma - shifts[np.arange(N), last][:, None], 0.0)
        loss = np.sum(p * z, axis=1) - mine - 0.5 * gamma * (np.sum(p * p, axis=1) - 1.0)
        slope = weights + 0.1 * (p - np.eye(K)[labels]).T @ features
        return 0.5 * np.sum(weights**2) + 0.1 * loss.sum(), slope.ravel()

    found = optimize.minimize(
        primal, np.zeros(K * D), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}
    )
    np.testing.assert_allclose(solution.info.primal, found.fun, rtol=1e-8)
    np.testing.assert_allclose(solution.weights, found.x.reshape(K, D), atol=1e-4)
    given = {"num_classes": K, "cost": 0.1, "smoothing": gamma}
    both = svm.objectives(features, labels, solution.coefficients, **given)
    np.testing.assert_allclose(both, (solution.info.primal, solution.info.dual), rtol=1e-9)
    inside = jax.jit(lambda a: svm.objectives(jnp.asarray(features), jnp.asarray(labels), a, **given))
    np.testing.assert_allclose(inside(solution.coefficients), both, rtol=1e-9)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_no_smoothing_is_its_limit_and_rows_sum_to_zero(problem, wrap):
    features, labels = jnp.asarray(problem[0], jnp.float32), problem[1]
    fit = wrap(lambda gamma: svm.solve(features, labels, num_classes=K, cost=0.1, smoothing=gamma))
    plain = svm.solve(features, labels, num_classes=K, cost=0.1)
    near, some = fit(1e-5), fit(1.0)
    assert bool(near.info.converged) and bool(some.info.converged)
    np.testing.assert_allclose(near.info.primal, plain.info.primal, rtol=1e-3)
    for solution in (plain, near, some):
        np.testing.assert_array_equal(np.asarray(solution.coefficients, np.float64).sum(axis=1), 0.0)


def test_more_free_samples_than_the_working_set_holds():
    # What is certified is what is returned, in rows that sum to zero, whatever part of the samples fits at once.
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 20, 1500).astype(np.int32)
    features = (rng.normal(size=(20, 30))[labels] + rng.normal(size=(1500, 30))).astype(np.float32)
    config = svm.SolverConfig(block=128)
    solution = svm.solve(features, labels, num_classes=20, cost=1e-2, smoothing=1.0, config=config)
    alpha = np.asarray(solution.coefficients, np.float64)
    assert np.sum(np.sum(alpha != 0.0, axis=1) > 2) > 200 and bool(solution.info.converged)
    np.testing.assert_array_equal(alpha.sum(axis=1), 0.0)
    given = {"num_classes": 20, "cost": np.float32(1e-2), "smoothing": 1.0}
    primal, dual = svm.objectives(features, labels, solution.coefficients, **given)
    np.testing.assert_allclose((primal - dual) / primal, solution.info.gap, rtol=1e-3)


@pytest.mark.usefixtures("x64")
def test_derivatives_by_central_differences(problem):
    features, labels = jnp.asarray(problem[0]), jnp.asarray(problem[1])
    rng, config = np.random.default_rng(1), svm.SolverConfig(tolerance=1e-13)
    direction = jnp.asarray(rng.normal(size=(K, D)))

    def of(features, cost, gamma):
        given = {"num_classes": K, "cost": cost, "smoothing": gamma, "config": config}
        return jnp.vdot(direction, svm.solve(features, labels, **given).weights)

    at = (features, jnp.full(N, 0.1), jnp.asarray(0.7))
    found, value = jax.jit(jax.grad(of, argnums=(0, 1, 2)))(*at), jax.jit(of)
    for i, gradient in enumerate(found):
        along = jnp.asarray(rng.normal(size=at[i].shape))
        high, low = (value(*at[:i], at[i] + h * along, *at[i + 1 :]) for h in (1e-5, -1e-5))
        np.testing.assert_allclose(jnp.sum(gradient * along), (high - low) / 2e-5, rtol=2e-3)


def test_other_numbers_compile_nothing(problem):
    features, labels = np.asarray(problem[0], np.float32), problem[1]
    compiled = []
    listen = lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    given = {"num_classes": K}
    jax.clear_caches()
    svm.solve(features, labels, cost=1e-2, **given)
    assert 0 < len(compiled) <= 4
    compiled.clear()
    svm.solve(features, labels, cost=1e-1, **given)
    svm.solve(features, labels, cost=1e-2, smoothing=0.5, **given)
    svm.solve(features, labels, cost=1e-2, config=svm.SolverConfig(tolerance=1e-3, max_epochs=777), **given)
    svm.solve(features[:58], labels[:58], cost=1e-2, **given)
    assert compiled == []


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), np.ones(3), "a"])
def test_bad_smoothing(problem, bad):
    features, labels = np.asarray(problem[0], np.float32), problem[1]
    with pytest.raises(ValueError, match="smoothing: got"):
        svm.solve(features, labels, num_classes=K, cost=1e-2, smoothing=bad)
