"""The maps of zennit 0.5.1 on the same weights; see tests/golden/make_zennit.py."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import xda

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NAMES = [
    "epsilon",
    "epsilon_plus",
    "epsilon_plus_flat",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "epsilon_gamma_box",
    "excitation_backprop",
    "guided_backprop",
]


def composite(name, zero_bias):
    bounds = (-3.0, 3.0) if name == "epsilon_gamma_box" else ()
    return getattr(xda.composites, name)(*bounds, zero_bias=zero_bias)


def cnn(weights, x):
    """The network of the golden file: three convolutions and two dense layers, flattened channels first."""
    for layer in (0, 2, 4):
        kernel = weights[f"{layer}.weight"].transpose(2, 3, 1, 0)
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + weights[f"{layer}.bias"][None, None, None])
    x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
    for layer in (7, 9):
        x = jax.nn.relu(x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"][None])
    return x


def load(network, dtype):
    with np.load(GOLDEN / f"zennit_{network}.npz") as stored:
        arrays = dict(stored)
    weights = {k.removeprefix("weights/"): jnp.asarray(v, dtype) for k, v in arrays.items() if k.startswith("weights/")}
    return arrays, weights, jnp.asarray(arrays["x"].transpose(0, 2, 3, 1), dtype), jnp.asarray(arrays["seed"], dtype)


def error(arrays, name, bias, found):
    expected = arrays[f"map/{name}/{bias}"].transpose(0, 2, 3, 1)
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


# Compiling float64 convolutions is slow: the cheap float32 covers every case, float64 each composite once.
@pytest.mark.parametrize("name", NAMES)
def test_cnn_in_float64(name, x64):
    arrays, weights, x, seed = load("cnn", jnp.float64)
    bias = "kept" if NAMES.index(name) % 2 else "zero"
    found = xda.relevance(cnn, weights, x, seed, composite=composite(name, bias == "zero"))
    assert found.dtype == jnp.float64
    assert error(arrays, name, bias, found) <= 1e-6


@pytest.mark.parametrize("bias", ["kept", "zero"])
@pytest.mark.parametrize("name", NAMES)
def test_cnn_in_float32(name, bias):
    arrays, weights, x, seed = load("cnn", jnp.float32)
    np.testing.assert_allclose(cnn(weights, x), arrays["features"], atol=1e-5)
    found = xda.relevance(cnn, weights, x, seed, composite=composite(name, bias == "zero"))
    assert error(arrays, name, bias, found) <= 1e-4
