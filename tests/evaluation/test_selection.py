import jax
import numpy as np
import pytest

from dualxda_jax.evaluation import coreset_selection, data_pruning
from dualxda_jax.evaluation.selection import ranking

SCORES = np.array([[3.0, -1.0, 0.0, 0.5], [-3.0, 1.5, 0.0, 0.0]], np.float32)  # importance 6, 2.5, 0, 0.5


def recorder(values):
    seen = []

    def retrain(keep):
        seen.append(keep)
        return values

    return seen, retrain


def test_coreset_keeps_and_pruning_removes_the_most_important():
    seen, retrain = recorder([4.0, 2.0, 1.0])
    curve = coreset_selection(SCORES, retrain, fractions=(1.0, 0.25, 0.5))
    np.testing.assert_array_equal(seen[0], [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(curve.fractions, [0.25, 0.5, 1.0])
    # Trapezoids: 3 · 0.25 + 1.5 · 0.5, over the width 0.75.
    assert curve.area == pytest.approx((0.75 + 0.75) / 0.75) and curve.per_query is None
    seen, retrain = recorder([1.0, 2.0])
    data_pruning(SCORES, retrain, fractions=(0.25, 0.5))
    np.testing.assert_array_equal(seen[0], [[0, 1, 1, 1], [0, 0, 1, 1]])


def test_values_per_query_keep_their_own_areas():
    _, retrain = recorder([[1.0, 3.0, 2.0], [3.0, 5.0, 1.0]])
    curve = coreset_selection(SCORES, retrain, fractions=(0.5, 1.0))
    np.testing.assert_allclose(curve.values, [2.0, 3.0])
    np.testing.assert_allclose(curve.per_query, [2.0, 4.0, 1.5])
    assert curve.area == pytest.approx(np.mean(curve.per_query))


def test_one_fraction_has_its_value_as_area():
    assert coreset_selection(SCORES, lambda keep: [0.7], fractions=(0.5,)).area == pytest.approx(0.7)


def test_equal_samples_are_taken_in_a_random_order_of_the_key():
    scores = np.zeros((1, 200))
    scores[0, 150] = -1.0
    a, b = (ranking(scores, key=jax.random.key(seed)) for seed in (0, 1))
    assert a[0] == b[0] == 150 and sorted(a) == list(range(200))
    assert not np.array_equal(a, b) and np.array_equal(a, ranking(scores))
    # No preference for the start of the data set.
    assert 70 < np.mean(a[:100]) < 130


def test_many_queries_do_not_drown_small_importance():
    scores = np.full((5000, 2), 1e4, np.float32)
    scores[:, 1] += 0.01
    assert ranking(scores)[0] == 1


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("scores", lambda: coreset_selection(np.zeros(3), lambda keep: [0.0], fractions=(0.5,))),
        ("scores", lambda: coreset_selection(np.full((1, 3), np.nan), lambda keep: [0.0], fractions=(0.5,))),
        ("scores", lambda: data_pruning(np.full((1, 3), np.inf), lambda keep: [0.0], fractions=(0.5,))),
        ("fractions", lambda: coreset_selection(SCORES, lambda keep: [0.0], fractions=())),
        ("fractions", lambda: coreset_selection(SCORES, lambda keep: [0.0], fractions=(0.0,))),
        ("fractions", lambda: coreset_selection(SCORES, lambda keep: [0.0], fractions=(1.1,))),
        ("fractions", lambda: coreset_selection(SCORES, lambda keep: [0.0, 0.0], fractions=(0.5, 0.5))),
        ("fractions", lambda: coreset_selection(SCORES, lambda keep: [0.0], fractions=("a",))),
        ("key", lambda: coreset_selection(SCORES, lambda keep: [0.0], fractions=(0.5,), key=3)),
        ("fractions", lambda: data_pruning(SCORES, lambda keep: [0.0], fractions=(1.0,))),
        ("fractions", lambda: data_pruning(SCORES, lambda keep: [0.0], fractions=(0.9,))),
        ("retrain", lambda: coreset_selection(SCORES, lambda keep: [0.0], fractions=(0.5, 1.0))),
        ("retrain", lambda: coreset_selection(SCORES, lambda keep: [0.0, np.nan], fractions=(0.5, 1.0))),
    ],
)
def test_bad_input_is_named(name, call):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        call()


@pytest.mark.parametrize("select", [coreset_selection, data_pruning])
@pytest.mark.parametrize(
    "retrain", [5, None, lambda keep: "abc", lambda keep: [[1.0], [1.0, 2.0]], lambda keep: 1j * np.ones(len(keep))]
)
def test_a_retrain_that_gives_no_numbers_is_refused_by_name(select, retrain):
    with pytest.raises(ValueError, match=r"^retrain: got a"):
        select(SCORES, retrain, fractions=(0.25, 0.5))
