"""Derivatives through the public solver under jit, vmap, sharding and x64."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dualxda_jax import svm

N, D, K = 40, 6, 3
CONFIG = svm.SolverConfig(tolerance=1e-6, intercept_scaling=0.5)


def make_problem(seed=0, n=N):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, n)
    features = rng.normal(size=(n, D)) + 1.5 * rng.normal(size=(K, D))[labels]
    weight = rng.uniform(0.5, 1.5, n)
    return features, labels, weight, rng.normal(size=(K, D + 1))


def functional(labels, direction, config=CONFIG):
    """A number that depends on all of the surrogate, as a function of what can be differentiated by."""

    def of(features, cost, sample_weight):
        solution = svm.solve(features, labels, num_classes=K, cost=cost, config=config, sample_weight=sample_weight)
        made = jnp.concatenate([solution.weights, solution.intercept[:, None]], axis=1)
        return jnp.vdot(jnp.asarray(direction, made.dtype), made)

    return of


def test_forward_and_reverse_agree(x64):
    features, labels, weight, direction = make_problem(1)
    of = functional(jnp.asarray(labels), direction)
    primals = tuple(jnp.asarray(a) for a in (features, np.asarray(0.1), weight))
    rng = np.random.default_rng(2)
    tangents = tuple(jnp.asarray(rng.normal(size=p.shape)) for p in primals)
    _, forward = jax.jvp(of, primals, tangents)
    backward = jax.grad(of, argnums=(0, 1, 2))(*primals)
    np.testing.assert_allclose(sum(jnp.vdot(b, t) for b, t in zip(backward, tangents, strict=True)), forward, rtol=1e-8)


def test_float32_without_x64_agrees_with_float64():
    features, labels, weight, direction = make_problem()
    of = functional(jnp.asarray(labels), direction)
    gradient = jax.grad(of, argnums=(0, 1, 2))
    got = gradient(jnp.asarray(features, jnp.float32), jnp.float32(0.1), jnp.asarray(weight, jnp.float32))
    with jax.enable_x64(True):
        expected = gradient(jnp.asarray(features), jnp.asarray(0.1), jnp.asarray(weight))
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max(), rtol=0)


def test_vmap_over_costs_and_over_subsets():
    features, labels, _, direction = make_problem()
    features = jnp.asarray(features, jnp.float32)
    gradient = jax.grad(functional(jnp.asarray(labels), direction), argnums=(0, 1, 2))
    subsets = jnp.asarray(np.random.default_rng(3).random((3, N)) < 0.7, jnp.float32)
    costs = jnp.asarray([0.01, 0.1, 1.0])
    together = jax.jit(jax.vmap(gradient, in_axes=(None, 0, 0)))(features, costs, subsets)
    for i in range(3):
        for one, other in zip(gradient(features, costs[i], subsets[i]), together, strict=True):
            np.testing.assert_allclose(other[i], one, atol=1e-3 * float(jnp.abs(one).max()), rtol=0)


def test_left_out_samples_do_not_pull():
    features, labels, weight, direction = make_problem()
    weight[:5] = 0
    gradient = jax.grad(functional(jnp.asarray(labels), direction))
    by_features = gradient(jnp.asarray(features, jnp.float32), 0.1, jnp.asarray(weight, jnp.float32))
    np.testing.assert_array_equal(by_features[:5], 0)
    assert bool(jnp.any(by_features[5:] != 0))


def test_rows_across_a_mesh():
    features, labels, weight, direction = make_problem(n=64)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    primals = jnp.asarray(features, jnp.float32), jnp.full(64, 0.1), jnp.asarray(weight, jnp.float32)
    labels = jnp.asarray(labels)

    @jax.jit
    def gradient(features, cost, weight, labels):
        return jax.grad(functional(labels, direction), argnums=(0, 1, 2))(features, cost, weight)

    expected = gradient(*primals, labels)
    with jax.set_mesh(mesh):
        got = gradient(*jax.device_put(primals, rows), jax.device_put(labels, rows))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * float(jnp.abs(other).max()), rtol=0)
