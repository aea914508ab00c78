import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score

from dualxda_jax.evaluation import lds, mislabeling_detection, place_values, shortcut_detection


def test_mislabelling_by_hand():
    got = mislabeling_detection(np.array([0.1, 0.9, 0.5, 0.7]), np.array([False, True, True, False]))
    np.testing.assert_allclose(got.curve, [0.5, 0.5, 1.0, 1.0])
    assert got.area == pytest.approx(0.75)
    # Best order: 0.5, 1, 1, 1; worst: 0, 0, 0.5, 1.
    assert got.normalized == pytest.approx((3.0 - 1.5) / (3.5 - 1.5))


def test_mislabelling_ends_of_the_scale(rng):
    corrupted = rng.random(50) < 0.3
    assert mislabeling_detection(corrupted + rng.random(50) / 2, corrupted).normalized == pytest.approx(1.0)
    assert mislabeling_detection(-1.0 * corrupted - rng.random(50) / 2, corrupted).normalized == pytest.approx(
        0, abs=1e-6
    )


def test_mislabelling_ties_are_the_mean_over_all_orders():
    values, corrupted = np.array([1.0, 0.0, 0.0, 0.0, -1.0]), np.array([False, True, False, False, True])
    orders = [[0, *middle, 4] for middle in itertools.permutations([1, 2, 3])]
    expected = np.mean([np.cumsum(corrupted[order]) / 2 for order in orders], axis=0)
    np.testing.assert_allclose(mislabeling_detection(values, corrupted).curve, expected, rtol=1e-6)


def test_mislabelling_of_equal_values_is_chance():
    got = mislabeling_detection(np.zeros(10), np.arange(10) < 3)
    np.testing.assert_allclose(got.curve, np.arange(1, 11) / 10, rtol=1e-6)
    assert got.normalized == pytest.approx(0.5)


def test_mislabelling_none_or_all():
    none = mislabeling_detection(np.arange(4.0), np.zeros(4, bool))
    assert np.isnan(none.curve).all() and np.isnan(none.area) and np.isnan(none.normalized)
    every = mislabeling_detection(np.arange(4.0), np.ones(4, bool))
    np.testing.assert_allclose(every.curve, [0.25, 0.5, 0.75, 1.0])
    assert np.isnan(every.normalized)


def test_place_values_average_to_the_normalised_area(rng):
    values = rng.integers(0, 6, 40).astype(np.float32)  # with ties
    corrupted = rng.random(40) < 0.3
    found = place_values(values, corrupted)
    assert found.shape == (corrupted.sum(),)
    assert np.mean(found) == pytest.approx(float(mislabeling_detection(values, corrupted).normalized), rel=1e-5)
    # Integers, which hold no -1 of their own to be ordered by.
    np.testing.assert_allclose(place_values(values.astype(np.uint8), corrupted), found)


def test_place_values_of_none_and_all_and_equal_ones():
    assert place_values(np.arange(4.0), np.zeros(4, bool)).shape == (0,)
    assert np.isnan(place_values(np.arange(4.0), np.ones(4, bool))).all()
    np.testing.assert_allclose(place_values(np.zeros(4), np.array([True, False, True, False])), 0.5)


@pytest.mark.parametrize("q", [1, 15, 16, 17])
def test_shortcut_against_scikit_learn(rng, q):
    # Rounded, so that most scores are tied, as those of a sparse method are.
    scores = np.round(np.maximum(rng.normal(size=(q, 60)), 0.0), 1).astype(np.float32)
    marked, keep = rng.random(60) < 0.2, np.ones(q, bool)
    keep[1::3] = False
    expected = [average_precision_score(marked, row) for row in scores[keep]]
    np.testing.assert_allclose(shortcut_detection(scores, marked, keep=keep, per_query=True), expected, rtol=1e-5)
    assert shortcut_detection(scores, marked, keep=keep) == pytest.approx(np.mean(expected), rel=1e-5)


def test_shortcut_without_queries_or_marks():
    scores, marked = np.zeros((2, 3)), np.array([True, False, False])
    assert np.isnan(shortcut_detection(scores, marked, keep=np.zeros(2, bool)))
    assert shortcut_detection(scores, marked, keep=np.zeros(2, bool), per_query=True).shape == (0,)
    assert np.isnan(shortcut_detection(scores, np.zeros(3, bool), keep=np.ones(2, bool)))


def test_shortcut_under_jit(rng):
    scores, marked = rng.normal(size=(6, 20)).astype(np.float32), rng.random(20) < 0.4
    keep = np.array([True, False, True, True, False, False])
    eager = shortcut_detection(scores, marked, keep=keep)
    traced = jax.jit(lambda s, m, k: shortcut_detection(s, m, keep=k))(scores, marked, keep)
    assert traced == pytest.approx(float(eager), rel=1e-6)
    with pytest.raises(ValueError, match=r"^keep: got a traced"):
        jax.jit(lambda k: shortcut_detection(scores, marked, keep=k, per_query=True))(keep)


def test_lds_known_numbers():
    scores = np.array([[0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.3, 0.4]])
    subsets = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]], bool)
    outputs = np.array([[0.3, 0.3], [0.4, 0.4], [0.5, 0.3]])
    np.testing.assert_allclose(lds(scores, subsets, outputs), [1.0, 0.8660254], rtol=1e-6)


