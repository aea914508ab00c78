"""Transformers: attention, normalisation, gates, against the same rules written with stop_gradient."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import xda
from dualxda_jax.xda import composites

fixed = jax.lax.stop_gradient
EXACT = {"epsilon": 0.0, "stabilizer": 0.0, "zero_bias": False}


def product(equation, a, b, oracle):
    """An einsum of two values; the oracle halves the gradient of each factor."""
    multiply = functools.partial(jnp.einsum, equation, precision="highest")
    if not oracle:
        return multiply(a, b)
    return (multiply(a, fixed(b)) + multiply(fixed(a), b)) / 2


def gelu(x, oracle):
    return x * fixed(jax.nn.gelu(x) / x) if oracle else jax.nn.gelu(x)


def silu(x, oracle):
    return x * fixed(jax.nn.sigmoid(x)) if oracle else jax.nn.silu(x)


def layer_norm(x, scale, shift, oracle):
    x = x - x.mean(-1, keepdims=True)
    deviation = jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return x / (fixed(deviation) if oracle else deviation) * scale[None, None] + shift[None, None]


def rms_norm(x, oracle):
    factor = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    return x * (fixed(factor) if oracle else factor)


def transformer(params, x, oracle=False):
    """A pre-norm block with two heads, a gated block with RMSNorm, the mean over tokens."""
    h = layer_norm(x, params["scale"], params["shift"], oracle)
    q, k, v = (jnp.einsum("btd,dhe->bthe", h, params[n]) + params["bias"][None, None] for n in "qkv")
    logits = product("bthe,bshe->bhts", q, k, oracle) / 2
    weights = jax.nn.softmax(logits, axis=-1)
    mixed = product("bhts,bshe->bthe", weights, v, oracle)
    x = x + jnp.einsum("bthe,hed->btd", mixed, params["o"])
    x = x + gelu(rms_norm(x, oracle) @ params["up"], oracle) @ params["down"]
    gated = product("btd,btd->btd", silu(x @ params["up"], oracle), x @ params["gate"], oracle)
    return (x + gated @ params["down"]).mean(1)


@pytest.fixture
def params(rng):
    shapes = dict.fromkeys("qkv", (8, 2, 4)) | {"o": (2, 4, 8), "up": (8, 12), "gate": (8, 12), "down": (12, 8)}
    shapes |= {"scale": (8,), "shift": (8,), "bias": (2, 4)}
    return {n: jnp.asarray(0.4 * rng.standard_normal(s), jnp.float32) for n, s in shapes.items()}


def test_a_transformer_follows_attn_lrp(params, rng):
    x, direction = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 5, 8), (2, 8)))
    np.testing.assert_allclose(transformer(params, x, oracle=True), transformer(params, x), rtol=1e-4, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: (transformer(params, x, oracle=True) * direction).sum()))(x)
    seed = direction * transformer(params, x)
    found = xda.relevance(transformer, params, x, seed, composite=composites.attn_lrp(**EXACT))
    expected = x * gradient
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    transformed = jax.jit(xda.lrp(functools.partial(transformer, params), composite=composites.attn_lrp()))
    np.testing.assert_allclose(transformed(x), transformer(params, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", [jax.nn.gelu, functools.partial(jax.nn.gelu, approximate=False), jax.nn.silu])
def test_activations_in_pieces_pass_relevance(activation, rng):
    w, x = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((4, 3), (2, 4)))

    def network(w, x):
        return activation(x @ w)

    seed = network(w, x)
    composite = composites.epsilon(zero_bias=False)
    found = xda.relevance(network, w, x, seed, composite=composite)
    expected = xda.relevance(lambda w, x: x @ w, w, x, seed, composite=composite)
    # A scale between the activation and the next layer belongs to the layer.
    deep = xda.relevance(lambda w, x: (2.0 * network(w, x)) @ w.T, w, x, x, composite=composite)
    hidden = network(w, x)
    arrived = xda.relevance(lambda w, h: h @ w.T, w, hidden, x, composite=composite)
    before = xda.relevance(lambda w, x: x @ w, w, x, arrived, composite=composite)
    np.testing.assert_allclose(deep, before, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    through = xda.lrp(functools.partial(network, w), composite=composite)
    gradient = jax.vjp(through, x)[1](jnp.ones_like(seed))[0]
    np.testing.assert_allclose(x * gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_plain_exponential_is_refused(params):
    with pytest.raises(xda.NoRuleError, match="`exp`"):
        xda.relevance(
            lambda p, x: jnp.exp(x @ p["up"]) @ p["down"],
            params,
            jnp.ones((1, 8)),
            jnp.ones((1, 8)),
            composite=composites.attn_lrp(),
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 1e-4)])
def test_lxts_explicit_rules(dtype, tolerance, x64):
    """The map of LXT 2.1 on the same weights; see tests/golden/make_lxt.py."""
    with np.load(pathlib.Path(__file__).parents[1] / "golden" / "lxt_transformer.npz") as stored:
        arrays = {k: jnp.asarray(v, dtype) for k, v in stored.items()}
    weights = {k.removeprefix("weights/"): v for k, v in arrays.items() if k.startswith("weights/")}
    heads = {n: weights[n].reshape(8, 2, 4) for n in "qkv"} | {
        "o": weights["o"].reshape(2, 4, 8),
        "bias": weights["bias"].reshape(2, 4),
    }
    weights |= heads
    # LXT computes its RMSNorm in float32 whatever it is given.
    np.testing.assert_allclose(transformer(weights, arrays["x"]), arrays["features"], atol=tolerance)
    found = xda.relevance(transformer, weights, arrays["x"], arrays["seed"], composite=composites.attn_lrp(**EXACT))
    assert found.dtype == dtype
    assert np.abs(found - arrays["map"]).max() <= tolerance * np.abs(arrays["map"]).max()
