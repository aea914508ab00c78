"""Methods on the final layer, computed on features, against the same methods on the whole network."""

import dataclasses

import jax
import numpy as np
import pytest

from dualxda_jax import baselines


@pytest.mark.parametrize(
    "make",
    [
        lambda: baselines.influence_explicit(params="head", damping=1e-2),
        lambda: baselines.influence_cg(params="head", damping=1e-2),
        lambda: baselines.influence_lissa(params="head", damping=1e-2, scale=5.0, depth=50, repeats=1),
    ],
    ids=["explicit", "cg", "lissa"],
)
def test_scores_are_those_on_the_whole_network(make, tiny):
    context, x, targets = tiny
    found = []
    for method in (make(), baselines.on_features(make())):
        fitted = method.fit(jax.random.key(0), context)
        found.append((method.name, np.asarray(method.scores(fitted, x, targets))))
    (name, expected), (same_name, got) = found
    assert name == same_name
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_self_influence_and_the_whole_network_agree(tiny):
    context, _, _ = tiny
    a, b = baselines.graddot(params="head"), baselines.on_features(baselines.graddot())
    found = [np.asarray(m.self_influence(m.fit(jax.random.key(0), context))) for m in (a, b)]
    # on_features makes "all" mean the final layer, and its last checkpoint the only one.
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-5 * found[0].max())


def test_a_context_without_a_head_or_features_is_refused(tiny):
    context, _, _ = tiny
    method = baselines.on_features(baselines.graddot())
    for field in ("head", "features"):
        with pytest.raises(ValueError, match=rf"^context\.{field}: got None"):
            method.fit(jax.random.key(0), dataclasses.replace(context, **{field: None}))
    with pytest.raises(ValueError, match=r"^context\.head: got a layer of conv/bias, conv/kernel"):
        method.fit(jax.random.key(0), dataclasses.replace(context, head="conv"))


def test_targets_out_of_range_are_refused(tiny):
    context, x, _ = tiny
    method = baselines.on_features(baselines.graddot())
    fitted = method.fit(jax.random.key(0), context)
    with pytest.raises(ValueError, match="targets"):
        method.scores(fitted, x, np.full(len(x), 3))
