"""What the maps promise: sums, signs, symmetry; and that every way of calling gives the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import types, xda
from dualxda_jax.xda import composites

CONSERVING = ["epsilon", "epsilon_plus", "epsilon_plus_flat", "excitation_backprop"]


def network(params, x):
    """Two convolutions and a dense layer, biases everywhere."""
    for kernel, bias in params["convolutions"]:
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + bias[None, None, None])
    x = x.reshape(x.shape[0], -1)
    return jax.nn.relu(x @ params["dense"][0] + params["dense"][1][None])


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.fixture
def params(rng):
    return {
        "convolutions": [
            (0.3 * normal(rng, 3, 3, 3, 4), 0.1 * normal(rng, 4)),
            (0.2 * normal(rng, 3, 3, 4, 6), 0.1 * normal(rng, 6)),
        ],
        "dense": (0.1 * normal(rng, 6 * 36, 8), 0.1 * normal(rng, 8)),
    }


@pytest.fixture
def images(rng):
    """RGB, both signs."""
    return normal(rng, 5, 6, 6, 3)


@pytest.mark.parametrize("name", CONSERVING)
def test_both_maps_sum_to_the_score(name, params, images):
    composite = getattr(composites, name)()
    pair = xda.explain_pair(network, params, images[0], images[1], -0.7, composite=composite)
    features = network(params, images[:2])
    np.testing.assert_allclose(pair.score, -0.7 * (features[0] * features[1]).sum(), rtol=1e-5)
    assert pair.test.shape == pair.train.shape == images.shape[1:]
    np.testing.assert_allclose(pair.test.sum(), pair.score, rtol=1e-3)
    np.testing.assert_allclose(pair.train.sum(), pair.score, rtol=1e-3)


def test_kept_biases_absorb_relevance(params, images):
    # Under z⁺ alone every share is positive, so that what positive biases take is missing at the input.
    composite = composites.excitation_backprop(zero_bias=False)
    params = jax.tree.map(lambda leaf: 10 * leaf if leaf.ndim == 1 else leaf, params)
    pair = xda.explain_pair(network, params, images[0], images[1], 1.0, composite=composite)
    assert 0 < pair.test.sum() < 0.99 * pair.score
    assert 0 < pair.train.sum() < 0.99 * pair.score


def test_swapping_the_pair_swaps_the_maps(params, images):
    composite = composites.epsilon_plus()
    one = xda.explain_pair(network, params, images[0], images[1], 0.5, composite=composite)
    other = xda.explain_pair(network, params, images[1], images[0], 0.5, composite=composite)
    np.testing.assert_allclose(one.score, other.score, rtol=1e-6)
    np.testing.assert_allclose(one.test, other.train, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(one.train, other.test, rtol=1e-4, atol=1e-6)


def test_the_sign_follows_the_coefficient(params, images):
    composite = composites.epsilon_alpha2_beta1()
    plus = xda.explain_pair(network, params, images[0], images[1], 2.0, composite=composite)
    minus = xda.explain_pair(network, params, images[0], images[1], -1.0, composite=composite)
    np.testing.assert_allclose(plus.test, -2 * minus.test, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(plus.train, -2 * minus.train, rtol=1e-4, atol=1e-6)


def test_a_zero_coefficient_gives_zero_maps(params, images):
    pair = xda.explain_pair(network, params, images[0], images[1], 0.0, composite=composites.epsilon_plus())
    assert not np.any(pair.test) and not np.any(pair.train) and pair.score == 0


@pytest.mark.parametrize("chunk_size", [2, 5])
def test_chunks_vmap_and_jit_agree_with_a_loop(chunk_size, params, images):
    composite = composites.epsilon_plus()
    coefficients = jnp.asarray([1.0, -0.5, 0.25, 2.0, -3.0])
    train = images[::-1]
    explain = functools.partial(xda.explain_pair, network, params, composite=composite)
    loop = [explain(a, b, c) for a, b, c in zip(images, train, coefficients, strict=True)]
    loop = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)
    chunked = xda.explain_pairs(
        network, params, images, train, coefficients, composite=composite, chunk_size=chunk_size
    )
    mapped = jax.jit(jax.vmap(explain))(images, train, coefficients)
    for found in (chunked, mapped):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, loop)


@pytest.mark.parametrize("name", ["epsilon", "epsilon_plus", "epsilon_alpha2_beta1"])
def test_input_times_modified_gradient_is_the_relevance(name, params, images):
    composite = getattr(composites, name)()
    features = network(params, images)
    transformed = xda.lrp(functools.partial(network, params), composite=composite)
    np.testing.assert_allclose(transformed(images), features, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: (transformed(x) * features).sum()))(images)
    # The cotangent φ at the output stands for the relevance φ ⊙ φ.
    expected = xda.relevance(network, params, images, features * features, composite=composite)
    np.testing.assert_allclose(images * gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_surrogates_map_sums_to_its_logit(params, images, rng):
    weights = normal(rng, 4, 8)
    model = types.SupportModel(
        jnp.zeros((0, 4)),
        jnp.zeros((0, 8)),
        jnp.zeros(0, jnp.int32),
        jnp.zeros(0, jnp.int32),
        weights,
        jnp.zeros(4),
        0.0,
        0,
    )
    for target in (0, 3):
        heat = xda.explain_logit(network, params, model, images[0], target, composite=composites.epsilon_plus())
        assert heat.shape == images[0].shape
        np.testing.assert_allclose(heat.sum(), network(params, images[:1])[0] @ weights[target], rtol=1e-3)
    with pytest.raises(ValueError, match="target"):
        xda.explain_logit(network, params, model, images[0], 4, composite=composites.epsilon_plus())


def test_the_same_shapes_are_traced_once(params, images):
    traced = []

    def counted(params, x):
        traced.append(x.shape)
        return network(params, x)

    def explain(scale):
        composite = composites.epsilon_plus()
        return xda.explain_pair(counted, params, scale * images[0], images[1], scale, composite=composite)

    explain(1.0)
    first = len(traced)
    explain(2.0)
    explain(-1.0)
    # The check of the output's shape is cached as well.
    assert len(traced) == first


def test_relevance_can_be_differentiated_by_the_parameters(params, images, rng):
    seed = normal(rng, 5, 8)

    def total(scale):
        scaled = jax.tree.map(lambda leaf: leaf * scale, params)
        maps = xda.relevance(network, scaled, images, seed, composite=composites.epsilon_plus(zero_bias=False))
        return (maps * images).sum()

    step = 1e-2
    numeric = (total(1 + step) - total(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(total)(1.0), numeric, rtol=2e-2)


def test_bfloat16_stays_close_to_float32(params, images):
    low = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.bfloat16))
    seed = jnp.ones((5, 8))
    composite = composites.epsilon_plus()
    maps = xda.relevance(network, low(params), low(images), low(seed), composite=composite)
    assert maps.dtype == jnp.bfloat16
    exact = xda.relevance(network, params, images, seed, composite=composite)
    correlation = np.corrcoef(np.asarray(maps, np.float32).ravel(), np.asarray(exact).ravel())[0, 1]
    assert correlation > 0.99


@pytest.mark.parametrize("name", ["epsilon", "epsilon_plus", "excitation_backprop"])
def test_float16_is_finite_and_stays_close_to_float32(name, params, images):
    """At an input of zero behind a bias shares are quotients by the stabiliser."""

    def deep(params, x):
        h = network(params, x)
        h = h + jax.nn.gelu(h @ params["deep"] + params["dense"][1][None])
        return h.mean(1, keepdims=True) + h

    params = params | {"deep": params["dense"][0][:8]}
    x = images.at[0].set(0.0)
    composite = getattr(composites, name)()
    exact = xda.relevance(deep, params, x, jnp.ones((5, 8)), composite=composite)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), (params, x, jnp.ones((5, 8))))
    found = xda.relevance(deep, *narrow, composite=composite)
    assert found.dtype == jnp.float16 and np.isfinite(found).all() and not np.any(found[0])
    assert np.corrcoef(np.asarray(found[1:], np.float32).ravel(), np.asarray(exact[1:]).ravel())[0, 1] > 0.99


@pytest.mark.parametrize(("low", "high", "named"), [((0.0, 0.0), 1.0, "low"), (-1.0, (1.0,) * 4, "high")])
def test_bounds_for_other_channels_are_named(low, high, named, params, images):
    composite = composites.epsilon_gamma_box(low, high)
    for explain in (xda.check_conservation, xda.explain_rules):
        with pytest.raises(ValueError, match=rf"{named}: got \d bounds, must be one number.*the 3 entries"):
            explain(network, params, images, composite=composite)


def test_a_surrogate_of_other_features_is_named(params, images):
    composite = composites.epsilon()
    weights = np.zeros((3, 5), np.float32)
    empty = np.zeros((0, 5), np.float32)
    model = types.SupportModel(empty[:, :3], empty, empty[:, 0], empty[:, 0], weights, weights[:, 0], 1.0, 4)
    with pytest.raises(ValueError, match=r"model: got weights of shape \(3, 5\), must be \[3, 8\]"):
        xda.explain_logit(network, params, model, images[0], 1, composite=composite)
    with pytest.raises(ValueError, match="model: got ndarray"):
        xda.explain_logit(network, params, weights, images[0], 1, composite=composite)


def test_bad_input_is_named(params, images):
    composite = composites.epsilon_plus()
    with pytest.raises(ValueError, match="seed"):
        xda.relevance(network, params, images, jnp.zeros((5, 9)), composite=composite)
    with pytest.raises(ValueError, match="composite"):
        xda.relevance(network, params, images, jnp.zeros((5, 8)), composite=composites.epsilon_plus)
    with pytest.raises(ValueError, match=r"x: got dtype uint8.*looks up"):
        xda.relevance(network, params, images.astype(jnp.uint8), jnp.zeros((5, 8)), composite=composite)
    with pytest.raises(ValueError, match="x_train"):
        xda.explain_pair(network, params, images[0], images[1, :5], 1.0, composite=composite)
    with pytest.raises(ValueError, match="coefficient"):
        xda.explain_pair(network, params, images[0], images[1], jnp.ones(2), composite=composite)
    with pytest.raises(ValueError, match="feature_fn"):
        xda.relevance(lambda p, x: x, params, images, images, composite=composite)
    with pytest.raises(ValueError, match="feature_fn: got NoneType"):
        xda.relevance(None, params, images, images, composite=composite)
    with pytest.raises(ValueError, match="fn: got dict"):
        xda.lrp(params, composite=composite)
    with pytest.raises(ValueError, match="x: got list"):
        xda.relevance(network, params, images.tolist(), jnp.zeros((5, 8)), composite=composite)
    with pytest.raises(ValueError, match="x_test: got list"):
        xda.explain_pair(network, params, images[0].tolist(), images[1], 1.0, composite=composite)
    with pytest.raises(ValueError, match="coefficient: got dtype <U1"):
        xda.explain_pair(network, params, images[0], images[1], "a", composite=composite)
    with pytest.raises(ValueError, match="coefficients: got dtype <U1"):
        xda.explain_pairs(network, params, images, images, list("abcde"), composite=composite)
    with pytest.raises(ValueError, match=r"seed: got shape \(5, 9\), must be \[5, 8\]"):
        xda.check_conservation(network, params, images, composite=composite, seed=jnp.zeros((5, 9)))
