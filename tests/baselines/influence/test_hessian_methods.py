"""Explicit, conjugate gradients, LiSSA and Arnoldi against closed forms."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import baselines
from dualxda_jax.baselines import influence
from dualxda_jax.baselines.influence import arnoldi, explicit, hvp, lissa, solved

KEY = jax.random.key(0)
DAMPING = 0.02


def linear(params, x):
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


def squared_loss(logits, label):
    """Least squares to the label's unit vector."""
    return jnp.sum(jnp.square(logits - jax.nn.one_hot(label, logits.size, dtype=logits.dtype))) / 2


def random_problem(n=30, d=4, k=3, dtype=np.float32):
    """Inputs, labels and the parameters of a linear layer."""
    rng = np.random.default_rng(0)
    kernel = (0.5 * rng.normal(size=(d, k))).astype(dtype)
    params = {"head": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(rng.normal(size=k).astype(dtype))}}
    return rng.normal(size=(n, d)).astype(dtype), rng.integers(0, k, n).astype(np.int32), params


@pytest.fixture(scope="module")
def logistic():
    """A context of logistic regression (cross-entropy), queries and their targets, all float32."""
    x, y, params = random_problem()
    query = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    context = baselines.context(linear, params, x, y, num_classes=3, head="head")
    return context, jnp.asarray(query), jnp.asarray([0, 1, 2, 0, 1], jnp.int32)


@pytest.fixture(scope="module")
def logistic_truth(logistic):
    """Gradients [·, p] of training samples and queries and the mean Hessian, in float64 by the formulas of softmax."""
    context, query, targets = logistic
    layer = {k: np.asarray(v, np.float64) for k, v in context.params["head"].items()}

    def parts(x, y):
        x = np.asarray(x, np.float64)
        z = x @ layer["kernel"] + layer["bias"]
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        # Parameters in the order of their sorted paths: bias, kernel.
        extended = np.concatenate([np.ones((len(x), 1)), x], axis=1)
        return extended, p, np.einsum("ni,nk->nik", extended, p - np.eye(3)[np.asarray(y)]).reshape(len(x), -1)

    extended, p, training = parts(context.inputs, context.labels)
    curvature = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]
    hessian = np.einsum("ni,nj,nkl->ikjl", extended, extended, curvature).reshape(15, 15) / len(p)
    return training, parts(query, targets)[2], hessian


def relative_error(got, expected):
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


def run(method, problem):
    context, query, targets = problem
    fitted = method.fit(KEY, context)
    return method.scores(fitted, query, targets), method.self_influence(fitted)


@pytest.fixture(scope="module")
def truth(logistic_truth):
    """Scores and self-influence by the explicit inverse in float64."""
    training, query, hessian = logistic_truth
    solved = np.linalg.solve(hessian + DAMPING * np.eye(len(hessian)), training.T)
    return query @ solved, np.einsum("np,pn->n", training, solved)


@pytest.mark.parametrize(
    ("method", "bound"),
    [
        (baselines.influence_explicit(damping=DAMPING), 1e-5),
        (baselines.influence_explicit(damping=DAMPING, hessian="ggn", chunk=7), 1e-5),
        (baselines.influence_cg(damping=DAMPING, tolerance=1e-6, chunk=11, vectors=4), 1e-5),
        # Every direction, at a tolerance of zero: the whole spectrum.
        (
            baselines.influence_arnoldi(
                rank=15, krylov=15, regularization=DAMPING, tolerance=1e-6, inverse_tolerance=0.0, hessian="ggn"
            ),
            1e-4,
        ),
        # 5% of the largest score: batches of 30 draws from 30 samples, 20 runs of 800 steps.
        (baselines.influence_lissa(damping=DAMPING, scale=2.0, depth=800, repeats=20, batch=30), 5e-2),
    ],
    ids=["explicit", "explicit-ggn", "cg", "arnoldi", "lissa"],
)
def test_logistic_regression_by_the_explicit_inverse(method, bound, logistic, truth):
    scores, own = run(method, logistic)
    assert scores.shape == (5, 30)
    assert scores.dtype == jnp.float32
    assert relative_error(scores, truth[0]) < bound
    assert relative_error(own, truth[1]) < bound


