"""Steps on the face by one matrix: those of the other ways, where little is free."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import svm
from dualxda_jax.svm import face, grouped, reduced


def small():
    """A face of 60 free samples on two to four of 8 classes each, among 200, and a slope."""
    rng = np.random.default_rng(0)
    q = np.zeros((8, 200))
    for i in range(200):
        mine = rng.choice(8, rng.integers(2, 5) if i % 3 == 0 and i < 180 else 1, replace=False)
        q[mine, i] = rng.dirichlet(np.ones(len(mine)))
    features, base = jnp.asarray(rng.normal(size=(200, 40)) + 0.5), jnp.asarray(rng.normal(size=(8, 200)))
    block = grouped.Block(features, jnp.full(200, 0.1), jnp.asarray(200, jnp.int32), base, jnp.zeros((1, 1, 1)))
    found = face._face_of(block, jnp.asarray(q))
    return found, face._balanced(found.active, base[:, found.order])


def test_counts_the_steps():
    active = np.zeros((4, 5), bool)
    active[[0, 2], 0] = active[1, 1] = active[:, 3] = True
    assert int(reduced.count(jnp.asarray(active))) == 1 + 0 + 0 + 3 + 0


def test_same_solution_as_without_the_matrix():
    with jax.enable_x64(True):
        free, slope = small()
        assert 0 < int(reduced.count(free.active)) <= reduced.ROOM
        step, flat = reduced.solve(free.features, free.active, slope, jnp.asarray(2000), 1e-12)
        left = slope - face._seen(free, jnp.einsum("kp,pd->kd", step, free.features))
        assert float(jnp.abs(left).max()) < 1e-8 * float(jnp.abs(slope).max())
        assert not bool(jnp.any(flat != 0.0)) and float(jnp.abs(step).max()) > 0.1
        np.testing.assert_allclose(jnp.sum(step, axis=0), 0.0, atol=1e-9)
        assert not bool(jnp.any(jnp.where(free.active, 0.0, step) != 0.0))


def test_finds_a_direction_without_curvature():
    # Two samples with the same features: what one gains on a class, the other may lose.
    with jax.enable_x64(True):
        features = jnp.asarray([[1.0, 0.0], [1.0, 0.0]])
        active = jnp.asarray([[True, True], [True, True], [False, False]])
        slope = jnp.asarray([[0.5, -0.5], [-0.5, 0.5], [0.0, 0.0]])
        step, flat = reduced.solve(features, active, slope, jnp.asarray(50), face.FORCING)
        assert not bool(jnp.any(step != 0.0))
        np.testing.assert_allclose(flat[0], -flat[1])
        assert float(flat[0, 0]) > 0.0 > float(flat[0, 1])


@pytest.mark.usefixtures("x64")
def test_the_way_does_not_change_the_solution(monkeypatch):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 700).astype(np.int32)
    features = rng.normal(size=(700, 12)) + rng.normal(size=(4, 12))[labels]
    config = svm.SolverConfig(tolerance=1e-10, method="coordinate")
    # Under jit, where the one matrix serves; outside of a trace another program solves.
    found = jax.jit(lambda x: svm.solve(x, labels, num_classes=4, cost=0.05, config=config))(features)
    monkeypatch.setattr(reduced, "ROOM", 0)
    jax.clear_caches()
    without = jax.jit(lambda x: svm.solve(x, labels, num_classes=4, cost=0.05, config=config))(features)
    assert bool(found.info.converged) and bool(without.info.converged)
    np.testing.assert_allclose(found.weights, without.weights, atol=1e-4)
