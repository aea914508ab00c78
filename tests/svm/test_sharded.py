"""Rows spread over a mesh: the same answer, and nothing of the size of all rows moves."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dualxda_jax import svm

N, D, K, COST = 1600, 8, 3, 1e-3
CONFIG = svm.SolverConfig(tolerance=1e-6, block=64)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, K, N).astype(np.int32)
    features = np.maximum(rng.normal(size=(K, D))[labels] + 0.7 * rng.normal(size=(N, D)), 0.0)
    return features.astype(np.float32), labels


def fit(features, labels, config=CONFIG, **options):
    return svm.solve(features, labels, num_classes=K, cost=COST, config=config, **options)


@pytest.fixture(scope="module")
def alone(problem):
    return fit(*problem)


def spread(mesh, problem, axis="data"):
    return jax.device_put(problem, NamedSharding(mesh, PartitionSpec(axis)))


def assert_same(got, expected):
    assert bool(got.info.converged)
    np.testing.assert_allclose(got.info.dual, expected.info.dual, rtol=3e-6)
    np.testing.assert_allclose(got.weights, expected.weights, atol=3e-3 * float(jnp.abs(expected.weights).max()))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("wrap", ["eager", "jit"])
def test_equals_unsharded(problem, alone, kind, wrap):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    config = svm.SolverConfig(1e-6, block=64, axis="data" if wrap == "jit" and kind == AxisType.Auto else None)
    run = lambda f, y: fit(f, y, config)  # noqa: E731
    with jax.set_mesh(mesh):
        got = (jax.jit(run) if wrap == "jit" else run)(*spread(mesh, problem))
        assert got.coefficients.sharding.shard_shape((N, K)) == (N // 8, K)
    assert_same(got, alone)


def test_two_axes_and_a_third_that_holds_copies(problem, alone):
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "copies"), axis_types=(AxisType.Auto,) * 3)
    assert_same(fit(*spread(mesh, problem, ("a", "b"))), alone)


def test_left_to_the_compiler(problem, alone):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    assert_same(jax.jit(fit)(*spread(mesh, problem)), alone)


def test_warm_start_and_left_out_rows(problem):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    weight = (np.arange(N) % 3 > 0).astype(np.float32)
    expected = fit(*problem, sample_weight=weight)
    cold = fit(*spread(mesh, problem), sample_weight=weight)
    assert_same(cold, expected)
    assert float(jnp.abs(cold.coefficients[weight == 0]).max()) == 0.0
    warm = fit(*spread(mesh, problem), sample_weight=weight, init=cold)
    assert_same(warm, expected)
    assert int(warm.info.epochs) < int(cold.info.epochs)


def test_by_hand(problem, alone):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    given = {"num_classes": K, "cost": COST, "config": CONFIG}
    rows = spread(mesh, problem)
    state = svm.init(*rows, **given)
    for _ in range(60):
        state, info = svm.step(state, *rows, **given)
        if bool(info.converged):
            break
    got = svm.finish(state, *rows, **given)
    np.testing.assert_allclose(got.info.dual, alone.info.dual, rtol=1e-5)


def test_nothing_of_the_size_of_all_rows_moves():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    n = 20 * N
    config = svm.SolverConfig(block=64, axis="data")
    place = NamedSharding(mesh, PartitionSpec("data"))
    rows = [
        jax.ShapeDtypeStruct((n, D), jnp.float32, sharding=place),
        jax.ShapeDtypeStruct((n,), jnp.int32, sharding=place),
    ]
    with jax.set_mesh(mesh):
        program = jax.jit(lambda f, y: fit(f, y, config)).lower(*rows).compile().as_text()
    moves = re.findall(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", program)
    shapes = [[int(s) for s in shape.split(",") if s] for move in moves for shape in re.findall(r"\[([0-9,]*)\]", move)]
    assert len(shapes) > 5
    block = n // 8  # the rows of a block, at most those of one device
    assert all(np.prod(shape) <= block * D for shape in shapes)
    assert not any(n in shape for shape in shapes)


def test_coordinates_are_refused(problem):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ValueError, match=r"config\.method"):
        fit(*spread(mesh, problem), svm.SolverConfig(method="coordinate"))


def test_axis_must_be_one_of_the_mesh(problem):
    with pytest.raises(ValueError, match=r"config\.axis"):
        jax.jit(lambda f, y: fit(f, y, svm.SolverConfig(axis="rows")))(*problem)


def test_rows_must_divide_among_the_devices(problem):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    features, labels = problem
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="features: got 1599 rows, must be a multiple of 8"):
        jax.jit(lambda f, y: fit(f, y, svm.SolverConfig(axis="data")))(features[1:], labels[1:])
