import dataclasses

import jax
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import matthews_corrcoef

from dualxda_jax.evaluation import Faithfulness, surrogate_faithfulness


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
