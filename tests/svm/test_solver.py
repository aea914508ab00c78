"""The solver certifies, keeps the box, and says what is wrong with bad input."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import svm


def make(rng, n=60, d=7, k=4, scale=1.0):
    labels = rng.integers(0, k, n).astype(np.int32)
    centres = rng.normal(size=(k, d))
    features = np.maximum(centres[labels] + 0.7 * rng.normal(size=(n, d)), 0.0) * scale
    return features.astype(np.float32), labels


def assert_feasible(coefficients, labels, cost):
    alpha = np.asarray(coefficients, np.float64)
    at = np.arange(len(labels))
    off = alpha.copy()
    off[at, labels] = 0.0
    cost = np.broadcast_to(np.float64(cost), len(labels))
    assert (off <= 0).all()
    assert (alpha[at, labels] >= 0).all() and (alpha[at, labels] <= cost * (1 + 1e-6)).all()
    np.testing.assert_allclose(alpha.sum(axis=1), 0.0, atol=1e-6 * max(cost.max(), 1e-30))


SHAPES = {
    "usual": (60, 7, 4),
    "wide": (20, 50, 3),
    "two classes": (40, 5, 2),
    "one sample": (1, 3, 5),
    "many classes": (60, 10, 1000),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_certified_and_feasible_at_every_cost(rng, shape):
    features, labels = make(rng, *shape)
    for cost in (1e-9, 1e-7, 1e-5, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        solution = svm.solve(features, labels, num_classes=shape[2], cost=cost)
        assert bool(solution.info.converged)
        assert solution.coefficients.dtype == jnp.float32
        assert_feasible(solution.coefficients, labels, cost)
        primal, dual = svm.objectives(features, labels, solution.coefficients, num_classes=shape[2], cost=cost)
        assert primal - dual <= 1.001e-4 * primal
        expected = np.asarray(solution.coefficients, np.float64).T @ features
        np.testing.assert_allclose(solution.weights, expected, atol=1e-5 * np.abs(expected).max() + 1e-30)


def test_odd_data_and_dtypes(rng):
    features, labels = make(rng)
    features[5:15] = features[:10]
    features[20] = 0.0
    labels[labels == 1] = 2
    cost = np.full(60, 1e-2, np.float32)
    cost[30:40] = 0.0
    weight = np.ones(60, np.float32)
    weight[40:45] = 0.0
    given = {"num_classes": 4, "cost": cost, "sample_weight": weight}
    for scale in (1e-6, 1.0, 1e6):
        scaled = given | {"cost": cost / np.float32(max(scale, 1.0) ** 2)}
        solution = svm.solve(features * np.float32(scale), labels, **scaled)
        assert bool(solution.info.converged)
        assert_feasible(solution.coefficients, labels, scaled["cost"] * weight)
        assert not np.asarray(solution.coefficients)[30:45].any()
    masked = svm.solve(features, labels, **(given | {"sample_weight": weight > 0}))
    np.testing.assert_array_equal(masked.coefficients, svm.solve(features, labels, **given).coefficients)
    low = svm.solve(jnp.asarray(features, jnp.bfloat16), labels, **given)
    assert bool(low.info.converged) and low.coefficients.dtype == jnp.float32


def test_large_integers_do_not_wrap(rng):
    features, labels = make(rng)
    given = {"num_classes": 4, "config": svm.SolverConfig(tolerance=1e-3)}
    wide = svm.solve(features, labels, cost=1e-9, sample_weight=np.full(60, 2**32 + 2**30), **given)
    plain = svm.solve(features, labels, cost=1e-9 * (2**32 + 2**30), **given)
    np.testing.assert_allclose(wide.info.primal, plain.info.primal, rtol=1e-5)
    whole = svm.solve(features, labels, cost=2, **given)
    np.testing.assert_array_equal(whole.coefficients, svm.solve(features, labels, cost=2.0, **given).coefficients)


def test_steps_too_large_for_float32_to_tell_apart(rng):
    # With more classes than all pairs of them are looked at for, and hardly any cost.
    draw = np.random.default_rng(1500)
    labels = draw.integers(0, 20, 1500)
    features = ((0.5 * draw.normal(size=(20, 20)))[labels] + draw.normal(size=(1500, 20))).astype(np.float32)
    assert bool(svm.solve(features, labels, num_classes=20, cost=1e-9).info.converged)


def test_most_samples_are_exactly_zero(rng):
    labels = rng.integers(0, 3, 60).astype(np.int32)
    features = (10.0 * np.eye(3, 7)[labels] + rng.normal(size=(60, 7))).astype(np.float32)
    solution = svm.solve(features, labels, num_classes=3, cost=1.0)
    assert (np.asarray(solution.coefficients) == 0.0).all(axis=1).mean() > 0.5


def test_intercept_is_a_constant_feature(rng):
    features, labels = make(rng)
    config = svm.SolverConfig(tolerance=1e-6, intercept_scaling=2.0)
    given = {"num_classes": 4, "cost": 1e-2}
    solution = svm.solve(features, labels, config=config, **given)
    appended = np.concatenate([features, np.full((60, 1), 2.0, np.float32)], axis=1)
    other = svm.solve(appended, labels, config=svm.SolverConfig(tolerance=1e-6), **given)
    np.testing.assert_allclose(solution.weights, other.weights[:, :-1], atol=1e-3)
    np.testing.assert_allclose(solution.intercept, 2.0 * other.weights[:, -1], atol=1e-3)


def test_warm_starts_from_elsewhere(rng):
    features, labels = make(rng)
    given = {"num_classes": 4}
    before = svm.solve(features, labels, cost=1e-1, **given)
    again = svm.solve(features, labels, cost=1e-1, init=before, **given)
    cold = int(before.info.epochs)
    assert int(again.info.epochs) < cold
    changed = (labels + (np.arange(60) < 5)) % 4
    for other in (
        svm.solve(features, labels, cost=1e-4, init=before, **given),
        svm.solve(features, changed.astype(np.int32), cost=1e-1, init=before, **given),
        svm.solve(np.concatenate([features, features[:20] + 0.1]), np.append(labels, labels[:20]), cost=1e-1,
                  init=before, **given),
    ):  # fmt: skip
        assert bool(other.info.converged)
    with pytest.raises(ValueError, match=r"init\.coefficients"):
        svm.solve(features[:10], labels[:10], cost=1e-1, init=before, **given)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_warm_starts_from_far_away_are_no_slower_than_cold(rng, wrap):
    features, labels = make(rng, 3000, 12, 4, 3.0)
    config = svm.SolverConfig(block=256)

    def fit(labels, cost, init=None):
        return svm.solve(features, labels, num_classes=4, cost=cost, config=config, init=init)

    warm, cold = wrap(fit), wrap(lambda labels, cost: fit(labels, cost))
    known, other = cold(labels, 1e-4), rng.permutation(labels)
    for labels_now, cost in ((labels, 1e-6), (labels, 3e-5), (labels, 3e-4), (labels, 1e-2), (other, 1e-4)):
        found, anew = warm(labels_now, cost, known), cold(labels_now, cost)
        assert bool(found.info.converged)
        assert_feasible(found.coefficients, labels_now, cost)
        np.testing.assert_allclose(found.info.primal, anew.info.primal, rtol=2e-4)
        # A look at what it was given is all that a useless start costs.
        assert int(found.info.epochs) <= int(anew.info.epochs) + 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros((60, 7), np.int32)}, "features: got dtype int32"),
        ({"features": np.zeros((0, 7), np.float32), "labels": np.zeros(0, np.int32)}, "features: got no rows"),
        ({"labels": np.zeros(59, np.int32)}, "labels: got shape"),
        ({"labels": np.zeros(60, np.float32)}, "labels: got dtype float32"),
        ({"labels": np.full(60, 4, np.int32)}, "labels: got 4 at position 0"),
        ({"num_classes": 1}, "num_classes: got 1"),
        ({"cost": 0.0}, "cost: got 0"),
        ({"cost": -1.0}, "cost: got -1.0"),
        ({"cost": float("nan")}, "cost: got nan"),
        ({"cost": np.ones(3, np.float32)}, "cost: got shape"),
        ({"cost": 1e-46}, "cost: got 1e-46, must be within float32"),
        ({"cost": 1e39}, r"cost: got 1e\+39, must be within float32"),
        ({"cost": 1j}, "cost: got dtype complex128"),
        ({"cost": 1e-25, "sample_weight": np.full(60, 1e-25)}, "sample_weight times cost: got 1e-50"),
        ({"cost": 1e25, "sample_weight": np.full(60, 1e25)}, r"sample_weight times cost: got 1e\+50"),
        ({"cost": "a"}, "cost: got dtype <U1"),
        ({"init": np.zeros((60, 4))}, "init: got ndarray, must be a DualSolution"),
        ({"sample_weight": np.ones(3, np.float32)}, "sample_weight: got shape"),
    ],
)
def test_bad_input(rng, change, message):
    features, labels = make(rng)
    given = {"features": features, "labels": labels, "num_classes": 4, "cost": 1e-2} | change
    with pytest.raises(ValueError, match=message):
        svm.solve(given.pop("features"), given.pop("labels"), **given)


@pytest.mark.parametrize(
    "bad",
    [
        {"tolerance": 0.0}, {"tolerance": "a"}, {"max_epochs": 0}, {"max_epochs": 1.5}, {"chunk": 2.5}, {"block": "3"},
        {"max_newton": True}, {"growth": 1.0}, {"intercept_scaling": -1.0}, {"intercept_scaling": "1"},
        {"device_bytes": "1GB"}, {"axis": 3}, {"axis": ["data"]},
    ],
)  # fmt: skip
def test_bad_config(bad):
    with pytest.raises(ValueError, match=f"config.{next(iter(bad))}"):
        svm.SolverConfig(**bad)


@pytest.mark.parametrize("config", [None, {"tolerance": 1.0}, svm.SolverConfig])
def test_a_config_of_another_type(rng, config):
    with pytest.raises(ValueError, match=r"config: got .*, must be a svm\.SolverConfig"):
        svm.solve(*make(rng), num_classes=4, cost=1.0, config=config)


def test_same_shapes_compile_once(rng):
    features, labels = make(rng, 33, 4, 3)
    fit = jax.jit(lambda f, c: svm.solve(f, labels, num_classes=3, cost=c).weights)
    for cost in (1e-3, 1e-2):
        fit(jnp.asarray(features), jnp.float32(cost))
    assert fit._cache_size() == 1


def test_progress_is_reported_and_changes_nothing(rng):
    features, labels = make(rng)
    seen = []
    given = {"num_classes": 4, "cost": 1e-2}
    watched = svm.solve(features, labels, progress=lambda done, total: seen.append((done, total)), **given)
    np.testing.assert_allclose(watched.weights, svm.solve(features, labels, **given).weights, atol=1e-6)
    assert seen[-1][0] == seen[-1][1] and len(seen) > 2


def test_jit_and_vmap_agree_with_eager(rng):
    features, labels = make(rng)
    features = jnp.asarray(features)
    costs = jnp.asarray([1e-4, 1e-2], jnp.float32)
    fit = lambda cost: svm.solve(features, labels, num_classes=4, cost=cost).weights  # noqa: E731
    eager = np.stack([fit(c) for c in costs])
    for mapped in (jax.vmap(fit), jax.jit(jax.vmap(fit)), jax.vmap(jax.jit(fit))):
        np.testing.assert_allclose(mapped(costs), eager, rtol=0.05, atol=2e-2 * np.abs(eager).max())


def test_problems_one_after_another_under_vmap(rng):
    features, labels = make(rng)
    config = svm.SolverConfig(method="coordinate")
    masks = jnp.asarray(rng.random((3, 60)) < 0.5, jnp.float32)

    def fit(weight, cost):
        found = svm.solve(features, labels, num_classes=4, cost=cost, sample_weight=weight, config=config)
        return found.coefficients, found.info.gap

    each = [jax.jit(fit)(mask, jnp.float32(1e-2)) for mask in masks]
    both = jax.vmap(fit, (0, None))
    for mapped in (both, jax.jit(both), jax.vmap(jax.jit(fit), (0, None))):
        alpha, gap = mapped(masks, jnp.float32(1e-2))
        for got, one in zip(alpha, each, strict=True):
            np.testing.assert_array_equal(got, one[0])
        assert (np.asarray(gap) <= config.tolerance).all()
    # Nested, and over costs: every entry is the solve of its own problem.
    alpha, _ = jax.vmap(jax.vmap(fit, (None, 0)), (0, None))(masks, jnp.asarray([1e-3, 1e-2], jnp.float32))
    np.testing.assert_array_equal(alpha[2, 1], each[2][0])
    slope = jax.grad(lambda cost: jnp.sum(fit(masks[0], cost)[0] ** 2))
    both = jax.vmap(slope)(jnp.asarray([1e-3, 1e-2], jnp.float32))
    np.testing.assert_allclose(both[1], jax.jit(slope)(jnp.float32(1e-2)), rtol=1e-5)


def test_out_of_epochs_is_said(rng):
    features, labels = make(rng)
    config = svm.SolverConfig(tolerance=1e-6, max_epochs=3)
    with pytest.warns(svm.NotConvergedWarning, match=r"raise config\.max_epochs"):
        solution = svm.solve(features, labels, num_classes=4, cost=1e-1, config=config)
    assert not bool(solution.info.converged)
    assert float(solution.info.gap) > 1e-6


def test_not_finite_features(rng):
    features, labels = make(rng)
    features[[3, 8], 2] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"NaN or Inf in 2 of 60 rows, first in rows 3, 8"):
        svm.solve(features, labels, num_classes=4, cost=1e-3)
    solution = jax.jit(lambda f: svm.solve(f, labels, num_classes=4, cost=1e-3))(jnp.asarray(features))
    assert not bool(solution.info.converged)


def test_bad_values_inside_a_trace_are_no_answer(rng):
    features, labels = make(rng)
    good = np.full(60, 1e-3, np.float32)

    @jax.jit
    def converged(labels, cost):
        return svm.solve(features, labels, num_classes=4, cost=cost).info.converged

    one = np.arange(60) == 7
    assert bool(converged(labels, good))
    assert not bool(converged(labels, np.where(one, -good, good)))
    assert not bool(converged(labels, np.where(one, np.nan, good).astype(np.float32)))
    assert not bool(converged(labels, np.where(one, np.inf, good).astype(np.float32)))
    assert not bool(converged(np.where(one, 4, labels), good))
    assert not bool(converged(np.where(one, -1, labels), good))


def test_by_hand(rng):
    features, labels = make(rng)
    given = {"num_classes": 4, "cost": 1e-2}
    state = svm.init(features, labels, **given)
    for _ in range(100):
        state, info = svm.step(state, features, labels, **given)
        if float(info.gap) <= 1e-6:
            break
    solution = svm.finish(state, features, labels, **given)
    assert bool(solution.info.converged)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_stiff_problems_on_data_that_overlaps(rng, scale):
    # Cost times squared norm of 1e4 and more: Newton's direction overshoots until the penalty is softened.
    labels = rng.integers(0, 3, 60)
    features = scale * (rng.normal(size=(60, 5)) + rng.normal(size=(3, 5))[labels])
    for cost in (0.01, 1.0):
        solution = svm.solve(features, labels, num_classes=3, cost=cost)
        assert bool(solution.info.converged)
        primal, dual = svm.objectives(features, labels, solution.coefficients, num_classes=3, cost=cost)
        assert (primal - dual) / primal <= 1e-4


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_large_costs_in_float64(rng, compiled):
    features, labels = make(rng, 1000, 20, 5)
    config = svm.SolverConfig(tolerance=1e-8, block=128, method="coordinate")
    with jax.enable_x64(True):
        features = jnp.asarray(features, jnp.float64)

        def fit(cost):
            return svm.solve(features, labels, num_classes=5, cost=cost, config=config)

        fit = jax.jit(fit) if compiled else fit
        solution = fit(jnp.float64(100.0))
        assert bool(solution.info.converged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", svm.NotConvergedWarning)
            # Here float64 may not suffice: what is returned is the best that was found, and its gap is said.
            stiff = fit(jnp.float64(1e4))
        primal, dual = svm.objectives(features, labels, stiff.coefficients, num_classes=5, cost=1e4)
        gap = float((primal - dual) / primal)
    assert gap < 1e-4
    np.testing.assert_allclose(gap, float(stiff.info.gap), rtol=1e-2, atol=1e-10)
    assert bool(stiff.info.converged) == (float(stiff.info.gap) <= config.tolerance)
