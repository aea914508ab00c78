"""Objectives, their gap without cancellation, and the box."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import svm
from dualxda_jax.svm import problem as p

K = 4


def plain(features, labels, alpha, cost, b):
    """The objectives by the book."""
    x = np.concatenate([features, np.full((len(features), 1), b)], axis=1).astype(np.float64)
    weights = alpha.T @ x
    primal = dual = 0.0
    for x_i, y, a, c in zip(x, labels, alpha, cost, strict=True):
        s = weights @ x_i
        primal += c * (max(s[j] + (j != y) for j in range(K)) - s[y])
        dual -= sum(a[j] for j in range(K) if j != y)
    norm = 0.5 * np.sum(weights**2)
    return norm + primal, dual - norm


def example(rng, n=11, d=3):
    features = rng.normal(size=(n, d))
    labels = rng.integers(0, K, n).astype(np.int32)
    cost = rng.uniform(0.1, 1.0, n)
    alpha = np.asarray(p.to_coefficients(rng.dirichlet(np.ones(K), n).T, labels, cost, jnp.float64))
    return features, labels, cost, alpha


@pytest.mark.parametrize("b", [0.0, 2.0])
def test_objectives_by_the_book(rng, x64, b):
    features, labels, cost, alpha = example(rng)
    expected = plain(features, labels, alpha, cost, b)
    given = {"num_classes": K, "cost": cost, "intercept_scaling": b}
    np.testing.assert_allclose(svm.objectives(features, labels, alpha, **given), expected, rtol=1e-12)
    inside = jax.jit(lambda a: svm.objectives(features, labels, a, **given))(alpha)
    np.testing.assert_allclose(inside, expected, rtol=1e-12)


def test_objectives_do_not_depend_on_the_dtype_that_came_in(rng):
    features, labels, _, _ = example(rng)
    low = jnp.asarray(features, jnp.bfloat16)
    alpha = svm.solve(low, labels, num_classes=K, cost=0.1).coefficients
    given = {"num_classes": K, "cost": 0.1}
    a = svm.objectives(low, labels, alpha, **given)
    b = svm.objectives(np.asarray(low.astype(jnp.float32), np.float64), labels, alpha, **given)
    np.testing.assert_allclose(a, b, rtol=1e-13)


@pytest.mark.parametrize("chunk", [1, 4, 11, 32])
def test_gap_is_the_difference_for_any_chunk(rng, x64, chunk):
    features, labels, cost, alpha = example(rng)
    data = p.Problem(
        jnp.asarray(features), jnp.asarray(labels), jnp.asarray(cost), jnp.asarray(11, jnp.int32),
        jnp.zeros((K, 4)), jnp.ones(()), 0.5, chunk,
    )  # fmt: skip
    q = p.from_coefficients(jnp.asarray(alpha), data.labels, data.cost)
    primal, gap = p.primal_and_gap(data, p.weights_of(data, q), q)
    expected = plain(features, labels, alpha, cost, 0.5)
    np.testing.assert_allclose([primal, primal - gap], expected, rtol=1e-12)


def test_what_is_outside_of_the_box_is_brought_in(rng, x64):
    _, labels, cost, alpha = example(rng)
    kept = p.to_coefficients(p.from_coefficients(jnp.asarray(alpha), labels, cost), labels, cost, jnp.float64)
    np.testing.assert_allclose(kept, alpha, atol=1e-15)
    wild = rng.normal(size=alpha.shape) * 3
    cost[2] = 0.0
    q = p.from_coefficients(jnp.asarray(wild), labels, jnp.asarray(cost))
    brought = np.asarray(p.to_coefficients(q, labels, cost, jnp.float64))
    rows = np.arange(len(labels))
    np.testing.assert_allclose(brought.sum(axis=1), 0.0, atol=1e-14)
    assert (brought[rows, labels] <= cost).all() and (brought[rows, labels] >= 0).all()
    assert (np.delete(brought[0], labels[0]) <= 0).all()
    assert not brought[2].any()
