"""What the checks of maps report is right by hand, and true maps of a planted shortcut pass them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import data, evaluation, models, xda


def test_the_share_by_hand():
    maps = np.zeros((3, 2, 2, 2), np.float32)
    maps[0, 0, 0] = [3.0, 1.0]
    maps[0, 1, 1] = [4.0, -9.0]
    maps[1, 0, 0] = [-1.0, 2.0]
    mask = np.asarray([[True, False], [False, False]])
    share = evaluation.mark_relevance_share(maps, mask)
    np.testing.assert_allclose(share, [0.5, 1.0, np.nan])
    np.testing.assert_allclose(jax.jit(evaluation.mark_relevance_share)(maps, mask), share)
    each = np.stack([mask, ~mask, mask])
    np.testing.assert_allclose(evaluation.mark_relevance_share(maps, each), [0.5, 0.0, np.nan])


def weights(shape):
    return jnp.asarray(np.random.default_rng(0).uniform(0.1, 1.0, shape), jnp.float32)


def test_flipping_a_linear_score_by_hand():
    x = jnp.ones((2, 4, 5, 1))
    w = weights((4, 5, 1))

    def score(x):
        return (x * w[None]).sum((1, 2, 3))

    relevance = x * w[None]
    fractions = (0.0, 0.1, 0.5, 1.0)
    found = evaluation.pixel_flipping(score, x, relevance, jax.random.key(0), fractions=fractions, orders=3)
    from_below = np.sort(np.asarray(w).ravel())
    expected = [from_below[: 20 - gone].sum() for gone in (0, 2, 10, 20)]
    np.testing.assert_allclose(found.scores, [expected] * 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.random[:, [0, 3]], [[expected[0], 0.0]] * 2, rtol=1e-5, atol=1e-6)
    assert (found.random[:, 1:3] > found.scores[:, 1:3]).all(), "no order beats the best"
    ahead = (found.random - found.scores).mean(1) / expected[0]
    np.testing.assert_allclose(found.advantage, ahead, rtol=1e-5)
    np.testing.assert_allclose(found.original, expected[0], rtol=1e-5)
    worst = evaluation.pixel_flipping(score, x, -relevance, jax.random.key(0), fractions=fractions, orders=3)
    assert (worst.advantage < 0).all()


def test_removed_pixels_take_the_baseline():
    x = jnp.ones((1, 2, 2, 3))
    relevance = jnp.zeros((1, 2, 2, 3)).at[0, 1, 0, 2].set(1.0)
    found = evaluation.pixel_flipping(
        lambda x: x[:, 1, 0].sum(1),
        x,
        relevance,
        jax.random.key(0),
        fractions=[0.25],
        baseline=jnp.full((1, 1, 3), 5.0),
    )
    np.testing.assert_allclose(found.scores, [[15.0]])
    nothing = evaluation.pixel_flipping(lambda x: 0 * x.sum((1, 2, 3)), x, relevance, jax.random.key(0))
    assert np.isnan(nothing.advantage).all()


def test_bad_input_is_named():
    maps, mask = np.zeros((2, 3, 3, 1)), np.ones((3, 3), bool)
    with pytest.raises(ValueError, match="maps"):
        evaluation.mark_relevance_share(maps[0], mask)
    with pytest.raises(ValueError, match="mask"):
        evaluation.mark_relevance_share(maps, mask[:2])
    with pytest.raises(ValueError, match="bool"):
        evaluation.mark_relevance_share(maps, mask.astype(int))
    x, key = jnp.ones((2, 3, 3, 1)), jax.random.key(0)

    def score(x):
        return x.sum((1, 2, 3))

    with pytest.raises(ValueError, match="relevance"):
        evaluation.pixel_flipping(score, x, x[:1], key)
    with pytest.raises(ValueError, match="fractions"):
        evaluation.pixel_flipping(score, x, x, key, fractions=[1.5])
    with pytest.raises(ValueError, match="orders"):
        evaluation.pixel_flipping(score, x, x, key, orders=0)
    with pytest.raises(ValueError, match="score_fn"):
        evaluation.pixel_flipping(lambda x: x, x, x, key)
    with pytest.raises(ValueError, match=r"relevance: got NaN in 1 maps, first in row 1"):
        evaluation.pixel_flipping(score, x, x.at[1, 2, 0].set(jnp.nan), key)
    with pytest.raises(ValueError, match="relevance: got dtype complex64"):
        evaluation.pixel_flipping(score, x, x.astype(jnp.complex64), key)
    with pytest.raises(ValueError, match=r"x: got shape \(0, 3, 3, 1\)"):
        evaluation.pixel_flipping(score, x[:0], x[:0], key)
    for untyped in (jax.random.PRNGKey(0), 0):
        with pytest.raises(ValueError, match=r"key: got .* typed key"):
            evaluation.pixel_flipping(score, x, x, untyped)
    for orders in (1.5, True):
        with pytest.raises(ValueError, match="orders: got"):
            evaluation.pixel_flipping(score, x, x, key, orders=orders)
    for baseline in (jnp.ones((3, 2)), jnp.ones((1, 2, 3, 3, 1)), "mean"):
        with pytest.raises(ValueError, match="baseline: got"):
            evaluation.pixel_flipping(score, x, x, key, baseline=baseline)


@pytest.fixture(scope="module")
def shortcut():
    """A network whose first class has nothing in common but the mark; pairs of a marked test image and one of it."""
    sample, key = data.embedded_sample(), jax.random.key(0)
    kept = np.flatnonzero(np.isin(sample.train.labels, [8, 9]))[:600]
    labels = np.where(np.arange(600) % 3 == 0, 0, sample.train.labels[kept] - 7)
    images, marked = data.corruptions.shortcut_mark(sample.train.images[kept], labels, key, target_class=0, fraction=1)
    module = models.SmallCNN(num_classes=3)
    config = models.training.TrainConfig(steps=60, batch_size=64)
    params = models.training.fit(key, module, np.asarray(images), labels, config=config).variables
    model = models.from_linen(module, head="head")
    test = data.to_float(data.corruptions.mark(sample.test.images[np.isin(sample.test.labels, [8, 9])][:6]))
    assert (np.argmax(model.logits(params, test), axis=1) == 0).all(), "the network has to have learned the shortcut"
    return model.features, params, test, data.to_float(np.asarray(images)[np.asarray(marked)][:6])


def test_true_maps_of_a_shortcut_pass(shortcut):
    features, params, x_test, x_train = shortcut
    composite = xda.composites.epsilon_plus()
    maps = xda.explain_pairs(features, params, x_test, x_train, jnp.ones(6), composite=composite)
    mask = np.asarray(data.corruptions.mark(np.zeros((28, 28, 1), np.uint8)))[..., 0] > 0
    share = evaluation.mark_relevance_share(maps.test, mask)
    assert (share > 1.5 * mask.mean()).all()
    noise = jax.random.normal(jax.random.key(1), maps.test.shape)
    np.testing.assert_allclose(evaluation.mark_relevance_share(noise, mask).mean(), mask.mean(), atol=0.05)

    partner = features(params, x_train)
    flipping = jax.jit(
        lambda x, relevance, key: evaluation.pixel_flipping(
            lambda x: (features(params, x) * partner).sum(1), x, relevance, key, orders=2
        )
    )
    key = jax.random.key(2)
    curve = flipping(x_test, maps.test, key)
    np.testing.assert_allclose(curve.original, maps.score, rtol=1e-4)
    assert (curve.advantage > 0.1).all()
    assert curve.advantage.mean() > flipping(x_test, noise, key).advantage.mean() + 0.1
