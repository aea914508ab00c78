import jax
import numpy as np
import pytest
from scipy import stats

from dualxda_jax.evaluation import bootstrap

KEY = jax.random.key(0)


def test_against_scipy(rng):
    values = rng.exponential(size=80).astype(np.float32)
    got = bootstrap(values, KEY, resamples=4000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", random_state=0
    ).confidence_interval
    # Two draws of 4,000 resamples differ by about this in an end of the interval.
    noise = 0.05 * float(values.std())
    assert got.mean == pytest.approx(values.mean(), rel=1e-6) and got.defined == 80
    assert got.low == pytest.approx(theirs.low, abs=noise) and got.high == pytest.approx(theirs.high, abs=noise)


def test_values_that_are_nan_are_left_out(rng):
    values = rng.normal(size=40)
    holes = np.full(60, np.nan)
    holes[rng.permutation(60)[:40]] = values
    got = bootstrap(holes, KEY, resamples=3000)
    whole = bootstrap(values, KEY, resamples=3000)
    assert got.defined == 40 and got.mean == pytest.approx(values.mean(), rel=1e-5)
    assert got.low == pytest.approx(float(whole.low), abs=0.03) and got.high == pytest.approx(
        float(whole.high), abs=0.03
    )


def test_nothing_defined_one_value_and_equal_values():
    none = bootstrap(np.full(3, np.nan), KEY)
    assert np.isnan([none.mean, none.low, none.high]).all() and none.defined == 0
    one = bootstrap(np.array([2.0, np.nan]), KEY)
    assert (one.mean, one.low, one.high) == (2.0, 2.0, 2.0)
    equal = bootstrap(np.full(10, 0.1, np.float32), KEY)
    np.testing.assert_allclose([equal.low, equal.high], equal.mean, rtol=1e-6)


def test_an_interval_holds_its_mean_whatever_float32_rounds(rng):
    equal = bootstrap(np.full(200, 0.3, np.float32), KEY)
    assert equal.low == equal.mean == equal.high == np.float32(0.3)
    far = (rng.random(200) + 1e6).astype(np.float32)
    got = bootstrap(far, KEY)
    assert got.low <= got.mean <= got.high
    assert abs(float(got.mean) - far.astype(np.float64).mean()) <= np.spacing(np.float32(1e6)) / 2


def test_under_jit_and_by_key(rng):
    values = rng.normal(size=30).astype(np.float32)
    a, b = bootstrap(values, KEY), jax.jit(bootstrap)(values, KEY)
    np.testing.assert_allclose(jax.tree.leaves(a), jax.tree.leaves(b), rtol=1e-6)
    assert bootstrap(values, jax.random.key(1)).low != a.low
    wide, narrow = (bootstrap(values, KEY, level=level) for level in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("values", lambda: bootstrap(np.zeros((2, 2)), KEY)),
        ("values", lambda: bootstrap(np.zeros(0), KEY)),
        ("values", lambda: bootstrap(np.array([np.inf]), KEY)),
        ("key", lambda: bootstrap(np.zeros(2), 0)),
        ("resamples", lambda: bootstrap(np.zeros(2), KEY, resamples=0)),
        ("level", lambda: bootstrap(np.zeros(2), KEY, level=1.0)),
    ],
)
def test_bad_input_is_named(name, call):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        call()