@pytest.mark.parametrize(
    ("method", "bound"),
    [
        (baselines.influence_explicit(damping=DAMPING), 1e-5),
        (baselines.influence_cg(damping=DAMPING, tolerance=1e-6, chunk=11, vectors=4), 1e-5),
        (
            baselines.influence_arnoldi(
                rank=15, krylov=15, regularization=DAMPING, tolerance=1e-6, inverse_tolerance=0.0
            ),
            1e-4,
        ),
        # As above: 5% of the largest score, for the noise of its draws.
        (baselines.influence_lissa(damping=DAMPING, scale=6.0, depth=400, repeats=20, batch=30), 5e-2),
    ],
    ids=["explicit", "cg", "arnoldi", "lissa"],
)
def test_linear_regression_by_the_explicit_inverse(method, bound, logistic):
    context, query, targets = logistic
    context = dataclasses.replace(context, loss=squared_loss)

    def gradients(x, y):
        x, layer = np.asarray(x, np.float64), context.params["head"]
        rest = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"]) - np.eye(3)[np.asarray(y)]
        extended = np.concatenate([np.ones((len(x), 1)), x], axis=1)
        return extended, np.einsum("ni,nk->nik", extended, rest).reshape(len(x), -1)

    extended, training = gradients(context.inputs, context.labels)
    hessian = np.kron(extended.T @ extended / len(extended), np.eye(3))
    solved = np.linalg.solve(hessian + DAMPING * np.eye(15), training.T)
    scores, own = run(method, (context, query, targets))
    assert relative_error(scores, gradients(query, targets)[1] @ solved) < bound
    assert relative_error(own, np.einsum("np,pn->n", training, solved)) < bound


def test_leave_one_out_of_ridge_regression(x64):
    x, y, params = random_problem(dtype=np.float64)
    n, ridge = len(x), 0.05
    extended = np.concatenate([x, np.ones((n, 1))], axis=1)
    targets = np.eye(3)[y]

    def train(kept):
        """argmin of Σ_kept ½‖z_i − t_i‖² / n + ridge/2 ‖W‖²."""
        gram = extended[kept].T @ extended[kept] / n + ridge * np.eye(5)
        return np.linalg.solve(gram, extended[kept].T @ targets[kept] / n)

    weights = train(np.arange(n))
    params = {"head": {"kernel": jnp.asarray(weights[:-1]), "bias": jnp.asarray(weights[-1])}}
    context = baselines.context(linear, params, x, y, num_classes=3, loss=squared_loss)
    query = np.random.default_rng(2).normal(size=(1, 4))
    method = baselines.influence_explicit(damping=ridge)
    scores = np.asarray(method.scores(method.fit(KEY, context), query, np.asarray([1])))[0]
    point = np.append(query[0], 1.0)
    gradient = np.outer(point, point @ weights - np.eye(3)[1])
    leverage = np.einsum(
        "ni,ni->n", extended, np.linalg.solve(extended.T @ extended / n + ridge * np.eye(5), extended.T).T
    )
    risen = []
    for i in range(n):
        moved = train(np.delete(np.arange(n), i)) - weights
        # Sherman and Morrison: the exact step is the influence over 1 − h_i / n.
        np.testing.assert_allclose(n * np.sum(gradient * moved), scores[i] / (1 - leverage[i] / n), rtol=1e-9)
        risen.append(np.sum(np.square(point @ (weights + moved) - np.eye(3)[1])) / 2)
    # To first order the loss itself: it rises where a sample is missing that speaks for the target.
    assert np.corrcoef(risen, scores)[0, 1] > 0.98


