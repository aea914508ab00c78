"""One small trained network for all tests of the methods."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from dualxda_jax import baselines, models


class Tiny(nn.Module):
    """A convolution and two dense layers."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Conv(2, (2, 2), name="conv")(x))
        h = nn.relu(nn.Dense(6, name="dense")(h.reshape(x.shape[0], -1)))
        return nn.Dense(3, name="head")(h)


def make_data():
    """96 images of 3 classes, each with a bright row of its own; 6 more as queries."""
    labels = jnp.arange(102, dtype=jnp.int32) % 3
    x = 0.3 * jax.random.normal(jax.random.key(1), (102, 3, 3, 1))
    x += jax.nn.one_hot(labels, 3)[:, :, None, None]
    return x[:96], labels[:96], x[96:], labels[96:]


@pytest.fixture(scope="session")
def tiny():
    """(context with two checkpoints, queries, their labels)."""
    x, labels, queries, wanted = make_data()
    module = Tiny()
    model = models.from_linen(module, head="head")

    def loss(params):
        return -jnp.take_along_axis(jax.nn.log_softmax(module.apply(params, x)), labels[:, None], axis=1).mean()

    @jax.jit
    def train(params):
        return jax.lax.scan(
            lambda p, _: (jax.tree.map(lambda a, g: a - 0.5 * g, p, jax.grad(loss)(p)), None), params, length=20
        )[0]

    first = train(jax.jit(module.init)(jax.random.key(0), x))
    second = train(first)
    context = baselines.context(
        model.logits,
        second,
        x,
        labels,
        num_classes=3,
        features=model.features,
        head=model.head,
        checkpoints=(first,),
        learning_rates=[0.5, 0.25],
    )
    return context, queries, wanted
