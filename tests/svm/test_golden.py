"""Against LIBLINEAR on small problems (golden/make_liblinear.py) and against a plain solver that certifies itself."""

import pathlib

import numpy as np
import pytest

from dualxda_jax import svm

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("liblinear_*.npz"))


def nearest(v):
    """Projection of one vector onto the simplex by sorting."""
    u = np.sort(v)[::-1]
    above = (np.cumsum(u) - 1.0) / np.arange(1, len(u) + 1)
    return np.maximum(v - above[np.nonzero(u > above)[0][-1]], 0.0)


def coordinate_ascent(features, labels, k, cost, tolerance, epochs=20000):
    """Exact ascent on the dual, one sample after another, until its own gap is small: slow and plain."""
    x = np.asarray(features, np.float64)
    n = len(x)
    q = np.eye(k)[labels]
    one_hot = np.eye(k)[labels]
    weights = np.zeros((k, x.shape[1]))
    square = np.maximum(np.sum(x * x, axis=1), 1e-300)
    rng = np.random.default_rng(0)
    for epoch in range(epochs):
        for i in rng.permutation(n):
            z = weights @ x[i] + 1.0 - one_hot[i]
            new = nearest(q[i] + z / (cost * square[i])) if square[i] > 1e-200 else np.eye(k)[np.argmax(z)]
            weights += cost * np.outer(q[i] - new, x[i])
            q[i] = new
        if epoch % 20 == 19:
            alpha = cost * (one_hot - q)
            primal, dual = svm.objectives(features, labels, alpha, num_classes=k, cost=cost)
            if primal - dual <= tolerance * primal:
                return alpha, primal, dual
    raise AssertionError("the oracle did not certify itself")


def fit(data, tolerance):
    config = svm.SolverConfig(tolerance=tolerance, intercept_scaling=float(data["intercept_scaling"]))
    given = {"num_classes": int(data["num_classes"]), "cost": float(data["cost"])}
    solution = svm.solve(data["features"], data["labels"], config=config, **given)
    scaling = {"intercept_scaling": config.intercept_scaling}
    ours = svm.objectives(data["features"], data["labels"], solution.coefficients, **given, **scaling)
    peer = svm.objectives(data["features"], data["labels"], data["alpha"], **given, **scaling)
    return solution, ours, peer


def load(path):
    data = np.load(path)
    return {name: data[name].astype(np.float64) if name == "features" else data[name] for name in data.files}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem.removeprefix("liblinear_"))
def test_at_least_as_good_as_liblinear(x64, path):
    data = load(path)
    solution, (primal, dual), (peer_primal, peer_dual) = fit(data, 1e-8)
    assert bool(solution.info.converged)
    assert primal - dual <= 1.000001e-8 * primal
    # Weak duality, across the two: neither may claim more than the other allows.
    assert dual <= peer_primal * (1 + 1e-12) and peer_dual <= primal * (1 + 1e-12)
    assert dual >= peer_dual - 1e-8 * primal
    assert primal <= peer_primal + 1e-8 * primal
    # The primal is strongly convex: half the squared distance of a point from the best is at most what it is above it.
    ours = np.append(solution.weights, np.zeros((solution.weights.shape[0], 1)), axis=1)
    peer = np.append(data["coef"], np.zeros((len(ours), 1)), axis=1)
    if data["intercept_scaling"]:
        ours[:, -1] = solution.intercept / data["intercept_scaling"]
        peer[:, -1] = data["intercept"] / data["intercept_scaling"]
    reach = np.sqrt(2 * (primal - dual)) + np.sqrt(2 * max(peer_primal - dual, 0.0))
    assert np.linalg.norm(ours - peer) <= reach * (1 + 1e-6) + 1e-6 * np.linalg.norm(peer)


def test_alpha_where_it_is_unique(x64):
    data = load(GOLDEN / "liblinear_wide.npz")
    assert data["gap"] < 1e-9
    solution, _, _ = fit(data, 1e-8)
    np.testing.assert_allclose(solution.coefficients, data["alpha"], atol=1e-4 * data["cost"])


@pytest.mark.parametrize("name", ["plain", "duplicates", "absent_class", "zero_rows"])
def test_equals_plain_coordinate_ascent(x64, name):
    data = load(GOLDEN / f"liblinear_{name}.npz")
    alpha, primal, dual = coordinate_ascent(
        data["features"], data["labels"], int(data["num_classes"]), float(data["cost"]), 1e-7
    )
    solution, (our_primal, our_dual), _ = fit(data, 1e-8)
    assert our_dual <= primal and dual <= our_primal
    np.testing.assert_allclose(our_dual, dual, rtol=2e-7)
    expected = alpha.T @ data["features"]
    np.testing.assert_allclose(solution.weights, expected, atol=2e-3 * np.abs(expected).max())
