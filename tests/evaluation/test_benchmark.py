import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dualxda_jax import baselines
from dualxda_jax.evaluation import benchmark


def linear(params, x):
    return x @ params


@pytest.fixture(scope="module")
def context():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(30, 4)).astype(np.float32), np.arange(30) % 3
    params = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    return baselines.context(linear, params, x, labels, num_classes=3, features=lambda params, x: x)


def test_blocks_are_the_scores_at_ragged_sizes(context, rng):
    method = baselines.similarity()
    fitted, seconds, compiled = benchmark.prepare(method, jax.random.key(0), context, timed=True)
    assert seconds > 0 and compiled
    x, targets = rng.normal(size=(7, 4)).astype(np.float32), np.arange(7) % 3
    whole = method.scores(fitted, jnp.asarray(x), jnp.asarray(targets))
    for chunk in (1, 3, 7, 100):
        seen = []

        def progress(done, total, seen=seen):
            seen.append((done, total))

        blocks = list(benchmark.score_blocks(method, fitted, x, targets, chunk=chunk, progress=progress))
        np.testing.assert_allclose(np.concatenate([b for _, b, _ in blocks]), whole, rtol=1e-5, atol=1e-5)
        assert [part.stop for part, _, _ in blocks] == [done for done, _ in seen]
        assert all(seconds > 0 for _, _, seconds in blocks)


def test_what_a_fit_keeps_is_counted_without_what_it_was_given(context):
    fitted = baselines.similarity().fit(jax.random.key(0), context)
    assert benchmark.kept_bytes(fitted, context) == 30 * 4 * 4
    assert benchmark.kept_bytes({"a": context, "b": jnp.zeros(3)}, context) == 12


def test_a_score_that_is_not_finite_names_the_method_and_the_query(context):
    method = baselines.similarity()
    broken = dataclasses.replace(method, scores=lambda f, x, t: jnp.zeros((2, 30)).at[1, 0].set(jnp.nan))
    fitted = method.fit(jax.random.key(0), context)
    with pytest.raises(ValueError, match=r"scores of similarity: got NaN or Inf for query 1"):
        list(benchmark.score_blocks(broken, fitted, np.zeros((2, 4)), np.zeros(2, int)))


def test_ranks_against_scipy_and_by_hand(rng):
    values = rng.integers(0, 4, (9, 2)).astype(float)
    got = benchmark.ranks(values, [True, False])
    np.testing.assert_array_equal(got[:, 0], stats.rankdata(-values[:, 0]))
    np.testing.assert_array_equal(got[:, 1], stats.rankdata(values[:, 1]))
    holes = benchmark.ranks([[np.nan, np.nan], [0.5, np.nan], [np.nan, np.nan], [0.9, np.nan]], [True, True])
    np.testing.assert_array_equal(holes[:, 0], [3.5, 2.0, 3.5, 1.0])
    assert np.isnan(holes[:, 1]).all()
    with pytest.raises(ValueError, match=r"^values: got"):
        benchmark.ranks(np.zeros(3), [True])
