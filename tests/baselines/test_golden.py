"""Scores of torch packages on the same small network (golden/make_gradient_methods.py)."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import baselines, models

FILE = pathlib.Path(__file__).parent.parent / "golden" / "gradient_methods.npz"


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(2, (2, 2), padding="VALID", name="conv")(x))
        # torch flattens channels first
        x = nn.relu(nn.Dense(5, name="dense")(x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)))
        return nn.Dense(3, name="head")(x)


@pytest.fixture(scope="module")
def golden():
    data = np.load(FILE)

    def params(number):
        weights = {name.split("/")[2]: data[name] for name in data.files if name.startswith(f"weights/{number}/")}
        layers = {"conv": "0", "dense": "3", "head": "5"}
        kernels = {name: weights[f"{place}.weight"] for name, place in layers.items()}
        return {
            name: {
                "kernel": jnp.asarray(kernels[name].transpose(2, 3, 1, 0) if name == "conv" else kernels[name].T),
                "bias": jnp.asarray(weights[f"{place}.bias"]),
            }
            for name, place in layers.items()
        }

    model = models.from_linen(Net(), head="head")
    x, labels = jnp.asarray(data["x"].transpose(0, 2, 3, 1)), jnp.asarray(data["labels"].astype(np.int32))
    n = data["scores/tracin/captum"].shape[1]
    context = baselines.context(
        model.logits,
        params(1),
        x[:n],
        labels[:n],
        num_classes=3,
        features=model.features,
        head=model.head,
        checkpoints=(params(0),),
        learning_rates=data["rates"],
    )
    return data, context, x[n:], labels[n:]


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


CASES = [
    ("tracin/captum", baselines.tracin(), 2),
    ("tracin/dattri", baselines.tracin(), 2),
    ("graddot/dattri", baselines.graddot(), 1),
    ("gradcos/dattri", baselines.gradcos(), 1),
    ("trak/traker", baselines.trak(regularization=0.5), 1),
    ("trak_one/traker", baselines.trak(regularization=0.5, checkpoints=1), 1),
    ("representer/dattri", baselines.representer(0.02), 1 / 256),
]


@pytest.mark.parametrize(("name", "method", "factor"), CASES, ids=[c[0] for c in CASES])
def test_scores_of_the_packages(golden, name, method, factor):
    """The packages sum over checkpoints where ours is the mean, traker's mean is the mean; dattri's coefficients of
    representer points are divided by n twice, once in the mean loss."""
    data, context, x, targets = golden
    fitted = method.fit(jax.random.key(0), context)
    ours, theirs = np.asarray(method.scores(fitted, x, targets)), data[f"scores/{name}"]
    assert ours.shape == theirs.shape
    assert cosines(ours, theirs).min() >= 0.999
    np.testing.assert_allclose(factor * ours, theirs, atol=2e-3 * np.abs(theirs).max())
    if name == "tracin/captum":
        influence = data[f"self_influence/{name}"]
        np.testing.assert_allclose(2 * method.self_influence(fitted), influence, rtol=1e-3, atol=1e-5)
