"""Against dattri and kronfluence on one small CNN; see tests/golden/make_influence.py."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import baselines

FILE = pathlib.Path(__file__).parents[2] / "golden" / "influence_cnn.npz"
EKFAC = {"damping": 1e-3, "fisher": "empirical"}
METHODS = {
    "explicit": baselines.influence_explicit(damping=0.05),
    "cg": baselines.influence_cg(damping=0.05, hessian="exact", tolerance=1e-9),
    "arnoldi": baselines.influence_arnoldi(
        params="head", rank=8, krylov=36, regularization=0.01, tolerance=1e-9, inverse_tolerance=0.0
    ),
    "ekfac": baselines.influence_ekfac(**EKFAC),
    "kfac": baselines.influence_ekfac(**EKFAC, kfac=True, params=("dense_0", "head")),
}


def network(params, x):
    """The generator's network: channels first, weights as torch has them."""

    def convolution(x, layer, stride, padding):
        strides, paddings = (stride, stride), [(padding, padding)] * 2
        numbers = ("NCHW", "OIHW", "NCHW")
        z = jax.lax.conv_general_dilated(x, layer["weight"], strides, paddings, dimension_numbers=numbers)
        return z + layer["bias"][None, :, None, None]

    x = jnp.tanh(convolution(x, params["conv_0"], 1, 0))
    x = jax.nn.relu(convolution(x, params["conv_1"], 2, 1)).reshape(x.shape[0], -1)
    x = jax.nn.relu(x @ params["dense_0"]["weight"].T + params["dense_0"]["bias"][None])
    return x @ params["head"]["weight"].T + params["head"]["bias"][None]


@pytest.mark.parametrize("name", METHODS)
def test_scores_of_the_peers(name, x64):
    golden = np.load(FILE)
    params: dict = {}
    for key in golden.files:
        if key.startswith("weights/"):
            layer, kind = key.removeprefix("weights/").split(".")
            params.setdefault(layer, {})[kind] = jnp.asarray(golden[key].astype(np.float64))
    x, query = (golden[f"{part}/x"].astype(np.float64) for part in ("train", "query"))
    context = baselines.context(network, params, x, golden["train/y"], num_classes=4, head="head")
    fitted = METHODS[name].fit(jax.random.key(0), context)
    scores = np.asarray(METHODS[name].scores(fitted, query, golden["query/y"]))
    expected = golden[f"scores/{name}"]
    # The issue asks for a cosine of 0.999 in every row; the peers are met in size too.
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    if f"self/{name}" in golden.files:
        own = golden[f"self/{name}"]
        # Not each in its own size: where the label is nearly certain, torch's gradient has lost digits that ours keeps.
        np.testing.assert_allclose(METHODS[name].self_influence(fitted), own, rtol=0, atol=1e-8 * own.max())
