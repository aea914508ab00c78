"""Features that stay in host memory: the same answer, with little on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import svm
from dualxda_jax.svm import streamed

N, D, K = 3000, 24, 4
LIMIT = 40_000  # bytes: a seventh of the features


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    labels = np.sort(rng.integers(0, K, N)).astype(np.int32)  # sorted by class: the worst order for slabs
    features = np.maximum(rng.normal(size=(K, D))[labels] + 0.8 * rng.normal(size=(N, D)), 0.0).astype(np.float32)
    return features, labels


def config(limit=LIMIT, method="coordinate"):
    block = N if limit is None else 64  # of one size each, so that each is one program
    return svm.SolverConfig(1e-5, intercept_scaling=1.0, block=block, chunk=128, method=method, device_bytes=limit)


def solved(problem, cost, **options):
    return svm.solve(*problem, num_classes=K, cost=cost, config=config(**options))


@pytest.mark.parametrize(("method", "cost"), [("coordinate", 1e-2), ("coordinate", 1.0), ("newton", 1e-2)])
def test_equals_resident(problem, method, cost):
    features, labels = problem
    expected = solved(problem, cost, limit=None)
    got = solved(problem, cost, method=method)
    assert bool(got.info.converged)
    scale = float(jnp.abs(expected.weights).max())
    np.testing.assert_allclose(got.info.dual, expected.info.dual, rtol=2e-5)
    np.testing.assert_allclose(got.weights, expected.weights, atol=1e-2 * scale)
    np.testing.assert_allclose(got.intercept, expected.intercept, atol=1e-2 * scale)
    np.testing.assert_allclose(got.coefficients.sum(1), 0.0, atol=1e-6 * cost)
    given = {"num_classes": K, "cost": cost, "intercept_scaling": 1.0}
    primal, dual = svm.objectives(features, labels, got.coefficients, **given)
    assert (primal - dual) / primal <= 1.01e-5
    np.testing.assert_allclose(got.weights, np.asarray(got.coefficients, np.float64).T @ features, atol=1e-5 * scale)


def test_little_lies_on_the_device(problem, monkeypatch):
    features, _ = problem
    most, moved = [0], [0]
    put = streamed._to_device

    def counted(data, places):
        rows = put(data, places)
        moved[0] += 1
        wide = sum(a.nbytes for a in jax.live_arrays() if a.ndim == 2 and a.shape[1] == D and a.shape[0] > K)
        most[0] = max(most[0], wide)
        return rows

    monkeypatch.setattr(streamed, "_to_device", counted)
    solved(problem, 1e-2)
    assert moved[0] > 10
    assert 0 < most[0] <= LIMIT < features.nbytes / 5


@pytest.mark.parametrize(("method", "copies"), [("newton", 2 * 8 * D), ("coordinate", 4 * (3 * (D + 1) + 128))])
def test_block_has_room_for_its_copies(problem, method, copies):
    features, labels = problem
    data = streamed.Data(features, jnp.asarray(labels), jnp.ones(N), jnp.ones(()))
    rows = streamed.most_rows(data, config(5 * LIMIT, method))
    assert rows > streamed.LEAST_ROWS
    assert rows * (4 * D + copies) <= 5 * LIMIT


def test_memory_mapped_file(problem, tmp_path):
    features, labels = problem
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    got = solved((mapped, labels), 1e-2)
    np.testing.assert_array_equal(got.coefficients, solved(problem, 1e-2).coefficients)


def test_warm_start_and_samples_left_out(problem):
    weight = (np.arange(N) % 3 > 0).astype(np.float32)
    given = {"num_classes": K, "cost": 1e-2, "config": config(), "sample_weight": weight}
    cold = svm.solve(*problem, **given)
    assert float(jnp.abs(cold.coefficients[weight == 0]).max()) == 0.0
    warm = svm.solve(*problem, **given, init=cold)
    assert bool(warm.info.converged)
    assert int(warm.info.epochs) < int(cold.info.epochs)


def test_by_hand(problem):
    given = {"num_classes": K, "cost": 1e-2, "config": config()}
    state, gaps = svm.init(*problem, **given), []
    for _ in range(100):
        state, info = svm.step(state, *problem, **given)
        gaps.append(float(info.gap))
    solution = svm.finish(state, *problem, **given)
    assert gaps[-1] < 0.05 * gaps[0]
    np.testing.assert_allclose(solution.info.gap, gaps[-1], rtol=0.2)


def test_float64(problem):
    features, labels = problem
    wide = features.astype(np.float64)
    with jax.enable_x64(True):
        got = solved((wide, labels), 1e-2)
        assert got.coefficients.dtype == got.weights.dtype == jnp.float64 and bool(got.info.converged)
    narrow = solved((wide, labels), 1e-2)
    assert narrow.coefficients.dtype == narrow.weights.dtype == jnp.float32 and bool(narrow.info.converged)
    np.testing.assert_allclose(narrow.info.dual, got.info.dual, rtol=2e-5)


def test_limit_must_be_one(problem):
    with pytest.raises(ValueError, match=r"config\.device_bytes"):
        svm.SolverConfig(device_bytes=0)