def test_products_of_a_network_with_the_hessian(x64):
    """Where network and loss are curved: against jax.hessian of the mean loss, and Jᵀ H J."""
    x, y, params = random_problem(n=9, dtype=np.float64)
    params["body"] = {"kernel": jnp.asarray(np.random.default_rng(3).normal(size=(4, 4)))}

    def network(params, x):
        return linear(params, jnp.tanh(x @ params["body"]["kernel"]))

    context = baselines.context(network, params, x, y, num_classes=3)
    vectors = jnp.asarray(np.random.default_rng(4).normal(size=(3, 31)))
    like = {"body/kernel": params["body"]["kernel"], "head/bias": params["head"]["bias"]}
    like["head/kernel"] = params["head"]["kernel"]

    def flat_network(vector):
        tree = hvp.as_tree(vector, like)
        head = {"kernel": tree["head/kernel"], "bias": tree["head/bias"]}
        return network({"body": {"kernel": tree["body/kernel"]}, "head": head}, context.inputs)

    def mean_loss(vector):
        return jax.vmap(context.loss)(flat_network(vector), context.labels).mean()

    at = hvp.as_vector(like)

    @jax.jit
    def matrices(at):
        jacobian = jax.jacobian(flat_network)(at)
        curvature = jax.vmap(jax.hessian(context.loss))(flat_network(at), context.labels)
        gauss_newton = jnp.einsum("nkp,nkl,nlq->pq", jacobian, curvature, jacobian) / 9
        return {"exact": jax.hessian(mean_loss)(at), "ggn": gauss_newton}

    expected = matrices(at)
    for name, matrix in expected.items():
        config = hvp.Config("all", name, 4, 2)
        got = jax.jit(hvp.product, static_argnums=1)(context, config, 0.3, vectors)
        np.testing.assert_allclose(got, vectors @ matrix + 0.3 * vectors, rtol=1e-9, atol=1e-12)


def test_arnoldi_keeps_the_largest_eigenvalues(logistic, logistic_truth):
    training, query, hessian = logistic_truth
    values, vectors = np.linalg.eigh(hessian)
    kept = vectors[:, -4:] / np.sqrt(values[-4:] + DAMPING)
    method = baselines.influence_arnoldi(rank=4, krylov=15, regularization=DAMPING, tolerance=1e-5)
    scores, own = run(method, logistic)
    assert relative_error(scores, (query @ kept) @ (training @ kept).T) < 1e-4
    assert relative_error(own, np.square(training @ kept).sum(1)) < 1e-4


def test_arnoldi_warns_where_the_tolerance_leaves_one_direction(logistic):
    context, _, _ = logistic
    with pytest.warns(UserWarning, match="one direction of 4.* tolerance=10.0"):
        fitted = baselines.influence_arnoldi(rank=4, krylov=15, tolerance=10.0).fit(KEY, context)
    assert np.linalg.matrix_rank(fitted.vectors) == 1


