"""Derivatives of scores, by the query and by the network's parameters, against finite differences in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import baselines

KEY = jax.random.key(0)
METHODS = {
    "graddot": {},
    "gradcos": {},
    "tracin": {},
    "trak": {"regularization": 1.0, "projection": 6},
    "similarity": {},
    "influence_explicit": {"damping": 0.1},
    "influence_cg": {"damping": 0.1, "tolerance": 1e-10},
    "influence_lissa": {"damping": 0.1, "scale": 20.0, "depth": 5, "repeats": 1},
    "influence_ekfac": {"damping": 0.1, "fisher": "empirical", "kfac": True},
}


def hidden(params, x):
    return jnp.tanh(x @ params["a"])


def network(params, x):
    return hidden(params, x) @ params["b"]


@pytest.mark.parametrize("name", METHODS)
def test_derivatives_of_scores(name, x64):
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(4, 5))), "b": jnp.asarray(rng.normal(size=(5, 3)))}
    x, labels = jnp.asarray(rng.normal(size=(14, 4))), np.arange(14) % 3
    context = baselines.context(network, params, x[:12], labels[:12], num_classes=3, features=hidden, head="b")
    method = baselines.METHODS[name](**METHODS[name])

    @jax.jit
    def score(a, query):
        moved = dataclasses.replace(context, checkpoints=({**params, "a": a},))
        return method.scores(method.fit(KEY, moved), query, labels[12:])[1, 3]

    places = params["a"], x[12:]
    found = jax.jit(jax.grad(score, argnums=(0, 1)))(*places)
    for number, gradient in enumerate(found):
        # K-FAC's eigenvectors have no derivative where eigenvalues are equal.
        if name == "influence_ekfac" and number == 0:
            continue
        direction = jnp.asarray(rng.normal(size=gradient.shape))
        up, down = (
            score(*(place + h * direction if i == number else place for i, place in enumerate(places)))
            for h in (1e-5, -1e-5)
        )
        assert float(up) != float(down)
        np.testing.assert_allclose((gradient * direction).sum(), (up - down) / 2e-5, rtol=1e-5)