def test_lds_against_scipy_with_ties(rng):
    # Integers: sums are exact, so that ties are the same on both sides.
    scores = rng.integers(-2, 3, size=(18, 25)).astype(np.float32)
    subsets, outputs = rng.random((12, 25)) < 0.5, rng.integers(0, 6, size=(12, 18)).astype(np.float32)
    sums = scores @ subsets.T.astype(np.float32)
    expected = [stats.spearmanr(sums[i], outputs[:, i]).statistic for i in range(18)]
    np.testing.assert_allclose(lds(scores, subsets, outputs), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_lds_of_narrow_scores_sums_in_float32(rng, dtype):
    # Sums of bfloat16 would have three digits, and those of float16 would be infinite.
    scores = jnp.asarray(400 + 40 * rng.normal(size=(3, 2000)), dtype)
    subsets, outputs = rng.random((30, 2000)) < 0.5, rng.normal(size=(30, 3)).astype(np.float32)
    wide = lds(np.asarray(scores, np.float32), subsets, outputs)
    np.testing.assert_allclose(lds(scores, subsets, outputs), wide, atol=1e-6)


def test_lds_of_constant_scores_is_nan(rng):
    subsets = np.array([[1, 0], [0, 1]], bool)
    got = lds(np.array([[0.0, 0.0], [1.0, 2.0]]), subsets, np.array([[1.0, 2.0], [2.0, 1.0]]))
    assert np.isnan(got[0]) and got[1] == pytest.approx(-1.0)


@pytest.mark.parametrize("m", [2, 7, 13, 14, 15, 26, 100])
def test_lds_of_what_is_constant_is_nan_for_any_number_of_subsets(rng, m):
    subsets, one = rng.random((m, 5)) < 0.5, np.ones((m, 1))
    subsets[:, 0] = True
    scores, outputs = rng.normal(size=(1, 5)), rng.normal(size=(m, 1))
    for s, o in ((0 * scores, one), (0 * scores, outputs), (scores, one)):
        assert np.isnan(lds(s, subsets, o)).all()


def test_nan_inside_a_trace_stays_nan():
    bad = jnp.array([[1.0, jnp.nan, 0.0]])
    marked = jnp.array([True, False, True])
    subsets, outputs = jnp.array([[True, True, False], [True, False, True]]), jnp.array([[1.0], [2.0]])
    assert jnp.isnan(jax.jit(lambda s: lds(s, subsets, outputs))(bad)).all()
    assert jnp.isnan(jax.jit(lambda s: shortcut_detection(s, marked, keep=jnp.array([True])))(bad))
    assert jnp.isnan(jax.jit(lambda s: mislabeling_detection(s, marked).area)(bad[0]))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: mislabeling_detection(np.zeros((2, 2)), np.zeros(2, bool)), "self_influence"),
        (lambda: mislabeling_detection(np.zeros(0), np.zeros(0, bool)), "self_influence"),
        (lambda: mislabeling_detection(np.array([1.0, np.nan]), np.zeros(2, bool)), "self_influence"),
        (lambda: mislabeling_detection(np.zeros(2), np.zeros(3, bool)), "corrupted"),
        (lambda: mislabeling_detection(np.zeros(2), np.array([0, 1])), "corrupted"),
        (lambda: place_values(np.zeros((2, 2)), np.zeros(2, bool)), "self_influence"),
        (lambda: place_values(np.array([1.0, np.nan]), np.zeros(2, bool)), "self_influence"),
        (lambda: place_values(np.zeros(3), np.array([0, 1, 0])), "corrupted"),
        (lambda: jax.jit(place_values)(np.zeros(2), np.ones(2, bool)), "self_influence"),
        (lambda: shortcut_detection(np.full((1, 2), np.nan), np.ones(2, bool), keep=np.ones(1, bool)), "scores"),
        (lambda: shortcut_detection(np.zeros((1, 2)), np.ones(3, bool), keep=np.ones(1, bool)), "marked"),
        (lambda: shortcut_detection(np.zeros((1, 2)), np.ones(2, bool), keep=np.array([0])), "keep"),
        (lambda: lds(np.zeros((1, 2)), np.ones((3, 2)), np.zeros((3, 1))), "subsets"),
        (lambda: lds(np.zeros((1, 2)), np.ones((1, 2), bool), np.zeros((1, 1))), "subsets"),
        (lambda: lds(np.zeros((1, 2)), np.array([[True, True], [False, False]]), np.zeros((2, 1))), "subsets"),
        (lambda: lds(np.zeros((1, 2)), np.ones((3, 2), bool), np.zeros((1, 3))), "outputs"),
        (lambda: lds(np.zeros((1, 2)), np.ones((2, 2), bool), np.full((2, 1), np.nan)), "outputs"),
        (lambda: lds(np.zeros((1, 2)), np.ones((2, 2), bool), np.zeros((2, 1), complex)), "outputs"),
        (lambda: lds(np.zeros((1, 2), complex), np.ones((2, 2), bool), np.zeros((2, 1))), "scores"),
        (lambda: mislabeling_detection(np.zeros(2, complex), np.zeros(2, bool)), "self_influence"),
    ],
)
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        call()
