"""The maps of zennit 0.5.1 on the same weights; see tests/golden/make_zennit.py."""

import pathlib

import flax.linen as nn
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


def convolve(x, kernel, stride):
    pad = kernel.shape[2] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel.transpose(2, 3, 1, 0),
        (stride, stride),
        [(pad, pad), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def resnet(weights, x):
    """ResNet-18 with a 3×3 stem, as its author would write it: nothing merged."""

    def norm(x, name):
        mean, var, scale, bias = (
            weights[f"{name}.{k}"][None, None, None] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) * (scale * jax.lax.rsqrt(var + 1e-12)) + bias

    x = jax.nn.relu(norm(convolve(x, weights["conv1.weight"], 1), "bn1"))
    for stage in range(1, 5):
        for unit in range(2):
            name = f"layer{stage}.{unit}"
            stride = 2 if stage > 1 and unit == 0 else 1
            y = jax.nn.relu(norm(convolve(x, weights[f"{name}.conv1.weight"], stride), f"{name}.bn1"))
            y = norm(convolve(y, weights[f"{name}.conv2.weight"], 1), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in weights:
                x = norm(convolve(x, weights[f"{name}.downsample.0.weight"], stride), f"{name}.downsample.1")
            x = jax.nn.relu(x + y)
    return x.mean((1, 2))


def mixed(weights, x):
    """The parts of VGG, DenseNet and MobileNet, as in the golden file's network."""

    def conv(x, name, stride=1, pad=0, dilation=1, groups=1):
        kernel = weights[f"{name}.weight"].transpose(2, 3, 1, 0)
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            [(pad, pad), (pad, pad)],
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return y + weights[f"{name}.bias"][None, None, None] if f"{name}.bias" in weights else y

    def norm(x, name):
        mean, var, scale, bias = (
            weights[f"{name}.{k}"][None, None, None] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / jnp.sqrt(var + 1e-12) * scale + bias

    def dense(x, name):
        return jax.nn.relu(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"][None])

    x = nn.max_pool(jax.nn.relu(conv(x, "stem.0", pad=1)), (2, 2), (2, 2))
    y = jax.nn.relu(conv(x, "grow", pad=2, dilation=2, groups=2))
    x = jnp.concatenate([x, y], axis=-1)
    x = jax.nn.relu(norm(conv(x, "deep", stride=2, pad=1, groups=10), "deep_norm"))
    x = jax.nn.relu(conv(x, "point"))
    return dense(dense(x.mean((1, 2)), "tail.3"), "last.0")


def unmerged(weights, x):
    """BatchNorm between two activations, which nothing can merge, and ReLU6."""

    def conv(x, layer):
        kernel = weights[f"{layer}.weight"].transpose(2, 3, 1, 0)
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + weights[f"{layer}.bias"][None, None, None]

    x = jax.nn.relu(conv(x, 0))
    mean, var, scale, bias = (
        weights[f"2.{k}"][None, None, None] for k in ("running_mean", "running_var", "weight", "bias")
    )
    x = jax.nn.relu6((x - mean) / jnp.sqrt(var + 1e-12) * scale + bias)
    x = jax.nn.relu(conv(x, 4))
    return x.mean((1, 2)) @ weights["8.weight"].T + weights["8.bias"][None]


def load(network, dtype):
    with np.load(GOLDEN / f"zennit_{network}.npz") as stored:
        arrays = dict(stored)
    weights = {k.removeprefix("weights/"): jnp.asarray(v, dtype) for k, v in arrays.items() if k.startswith("weights/")}
    return arrays, weights, jnp.asarray(arrays["x"].transpose(0, 2, 3, 1), dtype), jnp.asarray(arrays["seed"], dtype)


def error(arrays, name, bias, found):
    expected = arrays[f"map/{name}/{bias}"].transpose(0, 2, 3, 1)
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


# Compiling float64 convolutions is slow: the cheap float32 covers every case, float64 a selection with every rule.
@pytest.mark.parametrize(
    ("name", "bias"), [("epsilon_plus", "zero"), ("epsilon_alpha2_beta1_flat", "kept"), ("epsilon_gamma_box", "zero")]
)
def test_cnn_in_float64(name, bias, x64):
    arrays, weights, x, seed = load("cnn", jnp.float64)
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


# Every composite, biases kept or zeroed: a ResNet compiles for seconds. All maps in both dtypes: benchmarks/parity.py.
@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("epsilon", "zero"),
        ("epsilon_plus", "kept"),
        ("epsilon_plus_flat", "zero"),
        ("epsilon_alpha2_beta1", "zero"),
        ("epsilon_alpha2_beta1_flat", "kept"),
        ("epsilon_gamma_box", "zero"),
        ("excitation_backprop", "kept"),
        ("guided_backprop", "zero"),
    ],
)
def test_resnet_in_float32(name, bias):
    arrays, weights, x, seed = load("resnet", jnp.float32)
    np.testing.assert_allclose(resnet(weights, x), arrays["features"], atol=1e-5)
    found = xda.relevance(resnet, weights, x, seed, composite=composite(name, bias == "zero"))
    assert error(arrays, name, bias, found) <= 1e-4


def test_resnet_in_float64(x64):
    arrays, weights, x, seed = load("resnet", jnp.float64)
    found = xda.relevance(resnet, weights, x, seed, composite=composite("epsilon_plus", True))
    assert error(arrays, "epsilon_plus", "zero", found) <= 1e-6


@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("epsilon", "kept"),
        ("epsilon_plus_flat", "zero"),
        ("epsilon_alpha2_beta1", "zero"),
        ("epsilon_gamma_box", "kept"),
        ("excitation_backprop", "kept"),
        ("guided_backprop", "zero"),
    ],
)
def test_mixed_in_float32(name, bias):
    arrays, weights, x, seed = load("mixed", jnp.float32)
    np.testing.assert_allclose(mixed(weights, x), arrays["features"], atol=1e-5)
    found = xda.relevance(mixed, weights, x, seed, composite=composite(name, bias == "zero"))
    assert error(arrays, name, bias, found) <= 1e-4


@pytest.mark.parametrize("name", ["epsilon", "epsilon_plus_flat", "epsilon_alpha2_beta1", "epsilon_gamma_box"])
def test_unmerged_batchnorm_passes_relevance_where_biases_are_zeroed(name):
    arrays, weights, x, seed = load("unmerged", jnp.float32)
    np.testing.assert_allclose(unmerged(weights, x), arrays["features"], rtol=1e-5, atol=1e-5)
    found = xda.relevance(unmerged, weights, x, seed, composite=composite(name, True))
    # Relevance arrives at activations that are exactly zero, with a shift behind them.
    assert error(arrays, name, "zero", found) <= 1e-4
