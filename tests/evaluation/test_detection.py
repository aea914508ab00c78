import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import evaluation


def by_enumeration(row, labels, target, k):
    """The mean over all orders in which the ties could have been broken."""
    order = np.sort(row)[::-1]
    above, tied = row > order[k - 1], row == order[k - 1]
    hits = np.sum(labels[above] == target) + (k - above.sum()) * np.mean(labels[tied] == target)
    return hits / k


def test_known_numbers():
    scores = np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    labels, targets = np.array([1, 1, 0, 0, 1]), np.array([1, 1])
    np.testing.assert_allclose(evaluation.class_detection(scores, labels, targets, k=3, per_query=True), [2 / 3, 1 / 3])
    assert evaluation.class_detection(scores, labels, targets, k=3) == pytest.approx(0.5)
    assert evaluation.class_detection(scores, labels, targets) == pytest.approx(0.6)


def test_tied_samples_share_the_places_left():
    # One place goes to the first sample; four zeros, one of which has the label, share the other three.
    scores, labels = np.array([[2.0, 0.0, 0.0, 0.0, 0.0, -1.0]]), np.array([1, 1, 0, 0, 0, 1])
    got = evaluation.class_detection(scores, labels, np.array([1]), k=4)
    assert got == pytest.approx((1 + 3 / 4) / 4)


def test_ties_do_not_depend_on_the_order(rng):
    scores = rng.integers(0, 3, size=(20, 40)).astype(np.float32)
    labels, targets = rng.integers(0, 4, size=40), rng.integers(0, 4, size=20)
    shuffle = rng.permutation(40)
    a = evaluation.class_detection(scores, labels, targets, k=7, per_query=True)
    b = evaluation.class_detection(scores[:, shuffle], labels[shuffle], targets, k=7, per_query=True)
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("q", [1, 63, 64, 65, 130])
def test_chunks_of_any_size(rng, q):
    scores = np.maximum(rng.normal(size=(q, 30)), 0.5).astype(np.float32)
    labels, targets = rng.integers(0, 3, size=30), rng.integers(0, 3, size=q)
    got = evaluation.subclass_detection(scores, labels, targets, k=10, per_query=True)
    expected = [by_enumeration(row, labels, t, 10) for row, t in zip(scores, targets, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_all_scores_equal_gives_the_share_of_the_class():
    got = evaluation.class_detection(np.zeros((1, 8)), np.array([0, 0, 1, 1, 1, 1, 2, 2]), np.array([1]), k=5)
    assert got == pytest.approx(0.5)


def test_infinite_scores_are_ranked():
    scores = np.array([[np.inf, 1.0, -np.inf]])
    assert evaluation.class_detection(scores, np.array([0, 1, 0]), np.array([0]), k=2) == pytest.approx(0.5)


def test_label_dtypes_may_differ():
    labels = np.array([0, 1], np.uint8)
    scores = jnp.asarray([[1.0, 0.0]], jnp.bfloat16)
    assert evaluation.class_detection(scores, labels, np.array([0], np.int64), k=1) == 1.0


def test_under_jit_and_nan_inside_it():
    labels, targets = jnp.array([0, 1, 0]), jnp.array([0, 1])
    run = jax.jit(lambda s: evaluation.class_detection(s, labels, targets, k=2, per_query=True))
    got = run(jnp.array([[3.0, 2.0, 1.0], [1.0, jnp.nan, 0.0]]))
    np.testing.assert_allclose(got, [0.5, np.nan])


GOOD = {"scores": np.zeros((2, 3)), "train_labels": np.array([0, 1, 1]), "targets": np.array([0, 1]), "k": 2}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scores", np.zeros(3)),
        ("scores", np.zeros((0, 3))),
        ("scores", np.array([[0, 1, 2], [0, np.nan, 1]])),
        ("train_labels", np.array([0, 1])),
        ("train_labels", np.array([0.0, 1.0, 1.0])),
        ("train_labels", np.array([0, -1, 1])),
        ("targets", np.array([0, 1, 1])),
        ("targets", np.array([True, False])),
        ("k", 0),
        ("k", 4),
        ("k", 1.5),
        ("k", True),
    ],
)
@pytest.mark.parametrize("metric", [evaluation.class_detection, evaluation.subclass_detection])
def test_bad_input_is_named(metric, name, value):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        metric(**{**GOOD, name: value})
