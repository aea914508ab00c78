"""Attribution from a model whose coefficients obey the dual's constraints, against plain float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualxda_jax import attribution
from dualxda_jax.types import DualSolution, SolveInfo, SupportModel


def make_problem(rng, n=40, d=6, k=4, scaling=0.0, support=0.5, dtype=np.float32):
    """Features, labels and a solution with about `support` of its rows nonzero."""
    features = rng.normal(size=(n, d)).astype(dtype)
    labels = rng.integers(0, k, n)
    positive = rng.dirichlet(np.full(k, 0.3), n)
    coefficients = (np.eye(k)[labels] - positive) * (rng.random(n) < support)[:, None]
    coefficients = coefficients.astype(dtype)
    info = SolveInfo(*(jnp.zeros(()) for _ in range(3)), jnp.int32(1), jnp.array(True))
    solution = DualSolution(
        coefficients=jnp.asarray(coefficients),
        weights=jnp.asarray(coefficients.T @ features),
        intercept=jnp.asarray(scaling**2 * coefficients.sum(0)),
        intercept_scaling=scaling,
        info=info,
    )
    return features, labels, solution


def make_model(rng, **kwargs):
    features, labels, solution = make_problem(rng, **kwargs)
    return attribution.compress(features, labels, solution)


def make_query(rng, model, q=7):
    k, d = model.weights.shape
    query = jnp.asarray(rng.normal(size=(q, d)), model.features.dtype)
    return query, jnp.asarray(rng.integers(0, k, q))


def reference_scores(model, query, targets, include_intercept=True):
    kernel = np.asarray(query, np.float64) @ np.asarray(model.features, np.float64).T
    kernel = kernel + (model.intercept_scaling**2 if include_intercept else 0)
    return np.asarray(model.coefficients, np.float64).T[np.asarray(targets)] * kernel


class TestCompress:
    def test_takes_plain_lists(self, rng):
        features, labels, solution = make_problem(rng)
        plain = attribution.compress(features.tolist(), labels.tolist(), solution)
        model = attribution.compress(features, labels, solution)
        jax.tree.map(np.testing.assert_array_equal, plain, model)

    def test_keeps_support_rows_in_order(self, rng):
        features, labels, solution = make_problem(rng, scaling=0.5)
        model = attribution.compress(features, labels, solution)
        expected = np.flatnonzero(np.any(np.asarray(solution.coefficients) != 0, axis=1))
        assert 0 < expected.size < 40
        np.testing.assert_array_equal(model.index, expected)
        np.testing.assert_array_equal(model.features, features[expected])
        np.testing.assert_array_equal(model.labels, labels[expected])
        np.testing.assert_array_equal(model.coefficients, np.asarray(solution.coefficients)[expected])
        assert model.train_size == 40 and model.intercept_scaling == 0.5
        assert model.weights is solution.weights

    def test_tolerance_drops_rows_at_or_below_it(self, rng):
        features, labels, solution = make_problem(rng, support=1.0)
        largest = np.abs(np.asarray(solution.coefficients)).max(1)
        threshold = float(np.sort(largest)[10])
        model = attribution.compress(features, labels, solution, tolerance=threshold)
        np.testing.assert_array_equal(model.index, np.flatnonzero(largest > threshold))

    def test_scores_still_sum_to_logits_where_rows_are_dropped(self, rng):
        features, labels, solution = make_problem(rng, scaling=0.5, support=1.0)
        largest = np.abs(np.asarray(solution.coefficients)).max(1)
        model = attribution.compress(features, labels, solution, tolerance=float(np.sort(largest)[10]))
        logits = np.asarray(attribution.logits(model, features[:5]))
        for c in range(logits.shape[1]):
            scores = attribution.scores(model, features[:5], np.full(5, c))
            np.testing.assert_allclose(np.asarray(scores).sum(1), logits[:, c], rtol=1e-4, atol=1e-5)

    def test_reads_only_support_rows_of_a_memory_map(self, rng, tmp_path):
        features, labels, solution = make_problem(rng)
        np.save(tmp_path / "features.npy", features)
        mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
        model = attribution.compress(mapped, labels, solution)
        np.testing.assert_array_equal(model.features, features[np.asarray(model.index)])
        assert isinstance(model.features, jax.Array)

    def test_no_support_vectors(self, rng):
        features, labels, solution = make_problem(rng, support=0.0, scaling=1.0)
        model = attribution.compress(features, labels, solution)
        query, targets = make_query(rng, model)
        assert model.features.shape == (0, 6)
        assert attribution.scores(model, query, targets).shape == (7, 0)
        np.testing.assert_array_equal(attribution.dense(model, jnp.zeros((7, 0))), np.zeros((7, 40)))
        assert attribution.self_influence(model).shape == (0,)
        np.testing.assert_array_equal(attribution.logits(model, query), np.zeros((7, 4)))
        with pytest.raises(ValueError, match=r"^k: got 1"):
            attribution.top_k(model, query, targets, k=1)

    def test_keeps_dtypes(self, rng):
        features, labels, solution = make_problem(rng)
        model = attribution.compress(jnp.asarray(features, jnp.bfloat16), labels, solution)
        assert model.features.dtype == jnp.bfloat16 and model.coefficients.dtype == jnp.float32

    def test_nan_rows_are_kept(self, rng):
        features, labels, solution = make_problem(rng, support=0.0)
        broken = solution.coefficients.at[3].set(jnp.nan)
        model = attribution.compress(features, labels, DualSolution(**{**vars(solution), "coefficients": broken}))
        np.testing.assert_array_equal(model.index, [3])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda f, y: (f[:-1], y), "^features: got shape"),
            (lambda f, y: (f[:, :-1], y), r"^features: got shape \(40, 5\), must be \[40, 6\]"),
            (lambda f, y: (f, y[:-1]), "^labels: got shape"),
            (lambda f, y: (f, y.astype(np.float32)), "^labels: got dtype float32"),
            (lambda f, y: (f, np.full_like(y, 4)), r"^labels: got 4 at position 0 .* in 0\.\.3"),
        ],
    )
    def test_bad_input(self, rng, change, message):
        features, labels, solution = make_problem(rng)
        with pytest.raises(ValueError, match=message):
            attribution.compress(*change(features, labels), solution)

    @pytest.mark.parametrize("solution", [None, np.zeros((40, 4))])
    def test_what_is_no_solution(self, rng, solution):
        features, labels, _ = make_problem(rng)
        with pytest.raises(ValueError, match=r"^solution: got a \w+, must be the DualSolution"):
            attribution.compress(features, labels, solution)

    def test_a_solution_is_to_be_compressed_first(self, rng):
        _, labels, solution = make_problem(rng)
        query = np.zeros((2, 6), np.float32)
        calls = [
            lambda: attribution.scores(solution, query, labels[:2]),
            lambda: attribution.top_k(solution, query, labels[:2], k=1),
            lambda: attribution.logits(solution, query),
            lambda: attribution.self_influence(solution),
            lambda: attribution.dense(solution, query),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=r"^model: got a DualSolution, .* attribution\.compress"):
                call()

    @pytest.mark.parametrize("tolerance", [-1e-3, float("nan"), float("inf"), "a", None])
    def test_bad_tolerance(self, rng, tolerance):
        with pytest.raises(ValueError, match=r"^tolerance: got"):
            attribution.compress(*make_problem(rng), tolerance=tolerance)

    def test_queries_that_are_no_numbers(self, rng):
        features, labels, solution = make_problem(rng)
        model = attribution.compress(features, labels, solution)
        for query in (features.astype(complex), np.full(features.shape, "a")):
            with pytest.raises(ValueError, match=r"^query: got dtype"):
                attribution.logits(model, query)

    def test_inside_a_trace(self, rng):
        features, labels, solution = make_problem(rng)
        with pytest.raises(ValueError, match="outside of jit"):
            jax.jit(lambda s: attribution.compress(features, labels, s).features)(solution)

    def test_derivatives_pass_through(self, rng):
        features, labels, solution = make_problem(rng)

        def total(features, coefficients):
            changed = DualSolution(**{**vars(solution), "coefficients": coefficients})
            model = attribution.compress(features, labels, changed)
            return jnp.sum(model.features[:, :4] * model.coefficients)

        by_features, by_coefficients = jax.grad(total, argnums=(0, 1))(jnp.asarray(features), solution.coefficients)
        support = np.any(np.asarray(solution.coefficients) != 0, axis=1)
        np.testing.assert_array_equal(by_features[:, :4], solution.coefficients)
        np.testing.assert_array_equal(by_features[:, 4:], 0)
        np.testing.assert_array_equal(by_coefficients, np.where(support[:, None], features[:, :4], 0))


class TestScores:
    @pytest.mark.parametrize("include_intercept", [True, False])
    @pytest.mark.parametrize("scaling", [0.0, 0.7])
    def test_against_numpy(self, rng, scaling, include_intercept):
        model = make_model(rng, scaling=scaling)
        query, targets = make_query(rng, model)
        got = attribution.scores(model, query, targets, include_intercept=include_intercept)
        expected = reference_scores(model, query, targets, include_intercept)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("scaling", [0.0, 1.0])
    def test_completeness(self, rng, scaling):
        model = make_model(rng, scaling=scaling)
        query, _ = make_query(rng, model)
        logits = attribution.logits(model, query)
        for c in range(4):
            sums = attribution.scores(model, query, jnp.full(7, c)).sum(axis=1)
            np.testing.assert_allclose(sums, logits[:, c], rtol=1e-5, atol=2e-5)

    def test_float64(self, rng, x64):
        model = make_model(rng, scaling=0.3, dtype=np.float64)
        query, targets = make_query(rng, model)
        got = attribution.scores(model, query, targets)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, reference_scores(model, query, targets), rtol=1e-13, atol=1e-14)

    def test_bfloat16_is_accumulated_in_float32(self, rng):
        features, labels, solution = make_problem(rng, d=512)
        model = attribution.compress(jnp.asarray(features, jnp.bfloat16), labels, solution)
        query, targets = make_query(rng, model)
        assert query.dtype == jnp.bfloat16
        for asked in (query, query.astype(jnp.float32)):
            got = attribution.scores(model, asked, targets)
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, reference_scores(model, query, targets), rtol=1e-4, atol=1e-4)
            assert attribution.logits(model, asked).dtype == jnp.float32
            assert attribution.top_k(model, asked, targets, k=3).scores.dtype == jnp.float32

    def test_numpy_arguments(self, rng):
        model = make_model(rng)
        query, targets = make_query(rng, model)
        np.testing.assert_array_equal(
            attribution.scores(model, np.asarray(query), np.asarray(targets)),
            attribution.scores(model, query, targets),
        )

    def test_dense_spreads_and_sums(self, rng):
        model = make_model(rng)
        query, targets = make_query(rng, model)
        values = attribution.scores(model, query, targets)
        spread = attribution.dense(model, values)
        expected = np.zeros((7, 40), np.float32)
        expected[:, np.asarray(model.index)] = values
        np.testing.assert_array_equal(spread, expected)
        with pytest.raises(ValueError, match=r"^scores: got shape"):
            attribution.dense(model, values[:, :-1])

    def test_self_influence_is_the_score_of_a_sample_at_itself(self, rng):
        model = make_model(rng, scaling=0.5)
        own = attribution.scores(model, model.features, model.labels)
        influence = attribution.self_influence(model)
        np.testing.assert_allclose(influence, jnp.diagonal(own), rtol=1e-5)
        assert bool(jnp.all(influence >= 0))

    @pytest.mark.parametrize(
        ("query", "targets", "message"),
        [
            ((7, 5), np.zeros(7, int), "^query: got shape"),
            ((6,), np.zeros(7, int), "^query: got shape"),
            ((7, 6), np.zeros(6, int), "^targets: got shape"),
            ((7, 6), np.zeros(7, np.float32), "^targets: got dtype"),
            ((7, 6), np.full(7, 4), "^targets: got 4 at position 0"),
            ((7, 6), np.full(7, -1), "^targets: got -1 at position 0"),
        ],
    )
    def test_bad_input(self, rng, query, targets, message):
        model = make_model(rng)
        query = np.zeros(query, np.float32)
        for function in (attribution.scores, functools.partial(attribution.top_k, k=2)):
            with pytest.raises(ValueError, match=message):
                function(model, query, targets)

    def test_traced_targets_out_of_range_are_nan(self, rng):
        model = make_model(rng)
        query, _ = make_query(rng, model, q=3)
        got = jax.jit(functools.partial(attribution.scores, model, query))(jnp.array([-1, 0, 4]))
        np.testing.assert_array_equal(jnp.isnan(got).all(axis=1), [True, False, True])
        assert bool(jnp.isfinite(got[1]).all())


class TestTopK:
    # Around one block, exact multiples of a block and a ragged last block.
    @pytest.mark.parametrize("s", [1, 16, 17, 33])
    @pytest.mark.parametrize("largest", [True, False])
    def test_equals_sorting_all_scores(self, rng, monkeypatch, s, largest):
        small_blocks(monkeypatch, 16)
        model = make_model(rng, n=s, support=1.1, scaling=0.4)
        query, targets = make_query(rng, model)
        values = np.asarray(attribution.scores(model, query, targets))
        for k in {min(5, s), s}:
            got = attribution.top_k(model, query, targets, k=k, largest=largest)
            order = np.argsort(-values if largest else values, axis=1, kind="stable")[:, :k]
            np.testing.assert_array_equal(got.index, np.asarray(model.index)[order])
            np.testing.assert_allclose(got.scores, np.take_along_axis(values, order, axis=1), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("largest", [True, False])
    def test_ties_go_to_the_lower_index(self, rng, monkeypatch, largest):
        small_blocks(monkeypatch, 4)
        model = make_model(rng, n=23, support=1.1)
        # Two distinct values and zeros of both signs, spread over all blocks.
        coefficients = jnp.asarray(rng.choice([0.0, -0.0, 1.0, -1.0], size=(23, 4)), jnp.float32)
        features = jnp.ones((23, 6))
        model = type(model)(**{**vars(model), "coefficients": coefficients, "features": features})
        query = jnp.ones((2, 6)) * jnp.array([[1.0], [-1.0]])
        targets = jnp.array([0, 1])
        values = np.asarray(attribution.scores(model, query, targets))
        got = attribution.top_k(model, query, targets, k=23, largest=largest)
        order = np.argsort(-values if largest else values, axis=1, kind="stable")
        np.testing.assert_array_equal(got.index, np.asarray(model.index)[order])

    def test_without_intercept(self, rng):
        model = make_model(rng, scaling=2.0)
        query, targets = make_query(rng, model)
        got = attribution.top_k(model, query, targets, k=3, include_intercept=False)
        values = attribution.scores(model, query, targets, include_intercept=False)
        np.testing.assert_allclose(got.scores, jax.lax.top_k(values, 3)[0], rtol=1e-6)

    @pytest.mark.parametrize("k", [0, -1, 1000, 2.0])
    def test_bad_k(self, rng, k):
        model = make_model(rng)
        query, targets = make_query(rng, model)
        s = model.index.shape[0]
        with pytest.raises(ValueError, match=rf"^k: got {k}, must be an integer in 1\.\.{s}"):
            attribution.top_k(model, query, targets, k=k)

    def test_never_holds_all_scores(self, rng):
        n, q = 5000, 64
        model = make_model(rng, n=n, support=1.1)
        query, targets = make_query(rng, model, q=q)
        function = functools.partial(attribution.top_k, k=3)
        sizes = list(intermediate_sizes(jax.make_jaxpr(function)(model, query, targets).jaxpr))
        assert max(sizes) < q * n / 2
        assert max(sizes) >= q * 3

    def test_gradient_is_that_of_the_kept_scores(self, rng, x64):
        model = make_model(rng, n=30, support=1.1, scaling=0.5, dtype=np.float64)
        query, targets = make_query(rng, model)
        places = attribution.top_k(model, query, targets, k=3).index
        positions = jnp.searchsorted(model.index, places)
        weight = jnp.asarray(rng.normal(size=(7, 3)))

        def streamed(coefficients, features, query):
            changed = type(model)(**{**vars(model), "coefficients": coefficients, "features": features})
            return jnp.sum(weight * attribution.top_k(changed, query, targets, k=3).scores)

        def gathered(coefficients, features, query):
            changed = type(model)(**{**vars(model), "coefficients": coefficients, "features": features})
            values = attribution.scores(changed, query, targets)
            return jnp.sum(weight * jnp.take_along_axis(values, positions, axis=1))

        arguments = (model.coefficients, model.features, query)
        got = jax.grad(streamed, argnums=(0, 1, 2))(*arguments)
        expected = jax.grad(gathered, argnums=(0, 1, 2))(*arguments)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


def small_blocks(monkeypatch, rows):
    """Stream in blocks of `rows`."""
    monkeypatch.setattr(attribution.ranking, "_BLOCK_ROWS", rows)
    monkeypatch.setattr(attribution.ranking, "_MIN_BLOCK_ROWS", rows)


def intermediate_sizes(jaxpr):
    """Number of elements of every array that a program makes, nested programs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values())):
            nested = getattr(value, "jaxpr", value)
            if hasattr(nested, "eqns"):
                yield from intermediate_sizes(nested)


@pytest.mark.parametrize("largest", [True, False])
def test_nan_ranks_first_so_that_it_shows(largest):
    rng = np.random.default_rng(0)
    features, coefficients = rng.normal(size=(9, 3)).astype(np.float32), rng.normal(size=(9, 2)).astype(np.float32)
    coefficients[4] = np.nan
    model = SupportModel(
        *map(jnp.asarray, (coefficients, features, np.arange(9) % 2, np.arange(9))),
        jnp.zeros((2, 3)), jnp.zeros(2), 0.0, 9,
    )  # fmt: skip
    found = attribution.top_k(model, features[:2], np.array([0, 1]), k=2, largest=largest)
    np.testing.assert_array_equal(found.index[:, 0], [4, 4])
    assert np.isnan(found.scores[:, 0]).all() and np.isfinite(found.scores[:, 1]).all()
