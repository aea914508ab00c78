"""Attribution and relevance propagation lower for accelerators that are not here, without float64 matrix products."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from dualxda_jax import attribution, xda
from dualxda_jax.types import SupportModel
from dualxda_jax.xda import composites

S, K, D, Q = 200, 3, 5, 4  # more support vectors than `top_k` takes in one block
BOX = composites.epsilon_gamma_box(0.0, 1.0)


def network(params, x):
    """A convolution and a dense layer: images [b, 4, 4, 1] to features [b, D]."""
    x = jax.lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = jax.nn.relu(x).reshape(x.shape[0], -1)
    return jax.nn.relu(x @ params["dense"] + params["bias"][None])


def lrp_gradient(model, query, targets, params, images):
    """Input times modified gradient of one feature: its relevance."""
    modified = xda.lrp(functools.partial(network, params), composite=composites.epsilon_plus())
    return images * jax.grad(lambda x: modified(x)[:, 0].sum())(images)


FUNCTIONS = {
    "scores": lambda model, query, targets, *_: attribution.scores(model, query, targets),
    "proponents": lambda model, query, targets, *_: attribution.top_k(model, query, targets, k=2),
    "opponents": lambda model, query, targets, *_: attribution.top_k(model, query, targets, k=2, largest=False),
    "self_influence": lambda model, *_: attribution.self_influence(model),
    "logits": lambda model, query, *_: attribution.logits(model, query),
    "relevance": lambda model, query, targets, params, images: xda.relevance(
        network, params, images, query, composite=BOX
    ),
    "lrp_gradient": lrp_gradient,
    "explain_pair": lambda model, query, targets, params, images: xda.explain_pair(
        network, params, images[0], images[1], model.coefficients[0, 0], composite=BOX
    ),
    "explain_logit": lambda model, query, targets, params, images: xda.explain_logit(
        network, params, model, images[0], targets[0], composite=BOX
    ),
}


def make_arguments(rng):
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    model = SupportModel(
        coefficients=normal(S, K),
        features=normal(S, D),
        labels=jnp.asarray(rng.integers(0, K, S), jnp.int32),
        index=jnp.arange(S, dtype=jnp.int32),
        weights=normal(K, D),
        intercept=normal(K),
        intercept_scaling=0.5,
        train_size=S,
    )
    params = {"kernel": normal(3, 3, 1, 2), "dense": normal(32, D), "bias": normal(D)}
    images = jnp.asarray(rng.uniform(size=(Q, 4, 4, 1)), jnp.float32)
    return model, normal(Q, D), jnp.asarray(rng.integers(0, K, Q), jnp.int32), params, images


def lower(function, platform, *arguments):
    """The text of the StableHLO module."""
    return export.export(jax.jit(function), platforms=[platform])(*arguments).mlir_module()


def float64_products(module):
    """The lines that hold a matrix product of which an operand or the result is in float64."""
    return [line for line in module.splitlines() if "dot_general" in line and re.search(r"\bf64\b|xf64>", line)]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_lowers_without_float64_products(rng, name, platform):
    module = lower(FUNCTIONS[name], platform, *make_arguments(rng))
    assert "stablehlo." in module
    assert not float64_products(module)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_float64_product_would_be_found(x64, platform):
    assert float64_products(lower(jnp.dot, platform, np.ones((2, 3)), np.ones((3, 2))))
