"""Whole architectures: outputs stay, and relevance is lost only where the method says it is."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import models, xda
from dualxda_jax.xda import composites


class DenseNet(nn.Module):
    """Normalisation and activation before each convolution, concatenation, average pooling."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.Conv(4, (3, 3))(x)
        y = nn.Conv(4, (1, 1), use_bias=False)(nn.relu(norm()(x)))
        y = nn.Conv(3, (3, 3), use_bias=False)(nn.relu(norm()(y)))
        x = jnp.concatenate([x, y], axis=-1)
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
        return nn.relu(norm()(x)).mean((1, 2))


class MixerBlock(nn.Module):
    """One MLP over tokens, one over channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (2, 2), (2, 2))(x).reshape(x.shape[0], -1, 6)
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        x = x + nn.Dense(9)(nn.gelu(nn.Dense(7)(y))).swapaxes(1, 2)
        x = x + nn.Dense(6)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x))))
        return nn.LayerNorm()(x).mean(1)


class ViT(nn.Module):
    """Patches, class token, positions, one pre-norm block with the exact GELU."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), (2, 2))(x).reshape(x.shape[0], -1, 8)
        token = self.param("token", nn.initializers.normal(1.0), (1, 1, 8))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(0.02), (1, 10, 8))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, deterministic=True)(y, y)
        y = nn.LayerNorm()(x)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(12)(y), approximate=False))
        return nn.LayerNorm()(x)[:, 0]


class Block(nn.Module):
    """Pre-norm with RMSNorm, causal attention, gated SiLU."""

    @nn.compact
    def __call__(self, x, mask):
        y = nn.RMSNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False, deterministic=True)(y, y, mask=mask)
        y = nn.RMSNorm()(x)
        dense = functools.partial(nn.Dense, use_bias=False)
        return x + dense(8)(nn.silu(dense(12)(y)) * dense(12)(y)), None


class Text(nn.Module):
    """Tokens, two rematerialised blocks in a scan, the last token's state."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=2,
        )
        x, _ = layers(name="layers")(x, nn.make_causal_mask(tokens))
        return nn.RMSNorm()(x)[:, -1]


class Bottleneck(nn.Module):
    """ResNet-50's stem and one strided block."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3), use_bias=False)(x)))
        return models.networks.BottleneckBlock(3, 2)(x).mean((1, 2))


class HalfPrecision(nn.Module):
    """bfloat16 between float32 ends."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), dtype=jnp.bfloat16)(x))
        x = nn.relu(nn.Conv(4, (3, 3), dtype=jnp.bfloat16)(x))
        return nn.relu(nn.Dense(6, dtype=jnp.bfloat16)(x.reshape(x.shape[0], -1))).astype(jnp.float32)


class VGG(nn.Module):
    """Convolutions with biases in pairs, maximum pooling after each pair, three dense layers, dropout switched off."""

    @nn.compact
    def __call__(self, x):
        for channels in (4, 6):
            for _ in range(2):
                x = nn.relu(nn.Conv(channels, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for width in (8, 8):
            x = nn.Dropout(0.5, deterministic=True)(nn.relu(nn.Dense(width)(x)))
        return nn.Dense(6)(x)


IMAGES = np.random.default_rng(0).standard_normal((2, 6, 6, 3)).astype(np.float32)
TOKENS = np.asarray([[1, 5, 10, 3], [0, 2, 2, 7]])
# What loses relevance by nature: softmax, and a class token, which is no part of the image.
SOFTMAX = ("exp", "div")
CASES = {
    "vgg": (VGG(), IMAGES, composites.epsilon_gamma_box(-4.0, 4.0), ()),
    "densenet": (DenseNet(), IMAGES, composites.epsilon(), ()),
    "mixer": (MixerBlock(), IMAGES, composites.attn_lrp(), ()),
    "vit": (ViT(), IMAGES, composites.attn_lrp(), (*SOFTMAX, "concatenate")),
    "text": (Text(), TOKENS, composites.attn_lrp(), SOFTMAX),
    "bottleneck": (Bottleneck(), IMAGES, composites.epsilon(), ()),
    "bfloat16": (HalfPrecision(), IMAGES, composites.epsilon_plus_flat(), ()),
}


@pytest.mark.parametrize("name", CASES)
def test_relevance_is_lost_only_where_the_method_loses_it(name):
    module, x, composite, losing = CASES[name]
    variables = jax.jit(module.init)(jax.random.key(1), x)
    report = xda.check_conservation(module.apply, variables, x, composite=composite)
    features = jax.jit(module.apply)(variables, x)
    np.testing.assert_allclose(report.seed, (features * features).sum(), rtol=1e-5)
    assert report.seed > 0.01, "the network has to be alive"
    # LayerNorm and softmax leave sums of nearly nothing: a loss is one if it is large against the whole.
    tolerance = (3e-2 if name == "bfloat16" else 1e-3) * report.seed
    found = {r.operation.split(" / ")[-1] for r in report.rows if abs(r.lost) > tolerance}
    assert found == set(losing)
    np.testing.assert_allclose(sum(r.lost for r in report.rows), report.seed - report.input, rtol=1e-2, atol=tolerance)


@pytest.mark.filterwarnings("ignore:jax.array_ref:DeprecationWarning")  # flax 0.12.0 on jax 0.8.0, at import
def test_an_nnx_network_conserves():
    """Convolution, BatchNorm and dropout in evaluation mode, attention; split into a definition and its state."""
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (2, 2), strides=(2, 2), use_bias=False, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.last = nnx.Linear(8, 6, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.norm(self.conv(x))).reshape(x.shape[0], -1, 8)
            return self.last(self.dropout(x + self.attention(x)).mean(1))

    network = Network(nnx.Rngs(0))
    network.eval()
    definition, state = nnx.split(network)

    def apply(state, x):
        return nnx.merge(definition, state)(x)

    x = jnp.asarray(IMAGES)
    np.testing.assert_allclose(apply(state, x), network(x), rtol=1e-6)
    report = xda.check_conservation(apply, state, x, composite=composites.attn_lrp())
    losing = {r.operation for r in report.rows if abs(r.lost) > 1e-3 * report.seed}
    assert losing <= set(SOFTMAX) and report.seed > 0.01
    paths = [r.path for r in xda.explain_rules(apply, state, x, composite=composites.attn_lrp()).rows if r.path]
    assert any("conv" in path for path in paths) and any("last" in path for path in paths)
    network.train()
    training, state = nnx.split(network)
    with pytest.raises(xda.NoRuleError, match=r"training mode|dropout"):
        xda.explain_rules(lambda s, x: nnx.merge(training, s)(x), state, x, composite=composites.attn_lrp())
