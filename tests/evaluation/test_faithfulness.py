import dataclasses

import jax
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import matthews_corrcoef

from dualxda_jax.evaluation import (
    Faithfulness,
    faithfulness_intervals,
    faithfulness_per_query,
    surrogate_faithfulness,
)


@pytest.fixture
def case(rng):
    network, queries = rng.normal(size=(5, 12)), rng.normal(size=(40, 12))
    surrogate = network + 0.7 * rng.normal(size=network.shape)
    return [network, surrogate, queries @ network.T, queries @ surrogate.T]


def test_a_perfect_surrogate_is_one_in_all_four(case):
    network, _, logits, _ = case
    got = surrogate_faithfulness(network, 3 * network, logits, 3 * logits)
    np.testing.assert_allclose(dataclasses.astuple(got), 1.0, rtol=1e-12)


def test_against_scipy_and_scikit_learn(case):
    network, surrogate, a, b = case
    # Ties within a query, which τ-b corrects for.
    a, b = np.round(a), np.round(b)
    got = surrogate_faithfulness(network, surrogate, a, b)
    cosine = np.mean([v @ w / np.sqrt((v @ v) * (w @ w)) for v, w in zip(network, surrogate, strict=True)])
    assert got.weight_cosine == pytest.approx(cosine, rel=1e-12)
    assert got.logit_correlation == pytest.approx(stats.pearsonr(a.ravel(), b.ravel()).statistic, rel=1e-12)
    assert got.matthews == pytest.approx(matthews_corrcoef(a.argmax(1), b.argmax(1)), rel=1e-12)
    taus = [stats.kendalltau(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert got.kendall_tau == pytest.approx(np.mean(taus), rel=1e-12)


def test_kendall_by_counting_pairs():
    a, b = np.array([[0.0, 1.0, 2.0, 3.0]]), np.array([[0.0, 2.0, 1.0, 3.0]])
    weights = np.eye(4)
    assert surrogate_faithfulness(weights, weights, a, b).kendall_tau == pytest.approx((5 - 1) / 6)


def test_opposite_surrogate(case):
    network, _, logits, _ = case
    got = surrogate_faithfulness(network, -network, logits, -logits)
    np.testing.assert_allclose([got.weight_cosine, got.logit_correlation, got.kendall_tau], -1.0, rtol=1e-12)


def test_what_has_no_value_is_nan(case):
    network, surrogate, a, _ = case
    got = surrogate_faithfulness(network, 0 * surrogate, a, np.zeros_like(a))
    assert all(np.isnan(value) for value in dataclasses.astuple(got))


def test_rows_and_queries_without_a_value_are_left_out(case):
    network, surrogate, a, b = case
    surrogate[2], b[7] = 0.0, 1.5
    got = surrogate_faithfulness(network, surrogate, a, b)
    rows, queries = np.arange(5) != 2, np.arange(40) != 7
    rest = surrogate_faithfulness(network[rows], surrogate[rows], a[queries][:, rows], b[queries][:, rows])
    assert got.weight_cosine == pytest.approx(rest.weight_cosine, rel=1e-12)
    kept = surrogate_faithfulness(network, surrogate, a[queries], b[queries])
    assert got.kendall_tau == pytest.approx(kept.kendall_tau, rel=1e-12)


def test_predictions_of_one_class_leave_matthews_without_a_value(case):
    network, surrogate, a, b = case
    b[:, 3] = 100.0
    got = surrogate_faithfulness(network, surrogate, a, b)
    assert np.isnan(got.matthews) and np.isfinite(got.kendall_tau)


def test_is_a_pytree():
    measures = Faithfulness(0.1, 0.2, 0.3, 0.4)
    assert jax.tree.map(lambda value: 2 * value, measures) == Faithfulness(0.2, 0.4, 0.6, 0.8)


def test_values_per_query_and_per_class(case):
    _, surrogate, a, b = case
    surrogate[2], b[7] = 0.0, 1.5
    whole, each = surrogate_faithfulness(*case), faithfulness_per_query(*case)
    assert each.weight_cosine.shape == (5,) and all(
        v.shape == (40,) for v in (each.logit_correlation, each.matthews, each.kendall_tau)
    )
    assert np.nanmean(each.weight_cosine) == pytest.approx(whole.weight_cosine, rel=1e-12)
    assert np.nanmean(each.kendall_tau) == pytest.approx(whole.kendall_tau, rel=1e-12)
    np.testing.assert_array_equal(each.matthews, a.argmax(1) == b.argmax(1))
    expected = [np.nan if i == 7 else stats.pearsonr(a[i], b[i]).statistic for i in range(40)]
    np.testing.assert_allclose(each.logit_correlation, expected, rtol=1e-10)
    assert np.isnan(each.weight_cosine[2]) and np.isnan(each.kendall_tau[7])


def test_intervals_against_scipy(case):
    _, _, a, b = case
    got = faithfulness_intervals(*case, jax.random.key(0), resamples=3000)

    def theirs(statistic, size=40):
        bounds = stats.bootstrap(
            (np.arange(size),), statistic, n_resamples=3000, method="percentile", vectorized=False, random_state=0
        )
        return bounds.confidence_interval

    each = faithfulness_per_query(*case)
    for name, statistic, size in (
        ("weight_cosine", lambda rows: np.mean(each.weight_cosine[rows]), 5),
        ("logit_correlation", lambda rows: stats.pearsonr(a[rows].ravel(), b[rows].ravel()).statistic, 40),
        ("matthews", lambda rows: matthews_corrcoef(a[rows].argmax(1), b[rows].argmax(1)), 40),
        ("kendall_tau", lambda rows: np.mean(each.kendall_tau[rows]), 40),
    ):
        interval, expected = getattr(got, name), theirs(statistic, size)
        # Two draws of 3,000 resamples differ by about this in an end of the interval.
        noise = 0.05 * (expected.high - expected.low)
        assert interval.low == pytest.approx(expected.low, abs=noise), name
        assert interval.high == pytest.approx(expected.high, abs=noise), name
        assert interval.mean == pytest.approx(getattr(surrogate_faithfulness(*case), name), rel=1e-12)
        assert interval.defined == size


def test_intervals_of_a_perfect_surrogate_and_of_what_has_no_value(case):
    network, _, a, _ = case
    perfect = faithfulness_intervals(network, 2 * network, a, 2 * a, jax.random.key(0), resamples=50)
    for interval in (getattr(perfect, f.name) for f in dataclasses.fields(perfect)):
        np.testing.assert_allclose([interval.mean, interval.low, interval.high], 1.0, rtol=1e-12)
    none = faithfulness_intervals(network, 0 * network, a, 0 * a, jax.random.key(0), resamples=50)
    for interval in (getattr(none, f.name) for f in dataclasses.fields(none)):
        assert np.isnan([interval.mean, interval.low, interval.high]).all()
    assert none.weight_cosine.defined == none.kendall_tau.defined == 0
    one = faithfulness_intervals(network, network, a[:1], a[:1], jax.random.key(0), resamples=50)
    assert one.kendall_tau.low == one.kendall_tau.high == pytest.approx(1.0) and np.isnan(one.matthews.low)


@pytest.mark.parametrize(
    ("name", "options"), [("key", {"key": 0}), ("resamples", {"resamples": 0}), ("level", {"level": 1.0})]
)
def test_bad_options_of_intervals_are_named(case, name, options):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        faithfulness_intervals(*case, **{"key": jax.random.key(0), **options})


@pytest.mark.parametrize(
    ("position", "value", "name"),
    [
        (0, np.zeros(5), "network_weights"),
        (0, np.zeros((1, 12)), "surrogate_weights"),
        (1, np.zeros((5, 11)), "surrogate_weights"),
        (1, np.full((5, 12), np.nan), "surrogate_weights"),
        (2, np.zeros((40, 4)), "surrogate_logits"),
        (3, np.full((40, 5), np.inf), "surrogate_logits"),
    ],
)
def test_bad_input_is_named(case, position, value, name):
    case[position] = value
    with pytest.raises(ValueError, match=f"^{name}: got"):
        surrogate_faithfulness(*case)


def test_one_class_and_no_queries_are_refused():
    with pytest.raises(ValueError, match=r"^network_weights: got 1 rows"):
        surrogate_faithfulness(np.ones((1, 3)), np.ones((1, 3)), np.ones((4, 1)), np.ones((4, 1)))
    with pytest.raises(ValueError, match=r"^network_logits: got"):
        surrogate_faithfulness(np.ones((2, 3)), np.ones((2, 3)), np.ones((0, 2)), np.ones((0, 2)))
    with pytest.raises(ValueError, match=r"^network_logits: got"):
        surrogate_faithfulness(np.ones((2, 3)), np.ones((2, 3)), np.ones((4, 3)), np.ones((4, 3)))
