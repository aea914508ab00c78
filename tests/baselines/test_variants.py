"""Variants of DualDA against DualDA itself, shown the changed features, labels or costs by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import baselines, svm

KEY = jax.random.key(0)


def both(method, context, x, targets):
    fitted = method.fit(KEY, context)
    return np.asarray(method.scores(fitted, x, targets)), np.asarray(method.self_influence(fitted))


def same(a, b):
    for mine, expected in zip(a, b, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())


def flat(params, x):
    return x.reshape(len(x), -1)


@pytest.fixture(scope="module")
def plain(tiny):
    """The tiny network's features as inputs, for changes by hand; queries and targets."""
    context, x, targets = tiny
    inputs, queries = (np.asarray(context.features(context.params, a)) for a in (context.inputs, x))
    of = dataclasses.replace(context, inputs=jnp.asarray(inputs), features=flat)
    return of, jnp.asarray(queries), targets


def test_without_a_change_it_is_dualda(tiny):
    context, x, targets = tiny
    same(both(baselines.dualda_variant(cost=0.1), context, x, targets), both(baselines.dualda(0.1), *tiny))


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_features_are_changed_for_samples_and_queries(tiny, plain, centre, normalize):
    context, x, targets = tiny
    of, queries, _ = plain
    points, q = np.asarray(of.inputs), np.asarray(queries)
    if centre:
        points, q = points - np.asarray(of.inputs).mean(0), q - np.asarray(of.inputs).mean(0)
    if normalize:
        length = np.sqrt((points**2).sum(1).mean())
        points, q = (length * a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-9) for a in (points, q))
    by_hand = dataclasses.replace(of, inputs=jnp.asarray(points))
    mine = both(baselines.dualda_variant(cost=0.1, centre=centre, normalize=normalize), context, x, targets)
    same(mine, both(baselines.dualda(0.1), by_hand, jnp.asarray(q), targets))


def test_predicted_labels_take_the_place_of_given_ones(tiny):
    context, x, targets = tiny
    wrong = dataclasses.replace(context, labels=context.labels.at[:9].set((context.labels[:9] + 1) % 3))
    predicted = context.logits(context.params, context.inputs).argmax(1)
    expected = both(baselines.dualda(0.1), dataclasses.replace(context, labels=predicted), x, targets)
    same(both(baselines.dualda_variant(cost=0.1, labels="predicted"), wrong, x, targets), expected)


def test_several_surrogates_are_averaged_at_one_norm(tiny):
    context, x, targets = tiny
    single = []
    for checkpoint in context.checkpoints:
        of = dataclasses.replace(context, checkpoints=(checkpoint,), learning_rates=jnp.ones(1))
        for cost in (0.01, 0.3):
            method = baselines.dualda(cost)
            norm = np.linalg.norm(method.fit(KEY, of).support.weights)
            single.append([a / norm for a in both(method, of, x, targets)])
    expected = [np.mean([s[i] for s in single], axis=0) for i in range(2)]
    same(both(baselines.dualda_variant(cost=(0.01, 0.3), checkpoints=2), context, x, targets), expected)


def test_the_cost_of_the_most_faithful_surrogate_is_taken(tiny):
    context, x, targets = tiny
    costs, alike = (1e-4, 3e-2, 10.0), []
    points = context.features(context.params, context.inputs)
    network = np.asarray(context.logits(context.params, context.inputs))
    for cost in costs:
        solution = svm.solve(points, context.labels, num_classes=3, cost=cost)
        alike.append(np.corrcoef(np.ravel(points @ solution.weights.T), np.ravel(network))[0, 1])
    assert max(alike) - sorted(alike)[1] > 1e-4, "the case must tell costs apart"
    expected = both(baselines.dualda(costs[int(np.argmax(alike))]), context, x, targets)
    same(both(baselines.dualda_variant(cost=costs, over="best"), context, x, targets), expected)


def test_the_intercept_counts_in_the_scores(tiny):
    """Scores of a query sum to its surrogate's logit, with the constant feature's share."""
    context, x, targets = tiny
    points, q = (context.features(context.params, a) for a in (context.inputs, x))
    solution = svm.solve(
        points, context.labels, num_classes=3, cost=0.1, config=svm.SolverConfig(intercept_scaling=1.0)
    )
    scores, _ = both(baselines.dualda_variant(cost=0.1, intercept=1.0), context, x, targets)
    logits = np.asarray(q @ solution.weights.T + solution.intercept[None])
    np.testing.assert_allclose(scores.sum(1), logits[np.arange(len(x)), targets], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": "sum"}, r"^over: got 'sum', must be one of mean, best"),
        ({"labels": "soft"}, r"^labels: got 'soft'"),
        ({"cost": ()}, r"^cost: got none"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        baselines.dualda_variant(**options)


def test_a_context_that_lacks_what_is_asked_for_is_refused(tiny):
    context, _, _ = tiny
    with pytest.raises(ValueError, match="checkpoints: got 3"):
        baselines.dualda_variant(checkpoints=3).fit(KEY, context)
    with pytest.raises(ValueError, match=r"^context\.features: got None"):
        baselines.dualda_variant().fit(KEY, dataclasses.replace(context, features=None))