def test_arnoldi_iteration_ends_at_an_invariant_subspace():
    matrix = jnp.diag(jnp.asarray([3.0, 2.0, 1.0, 1.0, 1.0, 0.0]))
    start = jnp.asarray([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    basis, projected, count = arnoldi.iterate(lambda v: matrix @ v, start, krylov=6, tolerance=1e-4)
    assert int(count) == 3
    np.testing.assert_allclose(basis[:3] @ basis[:3].T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(np.linalg.eigvalsh(projected[:3, :3]), [1.0, 2.0, 3.0], atol=1e-5)
    assert not np.asarray(basis[3:]).any()
    assert not np.asarray(projected[3:]).any()


def test_another_damping_compiles_nothing(logistic):
    context, query, targets = logistic

    def run_all(damping):
        methods = [
            baselines.influence_explicit(damping=damping),
            # The solvers of CG and LiSSA are compiled into one and the same function.
            baselines.influence_cg(damping=damping, tolerance=damping / 1e3),
        ]
        return [np.asarray(method.scores(method.fit(KEY, context), query, targets)) for method in methods]

    first = run_all(0.02)
    compiled = (explicit._invert, explicit._scores, solved._scores)
    before = [function._cache_size() for function in compiled]
    second = run_all(0.3)
    assert [function._cache_size() for function in compiled] == before
    assert all(relative_error(b, a) > 0.01 for a, b in zip(first, second, strict=True))


def test_queries_do_not_meet_each_other_in_lissa(logistic):
    """The reference's gradients piled up from one query to the next."""
    context, query, targets = logistic
    method = baselines.influence_lissa(damping=DAMPING, scale=2.0, depth=20, repeats=2, batch=8)
    fitted = method.fit(KEY, context)
    together = method.scores(fitted, query, targets)
    alone = method.scores(fitted, query[3:4], targets[3:4])
    np.testing.assert_allclose(together[3:4], alone, rtol=1e-4, atol=1e-6)
    assert (method.scores(method.fit(jax.random.key(1), context), query, targets) != together).any()


@pytest.mark.parametrize("scale", [0.05, 0.3], ids=["overflow", "growth"])
def test_lissa_reports_divergence(logistic, scale):
    context, query, targets = logistic
    method = baselines.influence_lissa(damping=DAMPING, scale=scale, depth=40, repeats=2, batch=30)
    if scale == 0.3:
        method = baselines.influence_lissa(damping=DAMPING, scale=0.08, depth=7, repeats=2, batch=30)
    fitted = method.fit(KEY, context)
    with pytest.raises(ValueError, match=r"scale: got .* series diverged"):
        method.scores(fitted, query, targets)
    traced = jax.jit(method.scores)(fitted, query, targets)
    assert np.isnan(np.asarray(traced)).all()


def test_lissa_growth_is_bounded_by_contractions(logistic):
    context, query, targets = logistic
    config, numbers = lissa.Config("all", "exact", 64, 8, 2, 50, 16), {"damping": DAMPING, "scale": 2.0}
    vectors = hvp.gradients(context, config, query, targets)
    _, growth = lissa.series(config, numbers, solved.Fitted(context, KEY), vectors.at[0].set(0.0))
    assert float(growth[0]) == 0.0
    assert (np.asarray(growth[1:]) < 1.0).all()


def test_singular_hessians(logistic):
    """Softmax does not see a common shift of the logits, so that the Hessian is singular."""
    scores, own = run(baselines.influence_explicit(damping=0.0), logistic)
    solved, _ = run(baselines.influence_cg(damping=0.0, tolerance=1e-6), logistic)
    # Gradients have no part in the null space, so the pseudo-inverse and conjugate gradients agree.
    assert relative_error(solved, np.asarray(scores)) < 1e-3
    assert (np.asarray(own) >= 0).all()


def test_negative_curvature_is_reported():
    x, y, params = random_problem()

    def saddle(logits, label):
        return logits[0] ** 2 - logits[1] ** 2 + logits[2] * (label + 1).astype(logits.dtype)

    context = baselines.context(linear, params, x, y, num_classes=3, loss=saddle)
    query, targets = jnp.asarray(x[:3]), jnp.asarray(y[:3])
    method = baselines.influence_cg(damping=1e-3, hessian="exact")
    with pytest.warns(influence.NotConvergedWarning, match="3 of 3 solves missed the tolerance, 3 of them at negative"):
        scores = method.scores(method.fit(KEY, context), query, targets)
    assert np.isfinite(np.asarray(scores)).all()
    # The explicit inverse takes them as they are: 2 EE, -2 EE and 0 for the three outputs, E = mean of (1, x)(1, x)ᵀ.
    extended = np.concatenate([np.ones((30, 1)), x], axis=1).astype(np.float64)
    layer = {k: np.asarray(v, np.float64) for k, v in params["head"].items()}
    logits = x @ layer["kernel"] + layer["bias"]
    slopes = np.stack([2 * logits[:, 0], -2 * logits[:, 1], y + 1.0], axis=1)
    expected = 0.0
    for output, curvature in enumerate((2.0, -2.0, 0.0)):
        inverse = np.linalg.inv(curvature * extended.T @ extended / 30 + 0.1 * np.eye(5))
        gradients = extended * slopes[:, output : output + 1]
        expected = expected + gradients[:3] @ inverse @ gradients.T
    method = baselines.influence_explicit(damping=0.1)
    assert relative_error(method.scores(method.fit(KEY, context), query, targets), expected) < 1e-4


def test_conjugate_gradients_say_when_they_run_out_of_iterations(logistic):
    context, query, targets = logistic
    method = baselines.influence_cg(damping=1e-6, max_iterations=2)
    fitted = method.fit(KEY, context)
    with pytest.warns(influence.NotConvergedWarning, match="5 of 5 solves .* or more max_iterations"):
        method.scores(fitted, query, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(method.scores)(fitted, query, targets)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: baselines.influence_explicit(damping=-1.0), "damping: got -1.0"),
        (lambda: baselines.influence_explicit(hessian="fisher"), "hessian: got 'fisher'"),
        (lambda: baselines.influence_cg(tolerance=0.0), "tolerance: got 0.0"),
        (lambda: baselines.influence_cg(max_iterations=0), "max_iterations: got 0"),
        (lambda: baselines.influence_lissa(depth=0), "depth: got 0"),
        (lambda: baselines.influence_lissa(scale=0.0), "scale: got 0.0"),
        (lambda: baselines.influence_lissa(batch=2.5), "batch: got 2.5"),
        (lambda: baselines.influence_arnoldi(rank=9, krylov=8), "rank: got 9, must be at most krylov=8"),
        (lambda: baselines.influence_arnoldi(tolerance=float("nan")), "tolerance: got nan"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (baselines.influence_explicit(max_parameters=14), "params: got 15 parameters"),
        (baselines.influence_explicit(params="tail"), "params: got 'tail'"),
        (baselines.influence_cg(params="tail"), "params: got 'tail'"),
        (baselines.influence_lissa(params="tail"), "params: got 'tail'"),
        (baselines.influence_arnoldi(rank=16), "rank: got 16, must be at most 15"),
        (baselines.influence_arnoldi(krylov=20), "krylov: got 20, must be at most 15"),
        (
            baselines.influence_arnoldi(rank=2, krylov=4, inverse_tolerance=50.0),
            "inverse_tolerance: got 50.0, must be below the largest",
        ),
    ],
)
def test_what_does_not_fit_the_problem(method, message, logistic):
    with pytest.raises(ValueError, match=message):
        method.fit(KEY, logistic[0])


@pytest.mark.parametrize("name", ["explicit", "cg", "lissa", "arnoldi"])
def test_a_bad_sample_is_named_by_every_method(name, logistic):
    context, query, targets = logistic
    spoilt = dataclasses.replace(context, inputs=context.inputs.at[7, 1].set(jnp.nan))
    # The curvature is a mean over all samples: one that is NaN makes all of it NaN.
    method = baselines.METHODS[f"influence_{name}"](**{"depth": 3} if name == "lissa" else {})
    with pytest.raises(ValueError, match=r"gradients of the training samples: got NaN or Inf at 1 \(first: 7\)"):
        method.scores(method.fit(KEY, spoilt), query, targets)


def test_a_bad_sample_and_a_bad_query_are_named(logistic):
    context, query, targets = logistic
    method = baselines.influence_explicit(damping=DAMPING)
    fitted = method.fit(KEY, context)
    spoilt = dataclasses.replace(
        fitted, context=dataclasses.replace(context, inputs=context.inputs.at[7, 1].set(jnp.nan))
    )
    with pytest.raises(ValueError, match=r"training samples: got NaN or Inf at 1 \(first: 7\)"):
        method.scores(spoilt, query, targets)
    with pytest.raises(ValueError, match=r"training samples: got NaN or Inf at 1 \(first: 7\)"):
        method.self_influence(spoilt)
    with pytest.raises(ValueError, match=r"queries: got NaN or Inf at 1 \(first: 2\)"):
        method.scores(fitted, query.at[2].set(jnp.inf), targets)
