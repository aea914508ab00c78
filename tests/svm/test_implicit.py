"""Implicit derivatives against central differences of an exact active-set solution in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dualxda_jax import attribution, svm
from dualxda_jax.svm import implicit

N, D, K = 30, 5, 3


def project_rows(points, size):
    """Nearest point of the simplex {P ≥ 0, Σ P = size}, row by row, by sorting."""
    ordered = -np.sort(-points, axis=1)
    shifts = (np.cumsum(ordered, axis=1) - size[:, None]) / np.arange(1, points.shape[1] + 1)
    last = (ordered > shifts).sum(axis=1) - 1
    return np.maximum(points - shifts[np.arange(len(points)), last][:, None], 0)


def margins_of(kernel, labels, alpha):
    return kernel @ alpha + 1 - np.eye(alpha.shape[1])[labels]


def relative_gap(kernel, labels, cost, alpha):
    margins = margins_of(kernel, labels, alpha)
    rows = np.arange(len(labels))
    gap = np.sum((cost[:, None] * np.eye(alpha.shape[1])[labels] - alpha) * (margins.max(1, keepdims=True) - margins))
    primal = 0.5 * np.sum(alpha * (kernel @ alpha)) + np.sum(cost * (margins.max(1) - margins[rows, labels]))
    return gap / primal


def polish(kernel, labels, cost, active):
    """The optimum among dual variables with this pattern: equal margins over the active entries of each row."""
    k = active.shape[1]
    rows, columns = np.nonzero(active)
    start = margins_of(kernel, labels, cost[:, None] * np.eye(k)[labels])
    # Margins at the active entries as an affine function of P there.
    slope = -kernel[np.ix_(rows, rows)] * (columns[:, None] == columns[None, :])
    matrix, right = np.zeros((len(rows), len(rows))), np.zeros(len(rows))
    for i in range(len(labels)):
        (own,) = np.nonzero(rows == i)
        matrix[own[0], own], right[own[0]] = 1, cost[i]
        matrix[own[1:]] = slope[own[0]] - slope[own[1:]]
        right[own[1:]] = start[i, columns[own[1:]]] - start[i, columns[own[0]]]
    simplex = np.zeros(active.shape)
    simplex[rows, columns] = np.linalg.solve(matrix, right)
    return cost[:, None] * np.eye(k)[labels] - simplex


def exact(features, labels, cost, k, scaling=0.0, active=None):
    """Optimal dual variables to rounding: projected coordinate ascent finds the pattern, a linear solve the rest."""
    kernel = features @ features.T + scaling**2
    one_hot = np.eye(k)[labels]
    if active is None:
        simplex = cost[:, None] * one_hot
        for _ in range(400):
            for i in range(len(labels)):
                if cost[i] > 0:
                    own = margins_of(kernel[i : i + 1], labels[i : i + 1], cost[:, None] * one_hot - simplex)
                    step = simplex[i : i + 1] + own / kernel[i, i]
                    simplex[i] = project_rows(step, cost[i : i + 1])[0]
        active = simplex > 1e-7 * cost[:, None]
        active[cost == 0, labels[cost == 0]] = True
    alpha = polish(kernel, labels, cost, active)
    assert np.min(cost[:, None] * one_hot - alpha) >= -1e-13
    assert abs(relative_gap(kernel, labels, cost, alpha)) < 1e-13
    return alpha, active


def make_problem(seed, scaling, left_out=0, k=K):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, N)
    features = rng.normal(size=(N, D)) + 1.5 * rng.normal(size=(k, D))[labels]
    cost = 0.1 * rng.uniform(0.5, 2.0, N)
    cost[:left_out] = 0
    alpha, active = exact(features, labels, cost, k, scaling)
    assert (active.sum(1) >= 2).sum() >= 3
    return features, labels, cost, alpha, active


# Seed, intercept scaling, samples without cost, classes.
PROBLEMS = [(1, 0.8, 0, 3), (2, 0.0, 4, 3), (4, 0.0, 0, 6)]
problems = pytest.mark.parametrize(("seed", "scaling", "left_out", "k"), PROBLEMS)


def outputs(alpha, features, scaling, query):
    """What a user looks at: coefficients, weights, intercept and scores of a query for every class."""
    weights = jnp.einsum("nk,nd->kd", alpha, features)
    kernel = jnp.einsum("nd,d->n", features, query) + scaling**2
    return {
        "coefficients": alpha,
        "weights": weights,
        "intercept": scaling**2 * alpha.sum(axis=0),
        "scores": alpha * kernel[:, None],
    }


def attached(problem, scaling, query, k=K):
    """`outputs` as a function of the features and the cost, with the derivatives under test."""
    _, labels, _, alpha, _ = problem

    def of(features, cost):
        solution = implicit.attach(
            jnp.asarray(alpha), features, jnp.asarray(labels), cost, num_classes=k, intercept_scaling=scaling
        )
        return outputs(solution, features, scaling, query)

    return of


def median_error(got, expected):
    got, expected = np.asarray(got).ravel(), np.asarray(expected).ravel()
    scale = np.abs(expected) > 1e-9
    assert scale.any() and np.abs(got[~scale]).max(initial=0) < 1e-7
    return np.median(np.abs(got - expected)[scale] / np.abs(expected)[scale])


@problems
def test_against_central_differences(x64, seed, scaling, left_out, k):
    problem = make_problem(seed, scaling, left_out, k)
    features, labels, cost, _, active = problem
    rng = np.random.default_rng(100 + seed)
    query = jnp.asarray(rng.normal(size=D))
    present = (cost > 0).astype(float)
    directions = {
        "features": (rng.normal(size=features.shape), np.zeros(N)),
        "one cost for all": (np.zeros(features.shape), present),
        "cost": (np.zeros(features.shape), present * rng.normal(size=N)),
        "both": (rng.normal(size=features.shape), present * rng.normal(size=N)),
    }
    step = 1e-6
    for name, (by_features, by_cost) in directions.items():
        both = []
        for sign in (1, -1):
            moved = features + sign * step * by_features
            alpha, _ = exact(moved, labels, cost + sign * step * by_cost, k, scaling, active)
            both.append(outputs(jnp.asarray(alpha), jnp.asarray(moved), scaling, query))
        numeric = jax.tree.map(lambda a, b: (a - b) / (2 * step), *both)
        _, got = jax.jvp(
            attached(problem, scaling, query, k),
            (jnp.asarray(features), jnp.asarray(cost)),
            (jnp.asarray(by_features), jnp.asarray(by_cost)),
        )
        for output in got:
            if output != "intercept" or scaling:
                assert median_error(got[output], numeric[output]) < 1e-6, (name, output)


@problems
def test_reverse_is_the_transpose_of_forward(x64, seed, scaling, left_out, k):
    problem = make_problem(seed, scaling, left_out, k)
    features, _, cost, _, _ = problem
    rng = np.random.default_rng(200 + seed)
    of = attached(problem, scaling, jnp.asarray(rng.normal(size=D)), k)
    primals = jnp.asarray(features), jnp.asarray(cost)
    tangents = tuple(jnp.asarray(rng.normal(size=p.shape)) for p in primals)
    out, forward = jax.jvp(of, primals, tangents)
    weight = jax.tree.map(lambda o: jnp.asarray(rng.normal(size=o.shape)), out)
    backward = jax.vjp(of, *primals)[1](weight)
    dot = lambda a, b: sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))  # noqa: E731
    np.testing.assert_allclose(dot(weight, forward), dot(backward, tangents), rtol=1e-9)


def test_value_is_untouched_and_own_derivative_dropped(x64):
    features, labels, cost, alpha, _ = make_problem(0, 0.0)
    arguments = jnp.asarray(features), jnp.asarray(labels), jnp.asarray(cost)

    def of(coefficients):
        return implicit.attach(coefficients, *arguments, num_classes=K, intercept_scaling=0.0)

    value, tangent = jax.jvp(of, (jnp.asarray(alpha),), (jnp.ones((N, K)),))
    np.testing.assert_array_equal(value, alpha)
    np.testing.assert_array_equal(tangent, 0)


def gradient(problem, scaling=0.0):
    """Gradient of a fixed random functional by features and cost."""
    rng = np.random.default_rng(7)
    of = attached(problem, scaling, jnp.asarray(rng.normal(size=D)))
    weight = jnp.asarray(rng.normal(size=(K, D)))
    return jax.grad(lambda f, c: jnp.vdot(weight, of(f, c)["weights"]), argnums=(0, 1))


def test_jit_equals_eager(x64):
    problem = make_problem(1, 0.8)
    primals = jnp.asarray(problem[0]), jnp.asarray(problem[2])
    eager, compiled = gradient(problem, 0.8)(*primals), jax.jit(gradient(problem, 0.8))(*primals)
    for one, other in zip(eager, compiled, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_across_a_mesh(x64, kind):
    """Left-out rows fill the problem up to a multiple of the devices."""
    features, labels, cost, alpha, active = make_problem(1, 0.8)
    fill = lambda a: np.concatenate([a, np.zeros_like(a[:2])])  # noqa: E731
    problem = tuple(map(fill, (features, labels, cost, alpha, active)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    weight = jnp.asarray(np.random.default_rng(7).normal(size=(K, D)))

    def gradient(features, cost, labels, alpha):
        def value(features, cost):
            solution = implicit.attach(alpha, features, labels, cost, num_classes=K, intercept_scaling=0.8)
            return jnp.sum(solution * (features @ weight.T))

        return jax.grad(value, argnums=(0, 1))(features, cost)

    arguments = tuple(jnp.asarray(problem[i]) for i in (0, 2, 1, 3))
    expected = gradient(*arguments)
    with jax.set_mesh(mesh):
        spread = jax.device_put(arguments, rows)
        got = jax.jit(gradient)(*spread)
    for one, other in zip(got, expected, strict=True):
        assert one.sharding.shard_shape(one.shape)[0] == 4
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-10)


def test_vmap_over_problems_with_different_patterns(x64):
    cases = [make_problem(seed, 0.0) for seed in (0, 5, 6)]
    labels, alphas = (jnp.asarray(np.stack([c[i] for c in cases])) for i in (1, 3))
    features, costs = (jnp.asarray(np.stack([c[i] for c in cases])) for i in (0, 2))
    assert len({int((c[4].sum(1) >= 2).sum()) for c in cases}) > 1

    def value(features, cost, labels, alpha):
        solution = implicit.attach(alpha, features, labels, cost, num_classes=K, intercept_scaling=0.0)
        return jnp.sum(jnp.einsum("nk,nd->kd", solution, features) ** 3)

    gradients = jax.grad(value, argnums=(0, 1))
    together = jax.jit(jax.vmap(gradients))(features, costs, labels, alphas)
    for i in range(3):
        alone = gradients(features[i], costs[i], labels[i], alphas[i])
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(other[i], one, rtol=1e-8, atol=1e-10)


def test_jacobians_agree(x64):
    problem = make_problem(0, 0.0)
    of = attached(problem, 0.0, jnp.ones(D))
    features, cost = jnp.asarray(problem[0]), jnp.asarray(problem[2])
    weights = lambda c: of(features, c)["weights"]  # noqa: E731
    np.testing.assert_allclose(jax.jacfwd(weights)(cost), jax.jacrev(weights)(cost), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("chunk", [4, 15])
def test_chunks_do_not_matter(x64, monkeypatch, chunk):
    problem = make_problem(1, 0.8)
    primals = jnp.asarray(problem[0]), jnp.asarray(problem[2])
    expected = gradient(problem, 0.8)(*primals)
    monkeypatch.setattr(implicit, "_CHUNK", chunk)
    for one, other in zip(jax.jit(gradient(problem, 0.8))(*primals), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_types_without_x64(dtype):
    """The pattern of a rounded solution is recognised, and the work is done in float64 all the same."""
    features, labels, cost, _, _ = make_problem(0, 0.0)
    features = np.asarray(jnp.asarray(features, dtype).astype(jnp.float32), np.float64)
    alpha, _ = exact(features, labels, cost, K)
    weight = np.random.default_rng(1).normal(size=(N, K))

    def gradient(coefficients, features, cost):
        def value(features, cost):
            solution = implicit.attach(
                coefficients, features, jnp.asarray(labels), cost, num_classes=K, intercept_scaling=0.0
            )
            return jnp.vdot(jnp.asarray(weight, solution.dtype), solution)

        return jax.grad(value, argnums=(0, 1))(features, cost)

    narrow = jnp.asarray(alpha, jnp.float32), jnp.asarray(features, dtype), jnp.asarray(cost, jnp.float32)
    got = jax.jit(gradient)(*narrow)
    with jax.enable_x64(True):
        expected = gradient(*(jnp.asarray(a, jnp.float64) for a in (alpha, features, cost)))
    assert got[0].dtype == dtype and got[1].dtype == jnp.float32
    for one, other, tolerance in zip(got, expected, (float(jnp.finfo(dtype).eps), 1e-5), strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(np.asarray(one, np.float64), other, atol=4 * tolerance * scale, rtol=0)


def test_without_free_rows_only_the_box_moves(x64):
    """Two classes and a tiny cost: every sample sits in a corner of its box and moves with its own cost alone."""
    rng = np.random.default_rng(3)
    labels, features, cost = np.arange(N) % 2, rng.normal(size=(N, D)), np.full(N, 1e-4)
    alpha = cost[:, None] * (np.eye(2)[labels] - np.eye(2)[1 - labels])
    assert relative_gap(features @ features.T, labels, cost, alpha) < 1e-15
    of = attached((features, labels, cost, alpha, None), 0.0, jnp.ones(D), 2)
    coefficients = lambda f, c: of(f, c)["coefficients"]  # noqa: E731
    by_features, by_cost = jax.jacrev(coefficients, argnums=(0, 1))(jnp.asarray(features), jnp.asarray(cost))
    np.testing.assert_array_equal(by_features, 0)
    np.testing.assert_allclose(by_cost, (alpha / cost[:, None])[:, :, None] * np.eye(N)[:, None, :], atol=1e-12)


def test_left_out_samples(x64):
    """Cost 0: no pull on anything by features; by cost the derivative from above."""
    problem = make_problem(2, 0.0, left_out=4)
    features, labels, cost, _, active = problem
    query = jnp.ones(D)
    of = attached(problem, 0.0, query)
    gradients = jax.grad(lambda f, c: jnp.sum(jnp.sin(of(f, c)["coefficients"])), argnums=(0, 1))
    by_features, by_cost = gradients(jnp.asarray(features), jnp.asarray(cost))
    np.testing.assert_array_equal(by_features[:4], 0)
    step, base = 1e-7, np.sum(np.sin(problem[3]))
    numeric = []
    for i in range(4):
        kernel = features @ features.T
        entering = active.copy()
        entering[i] = np.eye(K)[margins_of(kernel, labels, problem[3])[i].argmax()]
        alpha, _ = exact(features, labels, cost + step * np.eye(N)[i], K, active=entering.astype(bool))
        numeric.append((np.sum(np.sin(alpha)) - base) / step)
    np.testing.assert_allclose(by_cost[:4], numeric, rtol=1e-4, atol=1e-6)


def test_duplicates_give_finite_derivatives_of_the_weights(x64):
    """Two copies of a sample share what one would have: α is not unique, the weights' derivative by cost is."""
    features, labels, cost, alpha, active = make_problem(0, 0.0)
    twin = int(np.flatnonzero(active.sum(1) >= 2)[0])
    doubled = [np.concatenate([a, a[twin : twin + 1]]) for a in (features, labels, cost, alpha)]
    for array in doubled[2:]:
        array[[twin, -1]] /= 2

    def weights(cost, problem):
        solution = implicit.attach(
            jnp.asarray(problem[3]), jnp.asarray(problem[0]), jnp.asarray(problem[1]), cost,
            num_classes=K, intercept_scaling=0.0,
        )  # fmt: skip
        return jnp.einsum("nk,nd->kd", solution, jnp.asarray(problem[0]))

    alone = jax.jacfwd(functools.partial(weights, problem=(features, labels, cost, alpha)))(jnp.asarray(cost))
    shared = jax.jacfwd(functools.partial(weights, problem=doubled))(jnp.asarray(doubled[2]))
    np.testing.assert_allclose(shared[..., :N], alone, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(shared[..., N], alone[..., twin], rtol=1e-7, atol=1e-8)


def numeric_slope(value, primals, tangents, step=1e-6):
    ahead, behind = (value(*(p + sign * step * t for p, t in zip(primals, tangents, strict=True))) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradient_through_the_solver(x64, per_sample):
    features, labels, cost, _, active = make_problem(1, 0.8)
    rng = np.random.default_rng(11)
    direction = rng.normal(size=(K, D + 1))
    weight = rng.uniform(0.5, 2, N) if per_sample else cost / 0.1
    primals = features, cost / weight if per_sample else np.asarray(0.1), weight

    def exact_value(features, cost, weight):
        alpha, _ = exact(features, labels, cost * weight, K, 0.8, active)
        return np.vdot(direction, np.concatenate([alpha.T @ features, 0.64 * alpha.sum(0)[:, None]], axis=1))

    def solved_value(features, cost, weight):
        config = svm.SolverConfig(tolerance=1e-7, intercept_scaling=0.8)
        solution = svm.solve(
            features, jnp.asarray(labels), num_classes=K, cost=cost, sample_weight=weight, config=config
        )
        made = jnp.concatenate([solution.weights, solution.intercept[:, None]], axis=1)
        return jnp.vdot(jnp.asarray(direction), made)

    gradients = jax.jit(jax.grad(solved_value, argnums=(0, 1, 2)))(*map(jnp.asarray, primals))
    errors = []
    for place in range(3):
        for _ in range(5):
            tangents = [np.zeros_like(p) for p in primals]
            tangents[place] = rng.normal(size=primals[place].shape)
            numeric = numeric_slope(exact_value, primals, tangents)
            errors.append(abs(np.vdot(gradients[place], tangents[place]) - numeric) / abs(numeric))
    assert np.median(errors) < 1e-5 and np.max(errors) < 1e-3


def test_gradient_of_a_top_score(x64):
    """Solve, compress, rank, and differentiate the score of the first proponent by the training features."""
    features, labels, cost, _, active = make_problem(1, 0.8)
    rng = np.random.default_rng(12)
    query, target = rng.normal(size=D), 1

    def top(features):
        config = svm.SolverConfig(tolerance=1e-7, intercept_scaling=0.8)
        solution = svm.solve(features, jnp.asarray(labels), num_classes=K, cost=jnp.asarray(cost), config=config)
        model = attribution.compress(features, labels, solution)
        best = attribution.top_k(model, jnp.asarray(query)[None, :], jnp.asarray([target]), k=1)
        return best.scores[0, 0], best.index[0, 0]

    gradient, place = jax.grad(top, has_aux=True)(jnp.asarray(features))

    def exact_top(features):
        alpha, _ = exact(features, labels, cost, K, 0.8, active)
        scores = alpha[:, target] * (features @ query + 0.64)
        assert scores.argmax() == int(place)
        return scores.max()

    errors = []
    for _ in range(5):
        tangent = rng.normal(size=features.shape)
        numeric = numeric_slope(exact_top, (features,), (tangent,))
        errors.append(abs(np.vdot(gradient, tangent) - numeric) / abs(numeric))
    assert np.median(errors) < 1e-5


def test_second_derivative_is_refused(x64):
    problem = make_problem(0, 0.0)
    with pytest.raises(ValueError, match=r"^svm\.solve: got a second derivative"):
        jax.hessian(lambda c: jnp.sum(attached(problem, 0.0, jnp.ones(D))(jnp.asarray(problem[0]), c)["weights"] ** 2))(
            jnp.asarray(problem[2])
        )


def test_bad_shapes(x64):
    features, labels, cost, alpha, _ = (jnp.asarray(a) for a in make_problem(0, 0.0))
    for wrong, name in [((alpha[1:], labels, cost), "coefficients"), ((alpha, labels, cost[0]), "cost")]:
        with pytest.raises(ValueError, match=f"^{name}: got shape"):
            implicit.attach(wrong[0], features, *wrong[1:], num_classes=K, intercept_scaling=0.0)
