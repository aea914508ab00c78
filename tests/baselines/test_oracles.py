"""Each method against its formula in float64 by numpy, on logistic regression, where gradients are explicit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dualxda_jax import baselines
from dualxda_jax.baselines import projections
from dualxda_jax.baselines.protocol import cross_entropy, margin

N, Q, D, K = 40, 4, 5, 3


def logits(params, x):
    return x @ params["kernel"] + params["bias"][None, :]


@pytest.fixture(scope="module")
def regression():
    """(context with three checkpoints, queries, targets): multinomial logistic regression, not at its optimum."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N + Q, D)).astype(np.float32)
    labels = rng.integers(0, K, N + Q).astype(np.int32)
    checkpoints = [
        {"kernel": rng.normal(size=(D, K)).astype(np.float32), "bias": rng.normal(size=K).astype(np.float32)}
        for _ in range(3)
    ]
    checkpoints = [jax.tree.map(jnp.asarray, c) for c in checkpoints]
    context = baselines.context(
        logits,
        checkpoints[-1],
        x[:N],
        labels[:N],
        num_classes=K,
        features=lambda params, x: x,
        head=None,
        checkpoints=tuple(checkpoints[:-1]),
        learning_rates=[0.5, 0.2, 0.1],
    )
    return context, jnp.asarray(x[N:]), jnp.asarray(labels[N:])


def probabilities(params, x):
    z = np.asarray(x, np.float64) @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def gradients(params, x, labels):
    """[b, p] of the cross-entropy: residual ⊗ (input, 1); bias before kernel, as their paths are sorted."""
    residual = probabilities(params, x) - np.eye(K)[np.asarray(labels)]
    kernel = np.asarray(x, np.float64)[:, :, None] * residual[:, None, :]
    return np.concatenate([residual, kernel.reshape(len(residual), -1)], axis=1)


def margin_gradients(params, x, labels):
    """The margin's gradient is the loss's, over −(1 − p)."""
    p = probabilities(params, x)[np.arange(len(x)), np.asarray(labels)]
    return -gradients(params, x, labels) / (1 - p)[:, None]


def run(method, regression, key=0):
    context, x, targets = regression
    fitted = method.fit(jax.random.key(key), context)
    return np.asarray(method.scores(fitted, x, targets)), np.asarray(method.self_influence(fitted))


OPTIONS = [{}, {"chunk": 4}, {"chunk": 5, "memory": 0}]


