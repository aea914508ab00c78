"""quanda's metrics on the same scores (golden/make_quanda.py)."""

import pathlib

import numpy as np
import pytest
from scipy.special import logsumexp

from dualxda_jax import evaluation


@pytest.fixture(scope="module")
def golden():
    return np.load(pathlib.Path(__file__).parent.parent / "golden" / "quanda.npz")


@pytest.mark.parametrize("k", [1, 5])
def test_class_and_subclass_detection(golden, k):
    g = golden
    for name, measure, labels, targets in (
        ("class", evaluation.class_detection, g["labels"], g["targets"]),
        ("subclass", evaluation.subclass_detection, g["fine"], g["fine_targets"]),
    ):
        got = measure(g["scores"], labels, targets, k=k, per_query=True)
        np.testing.assert_allclose(got, g[f"quanda_{name}_{k}"], rtol=1e-6)


def test_shortcut_detection(golden):
    keep = np.ones(len(golden["scores"]), bool)
    got = evaluation.shortcut_detection(golden["scores"], golden["marked"], keep=keep, per_query=True)
    np.testing.assert_allclose(got, golden["quanda_shortcut"], rtol=1e-5)


def test_mislabelling_curve_and_its_area(golden):
    """quanda's area is that of trapezoids from the first point on; the curve is the same."""
    found = evaluation.mislabeling_detection(golden["own"], golden["corrupted"])
    np.testing.assert_allclose(found.curve, golden["quanda_mislabel_curve"], rtol=1e-6, atol=1e-7)
    curve = np.asarray(found.curve)
    trapezoids = (curve.sum() - (curve[0] + curve[-1]) / 2) / len(curve)
    assert trapezoids == pytest.approx(float(golden["quanda_mislabel_score"]), rel=1e-5)


def test_lds(golden):
    logits, targets = golden["logits"].astype(np.float64), golden["targets"]
    own = np.take_along_axis(logits, targets[None, :, None], axis=2)[..., 0]
    others = logits.copy()
    np.put_along_axis(others, np.broadcast_to(targets[None, :, None], (*own.shape, 1)), -np.inf, axis=2)
    margins = own - logsumexp(others, axis=2)
    got = evaluation.lds(golden["scores"], golden["subsets"], margins.astype(np.float32))
    np.testing.assert_allclose(got, golden["quanda_lds"], atol=1e-5)
