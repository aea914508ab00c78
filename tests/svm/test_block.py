"""Coordinate ascent equals the sequential method, and a step on the face never loses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import svm
from dualxda_jax.svm import block, coordinate, face, grouped, problem, simplex, surveys

N, D, K = 150, 6, 4
CONFIG = svm.SolverConfig(method="coordinate", chunk=64)


def make(rng, scale=1.0):
    labels = rng.integers(0, K, N).astype(np.int32)
    features = scale * np.maximum(rng.normal(size=(K, D))[labels] + 0.8 * rng.normal(size=(N, D)), 0.0)
    return features, labels


def pose(rng, cost, scale=1.0):
    features, labels = make(rng, scale)
    costs = cost * rng.uniform(0.5, 1.5, N) * (rng.uniform(size=N) > 0.1)
    data = problem.problem_of(jnp.asarray(features), jnp.asarray(labels), jnp.asarray(costs), K, CONFIG)
    return data, jnp.zeros((K, D)), problem.one_hot_of(data.labels, K, jnp.float64)


def dual(data, q):
    seen = surveys.survey(data, problem.weights_of(data, q), q, assign=False)
    return float(seen["primal"] - seen["slack"])


def nearest(point):
    """The nearest point of the simplex, by sorting."""
    falling = np.sort(point)[::-1]
    level = (np.cumsum(falling) - 1.0) / np.arange(1, len(point) + 1)
    return np.maximum(point - level[falling > level][-1], 0.0)


def one_after_another(data, q, order):
    """The sequential method in NumPy."""
    features, labels, costs, q = (np.array(a) for a in (data.features, data.labels, data.cost, q))
    one_hot = np.eye(K)[labels].T
    weights = (costs * (one_hot - q)) @ features
    for i in order:
        if costs[i] > 0:
            z = weights @ features[i] + (1 - one_hot[:, i])
            pace = 1 / (costs[i] * max(features[i] @ features[i], 1e-30))
            new = nearest(q[:, i] + pace * z)
            weights -= costs[i] * np.outer(new - q[:, i], features[i])
            q[:, i] = new
    return weights, q


@pytest.mark.parametrize("spread", [None, 97])
def test_a_sweep_visits_one_after_another(rng, x64, spread):
    data, weights, q = pose(rng, 0.05)
    order = np.arange(N) * (spread or 1) % N
    # With a negative threshold every sample is visited, and in the order of its chunk.
    swept = jax.jit(coordinate.sweep)(
        data, weights, q, jnp.asarray(-1.0), order=None if spread is None else jnp.asarray(order, jnp.int32)
    )
    expected_weights, expected = one_after_another(data, q, order)
    np.testing.assert_allclose(swept.simplex, expected, atol=1e-10)
    np.testing.assert_allclose(swept.weights, expected_weights, atol=1e-10)
    np.testing.assert_allclose(swept.weights, problem.weights_of(data, swept.simplex), atol=1e-10)


@pytest.mark.parametrize("group", [32, 128, 400])
def test_a_sweep_in_groups_visits_one_after_another(rng, x64, group, monkeypatch):
    # 150 samples: groups that end with them or overlap, and one that is larger.
    monkeypatch.setattr(grouped, "GROUP", group)
    data, weights, q = pose(rng, 0.05)
    block, nothing = grouped.block_of(data, weights), jnp.zeros_like(weights)
    swept = grouped.sweep(block, nothing, q, jnp.asarray(-1.0))
    expected_weights, expected = one_after_another(data, q, range(N))
    np.testing.assert_allclose(swept.simplex, expected, atol=1e-10)
    np.testing.assert_allclose(weights + swept.weights, expected_weights, atol=1e-10)
    # From there on, with the scores of a block that starts there.
    again = grouped.sweep(grouped.block_of(data, swept.weights), nothing, swept.simplex, jnp.asarray(-1.0))
    onwards = grouped.sweep(block, swept.weights, swept.simplex, jnp.asarray(-1.0))
    np.testing.assert_allclose(onwards.simplex, again.simplex, atol=1e-10)
    np.testing.assert_allclose(onwards.slack, again.slack, rtol=1e-9)
    assert int(jnp.sum(again.moved)) == int(jnp.sum(data.cost > 0.0))


def test_rows_that_do_not_count_stay(rng, x64):
    data, weights, q = pose(rng, 0.05)
    data = dataclasses.replace(data, rows=jnp.asarray(70, jnp.int32))
    swept = grouped.sweep(grouped.block_of(data, weights), jnp.zeros_like(weights), q, jnp.asarray(-1.0))
    np.testing.assert_array_equal(swept.simplex[:, 70:], q[:, 70:])
    assert np.any(np.asarray(swept.simplex[:, :70] != q[:, :70]))


@pytest.mark.parametrize("k", [2, 4, 16, 17, 50])
def test_a_step_ends_at_the_nearest_point(rng, x64, k):
    points = rng.dirichlet(np.full(k, 0.3), 200)
    points[:50] = np.eye(k)[rng.integers(0, k, 50)]
    steps = rng.normal(size=(200, k)) * 10.0 ** rng.uniform(-6.0, 1.0, (200, 1))
    stepped = jax.vmap(coordinate._stepped)(jnp.asarray(points), jnp.asarray(steps))
    np.testing.assert_allclose(stepped, simplex.project(jnp.asarray(points + steps)), atol=1e-9)


def test_small_steps_in_float32_keep_their_digits(rng, x64):
    points = rng.dirichlet(np.full(K, 2.0), 100)
    steps = 1e-9 * rng.normal(size=(100, K))
    stepped = jax.vmap(coordinate._stepped)(jnp.asarray(points), jnp.asarray(steps, jnp.float32))
    expected = steps - steps.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(stepped - points, expected, atol=1e-15)


def test_sweeps_in_float32_refine_float64(rng, x64):
    data, _, q = pose(rng, 0.01)
    low = dataclasses.replace(data, features=data.features.astype(jnp.float32), cost=data.cost.astype(jnp.float32))
    exact = dataclasses.replace(data, features=low.features)
    seen, sweep = [], jax.jit(grouped.sweep)
    for _ in range(6):
        weights = problem.weights_of(exact, q)
        seen.append(float(surveys.survey(exact, weights, q, assign=False)["slack"]))
        block, change = grouped.block_of(low, weights), jnp.zeros(weights.shape, jnp.float32)
        for _ in range(40):
            swept = sweep(block, change, q, jnp.asarray(0.0, jnp.float32))
            change, q = swept.weights, swept.simplex
        assert change.dtype == jnp.float32 and q.dtype == jnp.float64
    # Far beyond what scores in float32 could tell.
    assert seen[-1] < 1e-9 * seen[0]


def test_sweeps_and_steps_only_gain(rng, x64):
    data, weights, q = pose(rng, 0.3, scale=3.0)
    block, change = grouped.block_of(data, weights), jnp.zeros_like(weights)
    sweep, improve = jax.jit(grouped.sweep), jax.jit(face.improve, static_argnums=3)
    value, gained = dual(data, q), 0
    for _ in range(12):
        swept = sweep(block, change, q, jnp.asarray(0.0))
        after = dual(data, swept.simplex)
        assert after >= value - 1e-12
        change, q, _ = improve(block, swept.weights, swept.simplex, K * D)
        value = dual(data, q)
        assert value >= after - 1e-12
        gained += value > after + 1e-9
        np.testing.assert_allclose(weights + change, problem.weights_of(data, q), atol=1e-9)
        np.testing.assert_allclose(q.sum(axis=0), 1.0, atol=1e-12)
        assert float(q.min()) >= 0.0
    assert gained > 3


def test_flat_directions_are_followed_to_the_border(rng, x64):
    # 40 samples in two dimensions, all on all classes: far more is free than W has room for.
    data, _, _ = pose(rng, 1.0)
    data = dataclasses.replace(data, features=data.features[:, :2] * 30.0, offset=jnp.zeros((K, 2)))
    q = jnp.full((K, N), 1.0 / K)
    before, weights = dual(data, q), problem.weights_of(data, q)
    change, new, _ = jax.jit(face.improve, static_argnums=3)(
        grouped.block_of(data, weights), jnp.zeros_like(weights), q, 2 * K
    )
    assert dual(data, new) > before
    assert int(jnp.sum(new == 0.0)) > 0
    np.testing.assert_allclose(weights + change, problem.weights_of(data, new), atol=1e-8)


def test_dual_variables_on_a_grid(rng, x64):
    data, weights, q = pose(rng, 0.05)
    for _ in range(3):
        swept = coordinate.sweep(data, weights, q, jnp.asarray(0.0), grid=jnp.float32)
        weights, q = swept.weights, swept.simplex
    others = np.asarray(data.cost[None, :] * q * (1.0 - problem.one_hot_of(data.labels, K, jnp.float64)))
    np.testing.assert_allclose(others.astype(np.float32), others, rtol=1e-15)
    assert (others > 0).any()


@pytest.mark.parametrize("method", ["coordinate", "newton"])
def test_both_methods_find_the_same(rng, x64, method):
    features, labels = make(rng)
    given = {"num_classes": K, "cost": 0.02}
    config = svm.SolverConfig(method=method, tolerance=1e-10, block=32)
    solution = svm.solve(features, labels, config=config, **given)
    assert bool(solution.info.converged)
    reference = svm.solve(features, labels, config=svm.SolverConfig(tolerance=1e-10), **given)
    np.testing.assert_allclose(solution.weights, reference.weights, atol=2e-4)
    np.testing.assert_allclose(solution.info.dual, reference.info.dual, rtol=1e-9)


def test_float64_features_beyond_float32(rng, x64):
    features, labels = make(rng, 1e25)
    solution = svm.solve(features, labels, num_classes=K, cost=1e-52)
    assert bool(solution.info.converged)


@pytest.mark.parametrize(("undecided", "held"), [(10, 256), (400, 480), (2000, 1024)])
def test_a_block_holds_what_there_is_to_decide(rng, undecided, held):
    n = 2000
    labels = jnp.asarray(rng.integers(0, K, n).astype(np.int32))
    state = svm.init(jnp.asarray(rng.normal(size=(n, D)), jnp.float32), labels, num_classes=K, cost=1.0, config=CONFIG)
    which = rng.permutation(n)[:undecided]
    lead = jnp.ones(n, jnp.float32).at[which].set(-1.0)
    state = dataclasses.replace(state, lead=lead, norms=jnp.ones(n, jnp.float32))
    index, there = block.choose(jnp.ones(n), state, 1024, CONFIG)
    chosen = np.asarray(index)[np.asarray(there)]
    assert len(set(chosen.tolist())) == len(chosen) == held
    assert int(np.isin(chosen, which).sum()) == min(undecided, held)
