"""Steps on the face by the Gram matrices of the classes: those without, where they pay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import svm
from dualxda_jax.svm import classwise, face, grouped

N, D, K = 512, 400, 24


def free_samples(dtype=jnp.float32, most=4, classes=K):
    """A block whose first 450 samples are on two classes or more, the first one on all, and none on the last class."""
    rng = np.random.default_rng(0)
    q = np.zeros((classes, N))
    for i in range(N):
        number = classes - 1 if i == 0 else rng.integers(2, most + 1) if i < 450 else 1
        mine = rng.choice(classes - 1, number, replace=False)
        q[mine, i] = rng.dirichlet(np.ones(number))
    features = jnp.asarray(rng.normal(size=(N, D)) + 0.5, dtype)
    block = grouped.Block(
        features,
        jnp.full(N, 0.1, dtype),
        jnp.asarray(480, jnp.int32),
        jnp.asarray(rng.normal(size=(classes, N)), dtype),
        jnp.zeros((1, 1, 1), dtype),
    )
    return block, jnp.asarray(q)


def face_of(block, q):
    found = face._face_of(block, q)
    return found, face._balanced(found.active, block.base[:, found.order].astype(q.dtype))


@pytest.mark.parametrize("iterations", [1, 5, 200])
def test_same_steps_as_without_gram_matrices(iterations):
    with jax.enable_x64(True):
        free, slope = face_of(*free_samples(jnp.float64))
        slots = classwise.slots_of(free.active)
        expected, _ = face._solve(free, slope, iterations)
        got, flat = classwise.solve(free.features, free.active, slots, slope, jnp.asarray(iterations), face.FORCING)
        assert float(jnp.abs(expected).max()) > 0.1
        np.testing.assert_allclose(got, expected, atol=1e-9)
        assert not bool(jnp.any(flat != 0.0))


def test_solves_the_equation():
    with jax.enable_x64(True):
        free, slope = face_of(*free_samples(jnp.float64))
        slots = classwise.slots_of(free.active)
        step, _ = classwise.solve(free.features, free.active, slots, slope, jnp.asarray(2000), 1e-10)
        left = slope - face._seen(free, jnp.einsum("kp,pd->kd", step, free.features))
        # More is free than W has room for in no class, so that the equation has a solution.
        assert float(jnp.abs(left).max()) < 1e-8 * float(jnp.abs(slope).max())


def test_tiles_hold_the_products_of_those_who_share_a_class():
    block, q = free_samples()
    free, _ = face_of(block, q)
    slots = classwise.slots_of(free.active)
    grams, size = classwise._grams_of(free.features, slots, K), classwise.tile_of(N, K)
    tiles = int(slots.tiles)
    assert 1 < tiles <= classwise.room(N, D, K)
    seen = np.zeros((K, N, N), bool)
    for tile, i, j in zip(grams.tile[:tiles], grams.row[:tiles], grams.column[:tiles], strict=True):
        rows, columns = (np.arange(size) + int(a) * size for a in (i, j))
        for a in range(size):
            for b in range(0, size, 7):
                if slots.taken[rows[a]] and slots.taken[columns[b]]:
                    one, other = int(slots.sample[rows[a]]), int(slots.sample[columns[b]])
                    assert slots.label[rows[a]] == slots.label[columns[b]]
                    np.testing.assert_allclose(tile[a, b], free.features[one] @ free.features[other], atol=1e-5)
                    seen[int(slots.label[rows[a]]), one, other] = True
    assert seen.any(axis=(1, 2)).tolist() == [True] * (K - 1) + [False]


def test_a_direction_without_curvature_is_handed_over():
    block, q = free_samples()
    # Few features for as many samples: more is free than W has room for.
    block = block._replace(features=block.features.at[:, 8:].set(0.0))
    free, slope = face_of(block, q)
    slots = classwise.slots_of(free.active)
    _, flat = classwise.solve(free.features, free.active, slots, slope, jnp.asarray(1000), 0.0)
    image = jnp.einsum("kp,pd->kd", flat, free.features)
    assert float(jnp.sum(flat * flat)) > 0.0
    assert float(jnp.sum(image * image)) <= 1e-4 * float(jnp.sum(flat * flat))


def test_pays_only_where_there_is_room():
    block, q = free_samples()
    pays = lambda q, width, limit: bool(  # noqa: E731
        classwise.pays(classwise.slots_of(face_of(block, q)[0].active), jnp.asarray(N), width, limit)
    )
    assert classwise.may_pay(N, D, K) and not classwise.may_pay(N, D, 10) and not classwise.may_pay(N, 1, K)
    assert pays(q, 4096, 200) and not pays(q, 4096, 1) and not pays(q, 16, 200)
    everywhere = jnp.full_like(q, 1.0 / K)  # more slots than there are
    assert not pays(everywhere, 4096, 200)


def test_both_ways_gain_as_much(monkeypatch):
    block, q = free_samples(most=2)
    change = jnp.zeros((K, D))
    used = []
    improved = {}
    for name, allowed in (("with", True), ("without", False)):
        monkeypatch.setattr(classwise, "pays", lambda *a, allowed=allowed: used.append(a) or jnp.asarray(allowed))
        improved[name] = face.improve(block, change, q, 40)
    assert len(used) == 2
    for got, expected in zip(improved["with"][:2], improved["without"][:2], strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4 * float(jnp.abs(expected).max()))


def test_solver_takes_it(monkeypatch):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, K, 900).astype(np.int32)
    features = np.maximum(rng.normal(size=(K, 500))[labels] + 1.5 * rng.normal(size=(900, 500)), 0.0)
    given = {"num_classes": K, "cost": 1e-2, "config": svm.SolverConfig(1e-5, method="coordinate")}
    pays, seen = classwise.pays, []

    def noted(*args):
        found = pays(*args)
        jax.debug.callback(lambda yes: seen.append(bool(yes)), found)
        return found

    monkeypatch.setattr(classwise, "pays", noted)
    monkeypatch.setattr(classwise, "TILE_COST", 1e3)
    monkeypatch.setattr(classwise, "TILE", classwise.LEAST_TILE)
    jax.clear_caches()
    # Under jit, where class-wise Gram matrices serve; outside of a trace another program solves.
    rows = jnp.asarray(features, jnp.float32)
    got = jax.jit(lambda x: svm.solve(x, jnp.asarray(labels), **given))(rows)
    jax.effects_barrier()
    jax.clear_caches()
    assert any(seen)
    assert bool(got.info.converged)
    monkeypatch.setattr(classwise, "FEW_CLASSES", K)
    expected = jax.jit(lambda x: svm.solve(x, jnp.asarray(labels), **given))(rows)
    jax.clear_caches()
    np.testing.assert_allclose(got.info.dual, expected.info.dual, rtol=2e-5)
