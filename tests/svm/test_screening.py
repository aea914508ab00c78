"""What screening leaves out could not have mattered."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import svm
from dualxda_jax.svm import SolverConfig, driver, problem, rounds, screening

N, D, K = 400, 6, 4
CONFIG = SolverConfig(method="coordinate", block=32, chunk=64, intercept_scaling=0.5)


@pytest.fixture
def data(rng):
    labels = rng.integers(0, K, N).astype(np.int32)
    centres = 2.0 * rng.normal(size=(K, D))
    features = np.maximum(centres[labels] + rng.normal(size=(N, D)), 0.0).astype(np.float32)
    costs = np.where(rng.random(N) < 0.2, 0.0, 0.01).astype(np.float32)
    return driver.Data(jnp.asarray(features), jnp.asarray(labels), jnp.asarray(costs), jnp.ones((), jnp.float64))


def state_of(data, passes=3):
    """Where a solve stands that is not at its end."""
    whole = driver.problem_from(data, K, CONFIG)
    q = problem.one_hot_of(data.labels, K, jnp.float64)
    weights = jnp.zeros((K, D + 1))
    for _ in range(passes):
        swept = rounds.sweep_all(whole, weights, q)
        weights, q = swept.weights, swept.simplex
    return whole, rounds.state_at(whole, q, jnp.zeros(()), CONFIG)


def leads(whole, weights, q):
    return screening.surveys.survey(whole, weights, q, assign=False, exact=True)["lead"]


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0])
def test_aged_leads_are_a_bound(rng, x64, data, size):
    whole, state = state_of(data)
    for _ in range(5):
        weights = state.weights + size * rng.normal(size=state.weights.shape)
        bound, true = screening.aged(state, weights), leads(whole, weights, state.simplex)
        single = np.asarray(state.lead) >= 0
        assert (np.asarray(bound)[single] <= np.asarray(true)[single]).all()
        if size < 0.1:  # and not an empty one
            assert np.mean(np.asarray(bound) > 0) > 0.3
        # Another margin moves every sample's scores by at most as much.
        wider = leads(dataclasses.replace(whole, margin=whole.margin + 1e-3), weights, state.simplex)
        allowed = screening.aged(state, weights, 1e-3)
        assert (np.asarray(allowed)[single] <= np.asarray(wider)[single]).all()


@pytest.mark.parametrize("passes", [1, 40])
def test_a_screened_round_sees_what_a_full_one_sees(x64, data, passes):
    whole, state = state_of(data, passes)
    target = jnp.asarray(1e-6)
    full, some = (rounds.step(whole, state, target, 64, CONFIG, screened=s) for s in (False, True))
    for name in ("weights", "simplex", "primal", "slack"):
        np.testing.assert_allclose(getattr(some, name), getattr(full, name), rtol=1e-11, atol=1e-13)
    assert (np.asarray(some.lead) <= np.asarray(full.lead) + 1e-6).all()
    np.testing.assert_array_equal(np.asarray(some.lead) < 0, np.asarray(full.lead) < 0)
    if passes == 40:
        assert float(some.visits) < float(full.visits)


def test_the_certificate_does_not_depend_on_screening(x64, data):
    whole, state = state_of(data, 6)
    state = rounds.step(whole, state, jnp.asarray(1e-6), 64, CONFIG, screened=True)
    for dtype in (jnp.float32, jnp.float64):
        given = whole, state, CONFIG, dtype
        for some, full in zip(driver.certificate(*given, screened=True), driver.certificate(*given), strict=True):
            np.testing.assert_allclose(some, full, rtol=1e-10, atol=1e-14)


def test_nothing_is_overlooked_where_numbers_are_missing(x64, data):
    whole, state = state_of(data)
    spoiled = dataclasses.replace(whole, features=whole.features.at[3, 2].set(jnp.nan))
    state = rounds.state_at(spoiled, state.simplex, state.visits, CONFIG, screened=True)
    assert np.isnan(float(driver.certificate(spoiled, state, CONFIG, jnp.float32, screened=True).primal))
    assert np.isnan(float(rounds.step(spoiled, state, jnp.asarray(1e-6), 64, CONFIG, screened=True).gap))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_weights_of_those_that_have_a_say(rng, x64, data, share):
    whole = driver.problem_from(data, K, CONFIG)
    q = problem.one_hot_of(data.labels, K, jnp.float64)
    some = jnp.asarray(rng.random(N) < share)
    q = jnp.where(some[None, :], jnp.asarray(rng.dirichlet(np.ones(K), N).T), q)
    np.testing.assert_allclose(
        jax.jit(screening.weights_of)(whole, q), problem.weights_of(whole, q), rtol=1e-12, atol=1e-14
    )


def test_samples_without_a_cost_are_never_undecided(rng, x64):
    features = jnp.asarray(rng.normal(size=(80, 5)))
    labels, costs = jnp.asarray(rng.integers(0, 3, 80), jnp.int32), jnp.asarray(np.arange(80) % 2 * 0.1)
    given = {"num_classes": 3, "cost": costs, "config": SolverConfig(method="coordinate", tolerance=1e-8)}
    state = svm.init(features, labels, **given)
    # At zero every sample violates its margin.
    assert int(state.undecided) == 40
    for _ in range(3):
        state, _ = svm.step(state, features, labels, **given)
        assert not np.any(np.asarray(state.lead)[::2] < 0.0)


@pytest.mark.usefixtures("x64")
def test_the_margin_leaves_room_within_the_tolerance():
    config = svm.SolverConfig(tolerance=1e-3)
    excess = [float(driver.margin_for(slack, config, jnp.float32)) - 1.0 for slack in range(9)]
    assert excess[0] == 0.0 and np.all(np.diff(excess) >= 0.0)
    # The gap widens by twice the excess.
    assert 0.8e-3 <= 2.0 * excess[-1] < 1e-3