@pytest.mark.parametrize("options", OPTIONS)
def test_products_of_gradients(regression, options):
    context, x, targets = regression
    train, query = gradients(context.params, context.inputs, context.labels), gradients(context.params, x, targets)
    scores, influence = run(baselines.graddot(**options), regression)
    np.testing.assert_allclose(scores, query @ train.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(influence, (train**2).sum(1), rtol=1e-4)
    scores, influence = run(baselines.gradcos(**options), regression)
    norms = np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(train, axis=1)[None, :]
    np.testing.assert_allclose(scores, query @ train.T / norms, rtol=1e-4, atol=1e-5)


def test_tracin_is_the_mean_over_checkpoints(regression):
    context, x, targets = regression
    expected = np.zeros((Q, N))
    norms = np.zeros(N)
    for rate, params in zip([0.5, 0.2, 0.1], context.checkpoints, strict=True):
        train = gradients(params, context.inputs, context.labels)
        expected += rate * gradients(params, x, targets) @ train.T / 3
        norms += rate * (train**2).sum(1) / 3
    scores, influence = run(baselines.tracin(), regression)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(influence, norms, rtol=1e-4)
    last, _ = run(baselines.tracin(checkpoints=1), regression)
    np.testing.assert_allclose(last, 0.1 * run(baselines.graddot(), regression)[0], rtol=1e-6, atol=1e-7)
    rounded, _ = run(baselines.tracin(dtype=jnp.bfloat16), regression)
    assert not np.array_equal(rounded, scores)
    np.testing.assert_allclose(rounded, expected, atol=0.02 * np.abs(expected).max())


def test_linear_regression(regression):
    """Squared error: the gradient is the residual ⊗ (input, 1)."""
    context, x, targets = regression
    squared = dataclasses.replace(context, loss=lambda out, y: 0.5 * jnp.square(out - jax.nn.one_hot(y, K)).sum())
    residuals = [
        np.asarray(logits(context.params, a)) - np.eye(K)[np.asarray(b)]
        for a, b in ((x, targets), (context.inputs, context.labels))
    ]
    expected = (residuals[0] @ residuals[1].T) * (np.asarray(x) @ np.asarray(context.inputs).T + 1)
    np.testing.assert_allclose(run(baselines.graddot(), (squared, x, targets))[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("regularization", [0.0, 0.7])
@pytest.mark.parametrize("params", ["kernel", "all"])
def test_trak_without_projection_is_the_dense_formula(regression, regularization, params):
    context, x, targets = regression
    columns = slice(K, None) if params == "kernel" else slice(None)
    kernels, leverage, weights = np.zeros((Q, N)), np.zeros(N), np.zeros(N)
    for checkpoint in context.checkpoints:
        train = margin_gradients(checkpoint, context.inputs, context.labels)[:, columns]
        query = margin_gradients(checkpoint, x, targets)[:, columns]
        # The gradients of the classes sum to 0: the kernel is singular, and its pseudo-inverse is meant.
        gram = train.T @ train
        inverse = (
            np.linalg.pinv(gram, rcond=1e-9)
            if not regularization
            else np.linalg.inv(gram + regularization * np.eye(len(gram)))
        )
        kernels += query @ inverse @ train.T / 3
        leverage += np.einsum("np,pr,nr->n", train, inverse, train) / 3
        p = probabilities(checkpoint, context.inputs)[np.arange(N), np.asarray(context.labels)]
        weights += (1 - p) / 3
    method = baselines.trak(params=params, regularization=regularization, chunk=7)
    scores, influence = run(method, regression)
    expected = kernels * weights[None, :]
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(influence, leverage * weights, rtol=1e-3)


@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
def test_trak_with_a_projection_is_the_formula_on_projected_gradients(regression, kind):
    context, x, targets = regression
    one = dataclasses.replace(context, checkpoints=context.checkpoints[-1:], learning_rates=context.learning_rates[-1:])
    method = baselines.trak(projection=6, projection_kind=kind)
    fitted = method.fit(jax.random.key(3), one)
    # The projection of the unit vectors is its matrix.
    units = {"bias": jnp.eye(18)[:, :K], "kernel": jnp.eye(18)[:, K:].reshape(18, D, K)}
    key = jax.random.fold_in(jax.random.key(3), 0)
    project = jax.jit(projections.project, static_argnums=1)
    matrix = np.asarray(project(key, projections.Projection(6, kind), units), np.float64)
    train = margin_gradients(one.params, context.inputs, context.labels) @ matrix
    query = margin_gradients(one.params, x, targets) @ matrix
    p = probabilities(one.params, context.inputs)[np.arange(N), np.asarray(context.labels)]
    expected = query @ np.linalg.inv(train.T @ train) @ train.T * (1 - p)[None, :]
    scores = method.scores(fitted, x, targets)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("intercept", [0.0, 2.0])
def test_representer_is_the_stationary_point_that_scikit_learn_finds(regression, intercept):
    context, x, targets = regression
    method = baselines.representer(0.02, targets="labels", intercept_scaling=intercept)
    fitted = method.fit(jax.random.key(0), context)
    peer = LogisticRegression(C=1 / (2 * 0.02 * N), fit_intercept=False, tol=1e-10, max_iter=1000)
    extended = lambda x: np.pad(x, ((0, 0), (0, intercept > 0)), constant_values=intercept)  # noqa: E731
    peer.fit(extended(np.asarray(context.inputs, np.float64)), np.asarray(context.labels))
    np.testing.assert_allclose(fitted.weights, peer.coef_ - peer.coef_.mean(0), rtol=1e-4, atol=1e-6)
    sums = np.asarray(fitted.coefficients, np.float64).T @ np.asarray(fitted.points, np.float64)
    np.testing.assert_allclose(sums, fitted.weights, rtol=1e-4, atol=1e-6)
    assert float(fitted.residual) <= 1e-6
    scores = np.asarray(method.scores(fitted, x, targets))
    expected = (extended(np.asarray(x)) @ np.asarray(fitted.weights).T)[np.arange(Q), np.asarray(targets)]
    np.testing.assert_allclose(scores.sum(1), expected, rtol=1e-3, atol=1e-5)
    # With labels as targets, a sample's coefficient for its own label is positive, for others negative.
    own = np.asarray(context.labels)[:, None] == np.arange(K)
    assert (np.where(own, 1, -1) * np.asarray(fitted.coefficients) > 0).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_representer_is_stationary_on_soft_targets(regression, scale):
    context, *_ = regression
    scaled = dataclasses.replace(context, features=lambda params, x: scale * x)
    fitted = baselines.representer().fit(jax.random.key(0), scaled)
    w = np.asarray(fitted.coefficients, np.float64).T @ np.asarray(fitted.points, np.float64)
    z = np.asarray(fitted.points, np.float64) @ w.T
    e = np.exp(z - z.max(1, keepdims=True))
    soft = probabilities(context.params, context.inputs)
    expected = (e / e.sum(1, keepdims=True) - soft) / (-2 * 0.003 * N)
    np.testing.assert_allclose(fitted.coefficients, expected, atol=2e-3 * np.abs(expected).max())
    assert float(fitted.residual) <= 1e-6


def test_a_refit_that_is_not_stationary_says_so(regression):
    context, *_ = regression
    with pytest.warns(baselines.NotStationaryWarning, match="residual"):
        baselines.representer(tolerance=1e-30).fit(jax.random.key(0), context)


@pytest.mark.parametrize("space", ["features", "inputs"])
def test_similarity_by_hand(regression, space):
    context, x, targets = regression
    doubled = dataclasses.replace(context, features=lambda params, x: 2 * x)
    factor = 2 if space == "features" else 1
    a, b = factor * np.asarray(x, np.float64), factor * np.asarray(context.inputs, np.float64)
    sign = np.where(np.asarray(targets)[:, None] == np.asarray(context.labels)[None, :], 1, -1)
    expected = {
        "dot": a @ b.T,
        "cos": a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None, :],
        "l2": 1 / (1 + np.linalg.norm(a[:, None] - b[None], axis=2)),
    }
    for measure, values in expected.items():
        scores, _ = run(baselines.similarity(space, measure), (doubled, x, targets))
        np.testing.assert_allclose(scores, sign * values, rtol=1e-4, atol=1e-5)
    # The nearest sample of the target's class comes first.
    nearest = np.where(sign > 0, np.linalg.norm(a[:, None] - b[None], axis=2), np.inf).argmin(1)
    np.testing.assert_array_equal(scores.argmax(1), nearest)


def test_random_scores_depend_on_the_query_alone(regression):
    context, x, targets = regression
    method = baselines.random()
    fitted = method.fit(jax.random.key(0), context)
    scores = np.asarray(method.scores(fitted, x, targets))
    turned = np.asarray(method.scores(fitted, x[::-1], targets[::-1]))
    np.testing.assert_array_equal(turned, scores[::-1])
    assert len(np.unique(scores)) == scores.size
    other = method.scores(method.fit(jax.random.key(1), context), x, targets)
    assert not np.isin(np.asarray(other), scores).any()


def test_margin_is_the_log_odds():
    z = jnp.asarray([0.3, -1.0, 2.0])
    p = jax.nn.softmax(z)
    for label in range(3):
        np.testing.assert_allclose(margin(z, label), jnp.log(p[label] / (1 - p[label])), rtol=1e-5)


def test_the_loss_keeps_its_gradient_where_the_label_is_nearly_certain():
    z = jnp.asarray([14.0, 0.5, 0.25, -1.0])
    np.testing.assert_allclose(cross_entropy(z, 1), -jax.nn.log_softmax(z)[1], rtol=1e-6)
    e = np.exp(np.asarray(z, np.float64))
    p = e / e.sum()
    np.testing.assert_allclose(jax.grad(cross_entropy)(z, 0), [-p[1:].sum(), *p[1:]], rtol=1e-5)
