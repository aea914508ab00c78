"""Many costs at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import svm


def example(rng):
    labels = rng.integers(0, 4, 60).astype(np.int32)
    features = np.maximum(rng.normal(size=(4, 7))[labels] + 0.7 * rng.normal(size=(60, 7)), 0.0)
    return features.astype(np.float32), labels


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_path_is_in_the_order_of_the_costs(rng, wrap):
    features, labels = example(rng)
    costs = [1e-2, 1e-6, 1e-1]
    path = wrap(lambda f: svm.solve_path(f, labels, num_classes=4, costs=costs))(jnp.asarray(features))
    assert path.coefficients.shape == (3, 60, 4) and path.info.gap.shape == (3,)
    assert np.asarray(path.info.converged).all()
    for i, cost in enumerate(costs):
        primal, dual = svm.objectives(features, labels, path.coefficients[i], num_classes=4, cost=cost)
        assert primal - dual <= 1.001e-4 * primal


def test_bad_costs(rng):
    features, labels = example(rng)
    for costs, message in ((0.1, "costs: got shape"), ([], "costs: got shape"), ([0.1, -1.0], "positive and finite")):
        with pytest.raises(ValueError, match=message):
            svm.solve_path(features, labels, num_classes=4, costs=costs)


@pytest.mark.parametrize("what", ["costs", "halves"])
def test_problems_spread_over_devices(rng, what):
    # Each device solves its share of the problems, with the features whole on all of them.
    features, labels = example(rng)
    config = svm.SolverConfig(tolerance=1e-6)
    masks = (rng.random((8, 60)) < 0.5).astype(np.float32)
    costs = np.geomspace(1e-4, 1e-1, 8).astype(np.float32)

    def many(features, labels, given):
        if what == "costs":
            return svm.solve_path(features, labels, num_classes=4, costs=given, config=config)
        one = lambda w: svm.solve(features, labels, num_classes=4, cost=1e-2, config=config, sample_weight=w)  # noqa: E731
        return jax.vmap(one)(given)

    mesh = jax.make_mesh((4,), ("problems",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, share = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("problems")
    over = jax.shard_map(many, mesh=mesh, in_specs=(whole, whole, share), out_specs=share, check_vma=False)
    given = costs if what == "costs" else masks
    got = jax.jit(over)(features, labels, given)
    assert np.asarray(got.info.converged).all()
    assert got.coefficients.sharding.shard_shape(got.coefficients.shape) == (2, 60, 4)
    for i in range(8):
        mine = {"cost": float(costs[i])} if what == "costs" else {"cost": 1e-2, "sample_weight": masks[i]}
        alone = svm.solve(features, labels, num_classes=4, config=config, **mine)
        np.testing.assert_allclose(got.info.dual[i], alone.info.dual, rtol=3e-6)
    # "auto" sees that each device is on its own, and takes what suits it.
    config = svm.SolverConfig(tolerance=1e-6, method="coordinate" if jax.default_backend() == "cpu" else "newton")
    np.testing.assert_array_equal(jax.jit(over)(features, labels, given).coefficients, got.coefficients)


def test_values_that_vary_are_named(rng):
    features, labels = example(rng)
    mesh = jax.make_mesh((4,), ("problems",), axis_types=(jax.sharding.AxisType.Auto,))
    share = jax.sharding.PartitionSpec("problems")
    one = lambda c: svm.solve(features, labels, num_classes=4, cost=c[0]).info.gap[None]  # noqa: E731
    with pytest.raises(ValueError, match="cost: got values that vary over the mesh axes problems"):
        jax.jit(jax.shard_map(one, mesh=mesh, in_specs=share, out_specs=share))(jnp.ones(4))
